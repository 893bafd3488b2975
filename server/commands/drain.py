"""`assay drain`: has a running server start a tier's engines again, or take them out of service and back."""

import asyncio
import json
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from server.commands.console import ConfigOption, JsonOption, err, out, tier_names
from server.config import Config
from server.config_file import load_config
from server.progress import Step, Steps
from tiers.errors import AssayError, ConfigError

if TYPE_CHECKING:
    from server.control import Account, DrainWanted

DONE = {
    "restart": "its engines were started again.",
    "stop": "out of service until `assay drain --resume`.",
    "resume": "in service again.",
}


class NotDone(AssayError):
    """The server has not done it, or not to its end; the sentence is the server's."""


def drain(
    tier: Annotated[
        str,
        typer.Argument(
            help="Reference, Turbo or Lite, of each of the config's models, or a full name such as "
            "Llama-3.1-8B-Instruct-Lite.",
            autocompletion=tier_names,
        ),
    ],
    config: ConfigOption = None,
    replica: Annotated[
        int | None, typer.Option(min=1, help="This one of the tier's engines alone, by its number in the log.")
    ] = None,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the engines and leave the tier out of service, until --resume.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Start what --stop has ended.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="SECONDS", help="For the requests of an engine to end; drain_timeout_s by default."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a tier's engines again, one after the other, without breaking off or refusing any request.

    Asks the server that runs from the same home. An engine that is drained gets nothing new, and is ended and
    started again once it has answered what it works on; who comes meanwhile is sent to the tier's others, or waits
    in its queue. If its requests take longer than they may, it goes on serving, and this command ends with 1.

    Ctrl-C gives up: an engine that still answers serves on, and one that was ended comes back all the same.

    Example: assay drain Lite --timeout 3600
    """
    from server.control import DrainWanted  # an HTTP client, for which no other command need wait
    from server.engines.drains import Work

    if stop and resume:
        raise ConfigError("--stop and --resume contradict each other.")
    work = Work.STOP if stop else Work.RESUME if resume else Work.RESTART
    settings = load_config(config)
    wanted = DrainWanted(tier=tier, work=work, replica=replica, timeout_s=timeout)
    accounts: list[Account] = []
    try:
        with Steps(err) as steps:
            asyncio.run(_ask(settings, wanted, steps, accounts))
    finally:
        if as_json and accounts:
            out.print_json(
                json.dumps([each.model_dump(include={"tier", "done", "problem", "states"}) for each in accounts])
            )
    if not as_json:
        for account in accounts:
            out.print(f"{escape(account.tier)}: {DONE[work]}", soft_wrap=True)


async def _ask(config: Config, wanted: "DrainWanted", steps: Steps, over: "list[Account]") -> None:
    """Ask, and show how far it is; what came of each tier is added to ``over``."""
    from server.control import ask_to_drain

    shown: str | None = None
    step: Step | None = None
    async with aclosing(ask_to_drain(config, wanted)) as accounts:
        with ExitStack() as under_way:
            async for account in accounts:
                if account.done is not None:
                    over.append(account)
                    if account.problem:
                        raise NotDone(account.problem)
                    under_way.close()
                    shown = None
                    continue
                title = f"{account.replica}: {account.doing}"
                if title != shown:
                    under_way.close()
                    shown, step = title, under_way.enter_context(steps.step(title))
                if step is not None and account.running:
                    step.detail(f"{account.running} of them")
