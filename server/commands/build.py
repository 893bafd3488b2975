"""`assay build`: the checkpoints, without serving; and what recipes there are for them."""

import asyncio
import json
from typing import Annotated, Any

import typer

from server.backend import backend_of
from server.checkpoints import Checkpoints
from server.commands.console import ConfigOption, JsonOption, err, log_to, out, tier_names
from server.commands.tables import recipe_paragraphs, show, table
from server.config import choose_tiers
from server.config_file import load_config
from server.progress import Steps
from tiers.engine import installed_backend
from tiers.hardware import Machine
from tiers.manifest import Manifest
from tiers.placement import check_hardware
from tiers.recipe import recipes


def build(
    tiers: Annotated[
        list[str] | None,
        typer.Argument(
            help="Reference, Turbo or Lite, or a full name such as Llama-3.1-8B-Instruct-Lite; all by default.",
            autocompletion=tier_names,
        ),
    ] = None,
    config: ConfigOption = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build again even what is whole.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="Describe the recipes and build nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build the tiers' checkpoints and verify them, without serving.

    Example: assay build Lite --rebuild
    """
    if list_recipes:
        _print_recipes(as_json=as_json)
        return
    log_to(err)
    settings = load_config(config)
    chosen = choose_tiers(settings, tiers)
    check_hardware(chosen, Machine.here(backend_of(settings)))
    with Steps(err) as steps:
        manifests = asyncio.run(Checkpoints(settings, steps).prepare(chosen, rebuild=rebuild))
    if as_json:
        out.print_json(json.dumps({name: _summary(manifest) for name, manifest in manifests.items()}))
        return
    rows = table("model", "recipe", "bits per weight", "size", "checkpoint")
    for name, manifest in manifests.items():
        bits, size = f"{manifest.bits_per_weight:.2f}", f"{manifest.size / 1e6:.0f} MB"
        rows.add_row(name, manifest.recipe, bits, size, manifest.short_digest)
    show(rows)


def _print_recipes(*, as_json: bool) -> None:
    """Each recipe with its paragraph, and whether it can be had on this machine."""
    backend = installed_backend()
    if as_json:
        every = {
            name: recipe.model_dump(mode="json") | {"not_here": recipe.why_not_on(backend, None)}
            for name, recipe in recipes().items()
        }
        out.print_json(json.dumps(every))
        return
    for paragraph in recipe_paragraphs(backend):
        out.print(paragraph)


def _summary(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(mode="json") | {"digest": manifest.digest, "size": manifest.size}
