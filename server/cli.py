"""`assay serve | gateway | engine | plan | build | …`: an error is one sentence and an exit code."""

import asyncio
import importlib.metadata
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import kernels
from server.backend import backend_of, machine_of
from server.checkpoints import Checkpoints
from server.commands.certificate import certificate_app
from server.commands.certify import certify
from server.commands.console import (
    ConfigOption,
    JsonOption,
    complain,
    err,
    fetch,
    log_to,
    out,
    tier_names,
)
from server.commands.drain import drain
from server.commands.engine import engine
from server.commands.gateway import gateway
from server.commands.keys import keys_app
from server.commands.operators import operators
from server.commands.sensitivity import sensitivity
from server.commands.tables import parts_table, plan_table, recipe_paragraphs, show, table, tiers_table
from server.config import choose_tiers
from server.config_file import load_config
from server.model_config import ModelConfig
from server.progress import Steps
from tiers.catalog import CATALOG, find_member
from tiers.engine import installed_backend
from tiers.errors import AssayError, ConfigError
from tiers.hardware import CARDS, NODE_GPUS, Machine, find_card
from tiers.manifest import Manifest
from tiers.placement import alone, check_hardware, together
from tiers.recipe import recipes

app = typer.Typer(
    name="assay",
    help="One model at several precisions behind one OpenAI-compatible gateway.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(keys_app, name="keys")
app.add_typer(certificate_app, name="certificate")
app.command()(engine)
app.command()(gateway)
app.command()(certify)
app.command()(drain)
app.command()(operators)
app.command()(sensitivity)


@app.callback(invoke_without_command=True)
def assay(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """One model at several precisions behind one OpenAI-compatible gateway."""
    if version:
        out.print(f"assay {importlib.metadata.version('assay')}")
        raise typer.Exit


@app.command()
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


def _model_names(incomplete: str) -> list[str]:
    return [member.name for member in CATALOG if member.name.lower().startswith(incomplete.lower())]


def _card_names(incomplete: str) -> list[str]:
    return [card.name for card in CARDS if card.name.lower().startswith(incomplete.lower())]


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model of the catalog, such as Llama-3.1-70B-Instruct, each of its tiers with the machine to "
            "itself; without one, the config's tiers, all together as `serve` would start them.",
            autocompletion=_model_names,
        ),
    ] = None,
    config: ConfigOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="A card, such as H100, instead of this machine's.", autocompletion=_card_names),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help=f"Cards in a node; {NODE_GPUS} by default.")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes that a pipeline may go over, and tiers of launch: ray.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=16, help="Longest prompt and answer together, instead of the config's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each tier takes, over how many GPUs, and how many requests fit; or why not, and what would.

    Exits with 1 if a tier does not fit. Nothing is downloaded, built or started. All but weights and KV cache are
    estimates.

    Example: assay plan Llama-3.1-405B-Instruct --gpu H100 --count 8
    """
    settings = load_config(config)
    if gpu:
        machine = Machine.of(find_card(gpu), count or NODE_GPUS, nodes or 1)
    elif count or nodes:
        raise ConfigError("--count and --nodes are of a card: name it with --gpu.")
    else:
        machine = machine_of(settings)
    member = find_member(model) if model else None
    if member:
        entry = ModelConfig(name=member.name, source=member.ids[0])
        settings = settings.model_copy(update={"models": (entry,)})
    elif not settings.tiers_started:
        raise ConfigError("Every tier of this config is of launch: url, and takes nothing of a machine here.")
    tiers = tuple(replace(tier, context_length=context or tier.context_length) for tier in settings.tiers_started)
    planned = alone(tiers, machine) if member else together(tiers, machine)
    if as_json:
        out.print_json(planned.model_dump_json())
    else:
        if member:
            size = f"{member.shape.parameters / 1e9:.1f} billion parameters"
            out.print(f"{member.name}: {size}, {member.licence} ({member.licence_url})", soft_wrap=True)
        out.print(f"On {planned.machine}, {'each tier by itself' if member else 'all tiers together'}:")
        show(plan_table(planned.tiers))
        for problem in planned.problems:
            out.print(f"\n[red]does not fit[/]  {escape(problem)}", soft_wrap=True)
    if planned.problems:
        raise typer.Exit(1)


@app.command()
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


@app.command()
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


@app.command()
def tiers(
    url: Annotated[str, typer.Option(envvar="ASSAY_URL", help="The running server.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None,
        typer.Option(
            envvar="ASSAY_API_KEY",
            help="An API key, if the server asks for one. Better in the variable: others see a command's options.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the tiers of a running server: what each declares, what its engine was seen to compute, its state.

    Example: assay tiers --url http://127.0.0.1:8000 --json
    """
    answer = fetch(f"{url.rstrip('/')}/v1/tiers", key)
    if as_json:
        out.print_json(json.dumps(answer))
        return
    show(tiers_table(answer["data"]))
    out.print()
    show(parts_table(answer["data"]))
    for tier in answer["data"]:
        for problem in (tier["verified"] or {}).get("disagreements", ()):
            out.print(f"[red]{tier['id']}[/]: {escape(problem)}", soft_wrap=True)


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


def _check_own_packages() -> None:
    """The name `kernels` is also that of an unrelated package, which other libraries look for."""
    ours = Path(__file__).resolve().parent.parent / "kernels"
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version or Path(kernels.__file__ or "").resolve().parent != ours:
        raise ConfigError(
            f"This environment also holds the unrelated package `kernels` {version or ''}, which takes the place "
            "of Assay's own: run `pip uninstall kernels`."
        )


def main() -> None:
    """The console script."""
    try:
        _check_own_packages()
        app()
    except AssayError as error:
        complain(error)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
