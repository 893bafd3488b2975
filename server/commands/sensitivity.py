"""`assay sensitivity`: what it is asked, and what it shows."""

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from server.commands.console import ConfigOption, JsonOption, configured_models, err, log_to, out
from server.commands.tables import KIB, show, table
from server.config_file import load_config
from server.progress import Steps

if TYPE_CHECKING:
    from tiers.conformance.findings import Estimate
    from tiers.sensitivity.findings import Findings


class Number(StrEnum):
    """What linear layers are quantized to."""

    FP8 = "fp8"
    INT4 = "int4"
    INT8 = "int8"


class By(StrEnum):
    """What is quantized at once."""

    LAYER = "layer"
    PART = "part"
    LEVEL = "level"


def sensitivity(
    model: Annotated[
        str | None,
        typer.Argument(help="One of the config's models; the first by default.", autocompletion=configured_models),
    ] = None,
    config: ConfigOption = None,
    number: Annotated[
        Number,
        typer.Option(
            "--format",
            help="What linear layers are quantized to: fp8 (W8A8, weights per channel, activations per token), "
            "int8 (likewise), int4 (W4A16, weights in groups).",
        ),
    ] = Number.FP8,
    by: Annotated[
        By,
        typer.Option(
            help="layer: decoder blocks one by one. part: q, k, v, o, gate, up, down, attention, feed-forward, "
            "head, KV cache, attention product, each in all blocks. level: feed-forward in FP8; all linear "
            "layers; also the KV cache; also attention.",
        ),
    ] = By.PART,
    prompts: Annotated[int, typer.Option(metavar="N", min=6, help="How many are measured along.")] = 24,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", file_okay=False, help="Put table and picture there, instead of into home."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what quantizing each layer or part alone costs, and what it saves: the ground for choosing a recipe.

    Runs the reference in Transformers, in FP32 but for what is quantized, along its own answers, and prints the
    mean KL divergence from itself with its interval (95%, a bootstrap over prompts). What was measured is kept: a
    run that was interrupted goes on, and one with another --by adds to it. Takes minutes for the embedded model.

    Example: assay sensitivity --by layer --format int4

    Example: assay sensitivity --by level --prompts 48 --out figures
    """
    from server.measuring.sensitivity import (
        measure_sensitivity,  # needs libraries for which no other command need wait
    )

    log_to(err)
    settings = load_config(config)
    with Steps(err) as steps:
        measured = measure_sensitivity(settings, model, number.value, by.value, prompts, out_folder, steps)
        findings, file = asyncio.run(measured)
    if as_json:
        out.print_json(findings.model_dump_json())
        return
    out.print(
        f"{findings.model}, {findings.prompts} prompts, {findings.tokens} tokens, answered by "
        f"{findings.answers_by}. Linear layers: {findings.format_text}; KV cache and attention: FP8.",
        soft_wrap=True,
    )
    show(sensitivity_table(findings))
    if findings.steps:
        out.print("\nWhat each level adds to the one before, prompt by prompt:")
        show(steps_table(findings))
    out.print(f"\nThe picture is {file.with_suffix('.svg')}", soft_wrap=True)


def sensitivity_table(findings: "Findings") -> Table:
    """What each unit costs and saves, a line for each phase; of parts and layers the costliest first."""
    made = table("quantized", "phase", "KL", "95%", "99% of tokens below", "rejection", "saves", "KL per MB")
    for column in made.columns[2:]:
        column.justify = "right"
    rows = findings.rows
    if findings.by != "level":
        rows = tuple(sorted(rows, key=lambda row: -row.kl.value))
    for row in rows:
        saved = [f"{row.saves / 1e6:.1f} MB"] if row.saves else []
        saved += [f"{row.saves_per_token / KIB:g} KiB/token"] if row.saves_per_token else []
        made.add_row(
            escape(row.unit),
            "both" if row.is_of_both else row.phase,
            f"{row.kl.value:.5f}",
            _interval(row.kl),
            f"{row.p99:.3f}",
            f"{row.rejection.value:.1%}",
            ", ".join(saved) or "nothing",
            "" if row.per_megabyte is None else f"{row.per_megabyte:.6f}",
        )
    return made


def steps_table(findings: "Findings") -> Table:
    """What each level adds, and whether that is beyond doubt."""
    made = table("level", "after", "phase", "KL added", "95%", "")
    for step in findings.steps:
        said = "[green]rises[/]" if step.rises else "the same" if step.is_same else "not beyond doubt"
        made.add_row(step.unit, step.after, step.phase, f"{step.kl.value:+.5f}", _interval(step.kl), said)
    return made


def _interval(estimate: "Estimate") -> str:
    return f"{estimate.low:.5f} to {estimate.high:.5f}" if estimate.is_bounded else "unbounded"
