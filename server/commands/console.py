"""What the commands share: options, where they print and log, how they greet, and how they ask a server."""

import json
import logging
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from server.config_file import load_config
from server.logs import JsonHandler, LogFormat, TextFormatter, format_asked_for, log_by, writes_json
from tiers.errors import AssayError, ConfigError
from tiers.tier import TierKind

log = logging.getLogger("assay")

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


def tier_names(incomplete: str) -> list[str]:
    """Grades of tiers that begin so, for a shell to complete."""
    return [kind.value for kind in TierKind if kind.value.lower().startswith(incomplete.lower())]


def configured_models(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the config's models that begin so, for a shell to complete."""
    try:
        settings = load_config(context.params.get("config"))
    except AssayError:
        return []  # a shell has no place for a sentence
    return [each.name for each in settings.models if each.name.lower().startswith(incomplete.lower())]


def log_to(console: Console, log_format: LogFormat | None = None) -> None:
    """Send warnings there: in colour on a terminal, with a time elsewhere, or as JSON."""
    if (log_format or format_asked_for()) == "json":
        log_by(JsonHandler(console.file))
        return
    handler: logging.Handler = (
        RichHandler(console=console, show_path=False)
        if console.is_terminal
        else logging.StreamHandler(console.file)
    )
    handler.setFormatter(TextFormatter(with_time=not console.is_terminal))
    log_by(handler)


def complain(error: AssayError) -> None:
    """Say why the command ends."""
    if writes_json():
        log.critical("%s", error)
    else:
        err.print(f"[red]assay:[/] {escape(str(error))}", soft_wrap=True)


def fetch(url: str, key: str | None = None) -> Any:
    """JSON from a running server, with an API key if it asks for one.

    Raises:
        ConfigError: nobody answers there, not with JSON, or not without another key.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is not an http or https address.")
    request = urllib.request.Request(url)  # noqa: S310  # the scheme was just checked
    if key := (key or "").strip():
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("The API key has characters that no key has; `assay keys add` prints them right.")
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return json.load(answer)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == HTTPStatus.UNAUTHORIZED:
            which = "another API key" if key else "an API key"
            raise ConfigError(f"{url} asks for {which}: put it into ASSAY_API_KEY.") from None
        reason = getattr(error, "reason", error)
        raise ConfigError(f"No Assay server answers at {url} ({reason}): start one with `assay serve`.") from None


def say_ready(url: str, text: str, **facts: object) -> None:
    """Say that all is up: a text for people, or a line of a JSON log."""
    if writes_json():
        log.info("ready on %s", url, extra={"url": url, **facts})
    else:
        out.print(text, soft_wrap=True)
