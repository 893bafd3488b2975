"""`assay gateway`: the half of `assay serve` that callers meet."""

from typing import Annotated

import typer
import uvloop

from server.commands.console import ConfigOption, err, log_to, welcome
from server.config import load_config
from server.engines.fleet import Fleet
from server.keys import Keys
from server.progress import Steps


def gateway(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Listen on this address instead of the config's.")] = None,
    port: Annotated[int | None, typer.Option(help="Listen on this port; 0 takes a free one.")] = None,
) -> None:
    """Serve tiers whose engines run elsewhere; starts none, and needs neither their weights nor a GPU.

    Every tier of the config says where its engines answer, by `launch: url` and `urls`; `assay engine` runs them.
    They may come and go: a tier without an engine answers 503 with retry-after, and the others go on.

    Example: assay gateway --config deploy/gateway.yaml
    """
    from server.serve import check_gateway, serve  # a web framework, for which no other command need wait

    log_to(err)
    settings = load_config(config, host=host, port=port)
    check_gateway(settings)
    steps = Steps(err)

    def announce(fleet: Fleet, url: str, keys: Keys) -> None:
        steps.close()
        welcome(fleet, url, with_keys=keys.required)

    with steps:
        uvloop.run(serve(settings, steps, announce, build=False))
