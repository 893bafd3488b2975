"""`assay serve | build | tiers`: the command line. Turns errors into one sentence and an exit code."""

import asyncio
import importlib.metadata
import json
import logging
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

import kernels
from server.checkpoints import Checkpoints
from server.config import Config, load_config
from server.fleet import Fleet
from server.progress import Steps
from server.serve import serve as run_server
from tiers.errors import AssayError, ConfigError
from tiers.manifest import Manifest
from tiers.tier import Tier, TierKind

app = typer.Typer(
    name="assay",
    help="One model at several precisions behind one OpenAI-compatible gateway.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="ASSAY_CONFIG",
        dir_okay=False,
        help="A YAML file; see deploy/. Without one the embedded model is served in three tiers.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


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
    _log_to(err)
    settings = load_config(config, host=host, port=port)
    steps = Steps(err)

    def announce(fleet: Fleet, url: str) -> None:
        steps.close()
        _print_welcome(fleet, url)

    with steps:
        uvloop.run(run_server(settings, steps, announce, build=build))


def _tier_names(incomplete: str) -> list[str]:
    return [kind.value for kind in TierKind if kind.value.lower().startswith(incomplete.lower())]


@app.command()
def build(
    tiers: Annotated[
        list[str] | None,
        typer.Argument(
            help="Reference, Turbo or Lite, or a full name such as Llama-3.1-8B-Instruct-Lite; all by default.",
            autocompletion=_tier_names,
        ),
    ] = None,
    config: ConfigOption = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build again even what is whole.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build the tiers' checkpoints and verify them, without serving.

    Example: assay build Lite --rebuild
    """
    _log_to(err)
    settings = load_config(config)
    chosen = _choose(settings, tiers)
    with Steps(err) as steps:
        manifests = asyncio.run(Checkpoints(settings, steps).prepare(chosen, rebuild=rebuild))
    if as_json:
        out.print_json(json.dumps({name: _summary(manifest) for name, manifest in manifests.items()}))
        return
    table = _table("model", "recipe", "size", "checkpoint")
    for name, manifest in manifests.items():
        table.add_row(name, manifest.recipe, f"{manifest.size / 1e6:.0f} MB", manifest.short_digest)
    _show(table)


@app.command()
def tiers(
    url: Annotated[str, typer.Option(envvar="ASSAY_URL", help="The running server.")] = "http://127.0.0.1:8000",
    as_json: JsonOption = False,
) -> None:
    """Show the tiers of a running server: precision, checkpoint, state.

    Example: assay tiers --url http://127.0.0.1:8000 --json
    """
    answer = _get(f"{url.rstrip('/')}/v1/tiers")
    if as_json:
        out.print_json(json.dumps(answer))
        return
    table = _table("model", "precision", "recipe", "checkpoint", "context", "state")
    for tier in answer["data"]:
        state = tier["state"]
        table.add_row(
            tier["id"],
            tier["precision"]["name"],
            tier["recipe"]["name"],
            tier["checkpoint"]["digest"][:12],
            str(tier["context_length"]),
            f"[green]{state}[/]" if state == "ready" else f"[yellow]{escape(state)}[/]",
        )
    _show(table)


def _choose(config: Config, names: list[str] | None) -> list[Tier]:
    """The configured tiers that a person named, by grade or in full."""
    if not names:
        return list(config.tiers)
    chosen = []
    for name in names:
        wanted = name.lower()
        found = [t for t in config.tiers if wanted in {t.kind.lower(), *(n.lower() for n in t.names)}]
        if not found:
            known = ", ".join(tier.name for tier in config.tiers)
            raise ConfigError(f"There is no tier {name!r} in this config; the tiers are {known}.")
        chosen += found
    return chosen


def _table(*columns: str) -> Table:
    table = Table(box=None)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _show(table: Table) -> None:
    """Print every cell whole, however narrow the terminal: names are there to be copied."""
    Console(highlight=False, width=200).print(table)


def _summary(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(mode="json") | {"digest": manifest.digest, "size": manifest.size}


def _get(url: str) -> Any:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is not an http or https address.")
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  # the scheme was just checked
            return json.load(answer)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"No Assay server answers at {url} ({reason}): start one with `assay serve`.") from None


def _print_welcome(fleet: Fleet, url: str) -> None:
    table = _table("model name", "precision", "recipe", "checkpoint")
    for replica in fleet.replicas:
        manifest = replica.manifest
        for name in replica.tier.names:
            table.add_row(name, manifest.precision.name, manifest.recipe, manifest.short_digest)
    _show(table)
    first_model = [r.tier for r in fleet.replicas if r.tier.model == fleet.replicas[0].tier.model]
    body = {
        "model": first_model[-1].name,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    }
    out.print(f"\n[green]ready[/] on {url}. Try:\n")
    curl = f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(body)}'"
    out.print(escape(curl), soft_wrap=True)


def _log_to(console: Console) -> None:
    handler: logging.Handler = (
        RichHandler(console=console, show_path=False)
        if console.is_terminal
        else logging.StreamHandler(console.file)
    )
    if not console.is_terminal:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


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
        err.print(f"[red]assay:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
