"""`assay certify`: what it is asked, and what it shows."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from server.config import choose_tiers, load_config
from server.console import ConfigOption, JsonOption, err, log_to, out, tier_names
from server.progress import Steps
from server.tables import certificates_table, show
from tiers.conformance.findings import Verdict


def certify(
    tiers: Annotated[
        list[str] | None,
        typer.Argument(help="As for `assay build`; all by default.", autocompletion=tier_names),
    ] = None,
    config: ConfigOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few prompts that stand for all, in minutes instead of an hour.")
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

    Starts the engines as `assay serve` does, has the reference answer the prompts, and walks every tier along the
    answers: as prompts, and token by token. Exits with 0 if all tiers keep to their budgets, with 1 if one does
    not, and with 2 if more prompts would be needed to tell.

    Example: assay certify Turbo --quick
    """
    # What measures needs libraries for which no other command need wait.
    from server.certify import Extent, write
    from server.certify import certify as measure_tiers

    log_to(err)
    settings = load_config(config)
    if self_test:
        from server.self_test_cli import self_test_command

        raise typer.Exit(self_test_command(settings, repeats=repeats, as_json=as_json))
    chosen = choose_tiers(settings, tiers)
    with Steps(err) as steps:
        measured = asyncio.run(measure_tiers(settings, chosen, Extent.of(quick=quick), steps))
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
