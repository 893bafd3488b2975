"""`assay gateway`: the half of `assay serve` that callers meet."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
import uvloop
from rich.console import Console

from server.commands.console import ConfigOption, err, log_to, say_ready
from server.config import Config
from server.config_file import load_config
from server.progress import Steps
from server.stop import Stop

if TYPE_CHECKING:
    from server.worker import Worker


def gateway(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Listen on this address instead of the config's.")] = None,
    port: Annotated[int | None, typer.Option(help="Listen on this port; 0 takes a free one.")] = None,
    workers: Annotated[int | None, typer.Option(help="So many processes on the one port, a core each.")] = None,
) -> None:
    """Serve tiers whose engines run elsewhere; starts none, and needs neither their weights nor a GPU.

    Every tier of the config says where its engines answer, by `launch: url` and `urls`; `assay engine` runs them.
    They may come and go: a tier without an engine answers 503 with retry-after, and the others go on.

    Example: assay gateway --config deploy/gateway.yaml
    """
    from server.commands.serving import serve_here  # a web framework, for which no other command need wait
    from server.serve import check_gateway

    log_to(err)
    settings = load_config(config, host=host, port=port, workers=workers)
    log_to(err, settings.log_format)
    check_gateway(settings)
    if settings.workers > 1:
        uvloop.run(_several(settings))
        return
    serve_here(settings, build=False)


async def _several(config: Config) -> None:
    from server.workers import run_workers  # likewise

    stop = Stop()
    stop.listen()

    def announce(url: str) -> None:
        say_ready(url, f"[green]ready[/] on {url}, {config.workers} processes", workers=config.workers)

    await run_workers(partial(_one_of_several, config), config, stop.asked, stop.at_once, announce)


def _one_of_several(config: Config, worker: "Worker") -> None:
    """What each of them runs."""
    from server.serve import serve

    log_to(err, config.log_format)
    steps = Steps(Console(quiet=True))  # those of one would be written as often as there are processes
    uvloop.run(serve(config, steps, lambda fleet, url, keys: worker.tell_ready(), build=False, worker=worker))
