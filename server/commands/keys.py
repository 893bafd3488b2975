"""`assay keys add | list | remove`: who may call."""

import contextlib
import json
from typing import Annotated, Any

import typer
from rich.markup import escape

from server.commands.console import ConfigOption, JsonOption, err, log_to, out
from server.commands.tables import keys_table, show
from server.config import Config, choose_tiers
from server.config_file import load_config
from server.keys import Key, KeyFile
from tiers.errors import AssayError
from tiers.tier import TierKind

keys_app = typer.Typer(
    no_args_is_help=True,
    help="Make, list and remove the keys that callers send as `authorization: Bearer KEY`.",
)


def _config_of(context: typer.Context) -> Config:
    return load_config(context.params.get("config"))


def _tier_names(context: typer.Context, incomplete: str) -> list[str]:
    names = [kind.value for kind in TierKind]
    with contextlib.suppress(AssayError):  # a completion cannot say what is wrong with the config
        names += [tier.name for tier in _config_of(context).tiers]
    return [name for name in names if name.lower().startswith(incomplete.lower())]


def _key_names(context: typer.Context, incomplete: str) -> list[str]:
    with contextlib.suppress(AssayError):
        keys = KeyFile(_config_of(context).keys_file).read()
        return [key.name for key in keys if key.name.startswith(incomplete)]
    return []


Limit = Annotated[int | None, typer.Option(min=1, help="No limit by default.")]


@keys_app.command()
def add(
    name: Annotated[str, typer.Argument(help="Who will hold it, such as alice or ci@example.org.")],
    config: ConfigOption = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="Reference, Turbo or Lite, or a full name such as Llama-3.1-8B-Instruct-Lite; may be given more "
            "than once. All by default, later ones included.",
            autocompletion=_tier_names,
        ),
    ] = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent_requests: Limit = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what it allows as well, as JSON.")] = False,
) -> None:
    """Make a key and print it, this once: only a salted hash is kept.

    A running server takes it within a second. With the first key a server begins to ask for one.

    Example: assay keys add alice --tier Lite --requests-per-minute 60
    """
    log_to(err)
    settings = load_config(config)
    file = KeyFile(settings.keys_file)
    key = file.add(
        name,
        tiers=_as_written(settings, tier) if tier else None,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
    )
    if as_json:
        (made,) = (each for each in file.read() if each.name == name)
        out.print_json(json.dumps(_shown(made) | {"key": key}))
    else:
        out.print(key, markup=False, soft_wrap=True)
    kept = escape(str(settings.keys_file))
    err.print(
        f"The key of {escape(name)} is shown only now, for {kept} keeps a hash of it; a running server takes it "
        "within a second.",
        soft_wrap=True,
    )


@keys_app.command("list")
def list_keys(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show who holds a key and what it allows; never the key.

    Example: assay keys list --json
    """
    log_to(err)
    file = KeyFile(load_config(config).keys_file)
    keys = file.read()
    if as_json:
        out.print_json(json.dumps([_shown(key) for key in keys]))
    elif keys:
        show(keys_table(keys))
    else:
        err.print(f"No keys in {escape(str(file.path))}: `assay keys add NAME` makes one.", soft_wrap=True)


@keys_app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Whose key.", autocompletion=_key_names)],
    config: ConfigOption = None,
) -> None:
    """Make a key worthless; a running server refuses it within a second.

    Example: assay keys remove alice
    """
    log_to(err)
    file = KeyFile(load_config(config).keys_file)
    file.remove(name)
    last = "" if file.read() else " It was the last: nobody may call until there is another."
    err.print(f"A running server refuses the key of {escape(name)} within a second.{last}", soft_wrap=True)


def _as_written(settings: Config, names: list[str]) -> list[str]:
    """The tiers that a person named as the config writes them: a grade of every model, or one tier in full."""
    written = []
    for name in names:
        found = choose_tiers(settings, [name])
        written.append(found[0].kind.value if name.lower() == found[0].kind.lower() else found[0].name)
    return list(dict.fromkeys(written))


def _shown(key: Key) -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"salt", "hash"})
