"""`assay certify`: what it is asked, and what it shows."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.alone import alone
from server.commands.console import ConfigOption, JsonOption, err, log_to, out, tier_names
from server.commands.tables import certificates_table, show
from server.config import Config, choose_tiers
from server.config_file import load_config
from server.progress import Steps
from tiers.conformance.findings import Verdict
from tiers.errors import BuildError, ConfigError
from tiers.tier import Tier

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from tiers.conformance.certificate import Certificate
    from tiers.conformance.extent import Asked

OCCUPIED = BuildError("Another assay certifies from this home: wait for it.")


def certify(
    tiers: Annotated[
        list[str] | None,
        typer.Argument(help="As for `assay build`; all by default.", autocompletion=tier_names),
    ] = None,
    config: ConfigOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few prompts that stand for all, in minutes instead of an hour.")
    ] = False,
    prompts: Annotated[
        int | None, typer.Option(metavar="N", help="How many, instead of the 24 of --quick or of all.", min=1)
    ] = None,
    until_decided: Annotated[
        bool,
        typer.Option(
            "--until-decided",
            help="Begin with 24 prompts, and go on until each verdict is PASS or FAIL, or there are no more. "
            "Intervals are a little wider, for one looks several times.",
        ),
    ] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Plant faults in engines of their own, and see that each is found.")
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=0, help="How often the self-test measures the unbroken engine again.")
    ] = 3,
    sign: Annotated[
        Path | None, typer.Option(help="A private key, as `assay certificate keygen` makes one.", dir_okay=False)
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Measure a server that someone else runs, by what its OpenAI API tells any caller, such as "
            "https://host/v1. It takes a reference pack and no engine here. The server must take token ids, and "
            "give prompt_logprobs and logprobs, the 20 likeliest tokens of each position, as vLLM does. KL and TV "
            "are then lower bounds: they show that a limit is exceeded, never that it holds.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What that server calls the tier; the tier's name by default."),
    ] = None,
    key_env: Annotated[
        str | None,
        typer.Option(metavar="VAR", help="The environment variable that has that server's API key; never shown."),
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option(
            help="The reference pack for --url, hidden states not needed; by default the newest of home that has "
            "as much as --quick and --prompts say.",
            file_okay=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how far tiers are from the reference, and write their certificates and a report.

    Measures the engines of a server that runs from the same home, letting its callers go first; without one it
    starts them as `assay serve` does. The reference answers the prompts, and every tier is walked along the
    answers and a fixed corpus: as prompts, and token by token. Exits with 0 if all tiers keep to their budgets,
    with 1 if one does not, and with 2 if more prompts would be needed to tell.

    With --url it is a server that someone else runs. Its certificate lies beside the tiers' own, with the
    evidence, the scores of every token; no gateway takes it for a tier's.

    Example: assay certify Turbo --quick

    Example: assay certify Turbo --quick --url https://host/v1 --model NAME --key-env VAR
    """
    log_to(err)
    settings = load_config(config)
    if url is None and (lone := _given({"--model": model, "--key-env": key_env, "--pack": pack})):
        raise ConfigError(f"{lone} is of a server that someone else runs: name it with --url.")
    if url is not None and (own := _given({"--self-test": self_test, "--until-decided": until_decided})):
        raise ConfigError(f"{own} takes engines of one's own, and --url names someone else's.")
    if pack is not None and (much := _given({"--quick": quick, "--prompts": prompts})):
        raise ConfigError(f"{much} and --pack both say which reference pack is taken: give one of them.")
    if self_test:
        from server.commands.self_test import self_test_command

        raise typer.Exit(self_test_command(settings, repeats=repeats, as_json=as_json))
    # What measures needs libraries for which no other command need wait.
    from tiers.conformance.extent import Asked
    from tiers.conformance.signature import read_private_key

    key = read_private_key(sign) if sign else None  # before an hour of measuring
    chosen = choose_tiers(settings, tiers)
    asked = Asked(quick=quick, prompts=prompts, until_decided=until_decided)
    if url is not None:
        if len(chosen) != 1:
            raise ConfigError("--url is of one tier: name it, as in `assay certify Turbo --url https://host/v1`.")
        certificates, written = _outside(settings, chosen[0], asked, pack, url, model, key_env, key)
    else:
        certificates, written = _here(settings, chosen, asked, key)
    if as_json:
        out.print_json(json.dumps([json.loads(each.canonical) for each in certificates]))
    else:
        show(certificates_table(certificates))
        out.print(f"The report is {written}", soft_wrap=True)
    verdicts = {each.verdict for each in certificates}
    if verdicts != {Verdict.PASS}:
        raise typer.Exit(1 if Verdict.FAIL in verdicts else 2)


def _here(
    settings: Config, chosen: Sequence[Tier], asked: "Asked", key: "Ed25519PrivateKey | None"
) -> tuple[list["Certificate"], Path]:
    """Of the tiers' own engines; and where the report is."""
    from server.measuring.certify import certify as measure_tiers
    from server.measuring.written import Written

    with Steps(err) as steps, alone(settings.packs, OCCUPIED, BuildError):
        written = Written(settings, chosen, key)
        measured = asyncio.run(measure_tiers(settings, chosen, asked, steps, written.add))
    return [each.certificate for each in measured], written.report


def _outside(
    settings: Config,
    tier: Tier,
    asked: "Asked",
    pack: Path | None,
    url: str,
    model: str | None,
    key_env: str | None,
    key: "Ed25519PrivateKey | None",
) -> tuple[list["Certificate"], Path]:
    """Of someone else's server; and where the report is."""
    from server.measuring.certify_outside import certify_outside, write
    from server.measuring.outside import PublicApi, read_key, read_url

    api = PublicApi(read_url(url), model or tier.name, read_key(key_env) if key_env else None)
    with Steps(err) as steps:
        found = asyncio.run(certify_outside(settings, tier, api, asked, pack, steps))
        written = write(found, tier, api, settings, key)
    return [found.measured.certificate], written


def _given(options: Mapping[str, object]) -> str | None:
    """The first of these options that was."""
    return next((name for name, value in options.items() if value), None)
