"""`assay certify`: what it is asked, and what it shows."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from server.alone import alone
from server.config import choose_tiers, load_config
from server.console import ConfigOption, JsonOption, err, log_to, out, tier_names
from server.progress import Steps
from server.tables import certificates_table, show
from tiers.conformance.findings import Verdict
from tiers.errors import BuildError

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
    as_json: JsonOption = False,
) -> None:
    """Measure how far tiers are from the reference, and write their certificates and a report.

    Measures the engines of a server that runs from the same home, letting its callers go first; without one it
    starts them as `assay serve` does. The reference answers the prompts, and every tier is walked along the
    answers and a fixed corpus: as prompts, and token by token. Exits with 0 if all tiers keep to their budgets,
    with 1 if one does not, and with 2 if more prompts would be needed to tell.

    Example: assay certify Turbo --quick
    """
    # What measures needs libraries for which no other command need wait.
    from server.certify import certify as measure_tiers
    from server.certify import write
    from tiers.conformance.extent import Asked

    log_to(err)
    settings = load_config(config)
    if self_test:
        from server.self_test_cli import self_test_command

        raise typer.Exit(self_test_command(settings, repeats=repeats, as_json=as_json))
    chosen = choose_tiers(settings, tiers)
    asked = Asked(quick=quick, prompts=prompts, until_decided=until_decided)
    with Steps(err) as steps, alone(settings.packs, OCCUPIED, BuildError):
        measured = asyncio.run(measure_tiers(settings, chosen, asked, steps))
        written = write(measured, chosen, settings, sign)
    certificates = [each.certificate for each in measured]
    if as_json:
        out.print_json(json.dumps([json.loads(each.canonical) for each in certificates]))
    else:
        show(certificates_table(certificates))
        out.print(f"The report is {written}", soft_wrap=True)
    verdicts = {each.verdict for each in certificates}
    if verdicts != {Verdict.PASS}:
        raise typer.Exit(1 if Verdict.FAIL in verdicts else 2)
