"""`assay engine`: the half of `assay serve` that computes."""

import asyncio
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from server.commands.console import ConfigOption, err, log_to, out, say_ready, tier_names
from server.config import choose_tiers
from server.config_file import load_config
from server.engine_key import VARIABLE
from server.progress import Steps
from tiers.errors import ConfigError

FOLLOW_S = 0.5


def engine(
    tier: Annotated[
        str,
        typer.Argument(
            help="Reference, Turbo or Lite, or a full name such as Llama-3.1-8B-Instruct-Lite.",
            autocompletion=tier_names,
        ),
    ],
    config: ConfigOption = None,
    host: Annotated[
        str, typer.Option(help="Listen on this address; one that others can reach needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Listen on this port.")] = 8100,
    build: Annotated[bool, typer.Option(help="Build the checkpoint if it is missing.")] = True,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print vLLM's environment and command line, and start nothing.")
    ] = False,
) -> None:
    """Run one engine of a tier in the foreground, for gateways to find by `launch: url`.

    It answers who shows the key in the file `engine_key:` or in ASSAY_ENGINE_KEY; on loopback one is made up,
    which `assay certify` finds. Before it says that it is ready, its precision is read back and held against the
    checkpoint's manifest. SIGTERM lets running requests finish (drain_timeout_s) and takes no new ones; if the
    engine itself ends, the command does, with exit code 1.

    One in stages (pipeline_parallel) with more GPUs than this machine has goes over the nodes of the Ray cluster
    that this machine is in, and waits for them for ray.room_timeout_s.

    Example: assay engine Lite --config deploy/gateway.yaml --port 8102
    """
    from server.one_engine import OneEngine  # for which no other command need wait

    log_to(err)
    settings = load_config(config)
    log_to(err, settings.log_format)
    chosen = choose_tiers(settings, [tier])
    if len(chosen) > 1:
        raise ConfigError(f"{tier} is of several models: name one, such as {chosen[0].name}.")
    one = OneEngine(settings, chosen[0], host, port)
    if print_only:
        command = asyncio.run(one.command())
        for name, value in sorted(command.environment.items()):
            shown = f"${{{VARIABLE}:?}}" if name == "VLLM_API_KEY" else shlex.quote(value)
            out.print(f"export {name}={shown}", soft_wrap=True, markup=False)
        out.print("exec", shlex.join(command.arguments), soft_wrap=True, markup=False)
        return
    steps = Steps(err)

    def announce(url: str) -> None:
        steps.close()
        say_ready(url, f"{chosen[0].name}: [green]ready[/] on {url}", tier=chosen[0].name)

    with steps, _shown(one.log_file):
        asyncio.run(one.run(steps, announce, build=build))


@contextmanager
def _shown(log_file: Path) -> Iterator[None]:
    """Pass on what the engine logs, where no person watches: an orchestrator keeps what a container says."""
    if err.is_terminal:
        yield
        return
    over = threading.Event()
    following = threading.Thread(target=_follow, args=(log_file, time.time(), over), daemon=True)
    following.start()
    try:
        yield
    finally:
        over.set()
        following.join()


def _follow(log_file: Path, since: float, over: threading.Event) -> None:
    """Copy what is written to a file from now on; one from before is not looked at."""
    while not (log_file.exists() and log_file.stat().st_mtime >= since):
        if over.wait(FOLLOW_S):
            return
    with log_file.open("rb") as file:
        while True:
            ended = over.wait(FOLLOW_S)  # what came before is still to be shown
            if log_file.stat().st_size < file.tell():
                file.seek(0)  # somebody has cut it off
            sys.stdout.buffer.write(file.read())
            sys.stdout.buffer.flush()
            if ended:
                return
