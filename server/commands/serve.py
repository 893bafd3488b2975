"""`assay serve`: all of it on one machine."""

from typing import Annotated

import typer

from server.commands.console import ConfigOption, err, log_to
from server.config_file import load_config


def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Listen on this address instead of the config's.")] = None,
    port: Annotated[int | None, typer.Option(help="Listen on this port; 0 takes a free one.")] = None,
    build: Annotated[bool, typer.Option(help="Build checkpoints that are missing before serving.")] = True,
) -> None:
    """Prepare the tiers, start an engine for each, and serve until SIGTERM or Ctrl-C.

    The first Ctrl-C lets running requests finish; a second one ends them at once.

    Example: assay serve --config deploy/llama-3.1-8b.yaml
    """
    from server.commands.serving import serve_here  # a web framework, for which no other command need wait

    log_to(err)
    settings = load_config(config, host=host, port=port)
    log_to(err, settings.log_format)
    serve_here(settings, build=build)
