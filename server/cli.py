"""`assay`: its commands, a module of `server/commands` each; an error is one sentence and an exit code."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated

import typer

import kernels
from server.commands.build import build
from server.commands.certificate import certificate_app
from server.commands.certify import certify
from server.commands.console import complain, out
from server.commands.drain import drain
from server.commands.engine import engine
from server.commands.gateway import gateway
from server.commands.keys import keys_app
from server.commands.operators import operators
from server.commands.plan import plan
from server.commands.sensitivity import sensitivity
from server.commands.serve import serve
from server.commands.tiers import tiers
from server.commands.verify import verify
from tiers.errors import AssayError, ConfigError

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
app.command()(serve)
app.command()(plan)
app.command()(build)
app.command()(verify)
app.command()(tiers)


@app.callback(invoke_without_command=True)
def assay(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """One model at several precisions behind one OpenAI-compatible gateway."""
    if version:
        out.print(f"assay {importlib.metadata.version('assay')}")
        raise typer.Exit


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
