"""`assay verify`: every byte of the checkpoints, read again."""

import asyncio
from typing import Annotated

import typer

from server.checkpoints import Checkpoints
from server.commands.console import ConfigOption, err, log_to, out, tier_names
from server.config import choose_tiers
from server.config_file import load_config
from server.progress import Steps


def verify(
    tiers: Annotated[
        list[str] | None,
        typer.Argument(help="As for `assay build`; all by default.", autocompletion=tier_names),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Hold every file of the checkpoints against its manifest, reading all of it again; builds nothing.

    `assay serve` does the same at every start, but trusts a digest as long as the file is untouched. This finds
    what a disk lost by itself.

    Example: assay verify Lite
    """
    log_to(err)
    settings = load_config(config)
    with Steps(err) as steps:
        checkpoints = Checkpoints(settings, steps, may_build=False, trusting=False)
        manifests = asyncio.run(checkpoints.prepare(choose_tiers(settings, tiers)))
    for name, manifest in manifests.items():
        out.print(f"{name}: {len(manifest.files)} files are what their manifest says ({manifest.short_digest})")
