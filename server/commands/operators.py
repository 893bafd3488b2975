"""`assay operators`: what it is asked, how it is run, and what it shows."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from itertools import groupby
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from server.alone import alone
from server.checkpoints import Checkpoints
from server.commands.console import ConfigOption, JsonOption, configured_models, err, log_to, out
from server.commands.tables import show, table
from server.config import Config
from server.config_file import load_config
from server.launch.process import LocalProcess
from server.progress import Step, Steps
from tiers.catalog import ModelShape
from tiers.engine import installed_backend, vllm_environment
from tiers.errors import ConfigError, OperatorsError
from tiers.memory import weights_of
from tiers.operators.findings import Finding
from tiers.operators.listing import PLANTS, operator_names
from tiers.ram import free_ram
from tiers.tier import Tier

OCCUPIED = OperatorsError("Another assay runs the operators in this home: wait for it, or set `home`.")


def _operators(incomplete: str) -> list[str]:
    return [name for name in operator_names() if name.startswith(incomplete.lower())]


def operators(
    config: ConfigOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The config's model that gives the activations; by default its first.",
            autocompletion=configured_models,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An operator, such as rope; may be given again. All by default.",
            autocompletion=_operators,
        ),
    ] = None,
    own_widths: Annotated[
        bool, typer.Option("--own-widths", help="At the model's own widths alone, not at Llama-3.1-8B's too.")
    ] = False,
    plant: Annotated[
        str | None, typer.Option(hidden=True, help="For developers: break the operator so, and see it found.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Hold every operator of this machine's vLLM to its definition in float64, on values from real activations.

    A model of one block is built as an engine builds it, at each precision, and its layers are run beside their
    definitions: errors are told in ulps of the result's precision, beside what rounding explains of them. A row a
    layer and its widths, the case nearest to its bounds; --json has every case. Exits with 1 if one FAILs.

    Takes the memory of the model's reference, whole, and then about 9 GB at Llama-3.1-8B's widths.

    Example: assay operators --only rope --only attention
    """
    log_to(err)
    settings = load_config(config)
    tier = settings.reference_of(model)
    chosen = chosen_operators(only or [], plant)
    options = [option for name in chosen for option in ("--only", name)]
    options += ["--own-widths"] if own_widths else []
    options += ["--plant", plant] if plant else []
    with alone(settings.home / "operators", OCCUPIED, OperatorsError), Steps(err) as steps:
        found = asyncio.run(_run(settings, tier, chosen, options, steps))
    if as_json:
        out.print_json(json.dumps([json.loads(each.model_dump_json()) for each in found]))
    else:
        show(operators_table(found))
        for each in found:
            if each.outcome == "absent":
                out.print(f"[yellow]{each.operator} is not here:[/] {escape(each.reason)}.", soft_wrap=True)
    if any(each.outcome == "FAIL" for each in found):
        raise typer.Exit(1)


def chosen_operators(only: Sequence[str], plant: str | None) -> list[str]:
    """Names of the operators that are run, each once: those asked for, or the one that is broken, or all.

    Raises:
        ConfigError: there is no such operator, or no such error to plant.
    """
    for name in only:
        if name not in operator_names():
            raise ConfigError(f"There is no operator {name!r}; the operators are {', '.join(operator_names())}.")
    plants = {each.name: each.operator for each in PLANTS}
    if plant is not None and plant not in plants:
        raise ConfigError(f"There is no planted error {plant!r}; there are {', '.join(plants)}.")
    asked = only or ([plants[plant]] if plant else operator_names())
    return [name for name in operator_names() if name in asked]


def check_memory(tier: Tier) -> None:
    """Hold the reference, which is in memory whole while activations are taken from it, against what is free.

    Raises:
        OperatorsError: it does not fit.
    """
    needed = weights_of(ModelShape.read(tier.checkpoint), tier.recipe).total
    free = free_ram()
    if needed > free:
        raise OperatorsError(
            f"Activations of {tier.model} are taken from {needed / 1e9:.1f} GB of weights, all in memory, "
            f"and {free / 1e9:.1f} GB are free: choose a smaller one with --model, or a larger machine."
        )


async def _run(
    settings: Config, tier: Tier, chosen: Sequence[str], options: Sequence[str], steps: Steps
) -> list[Finding]:
    """In a process of its own, with what an engine of this machine is given: the gateway holds no vLLM.

    Raises:
        AssayError: the checkpoint cannot be had or loaded, or the process ended without having done it.
    """
    await Checkpoints(settings, steps).prepare([tier])
    check_memory(tier)
    with steps.step(f"{len(chosen)} operator{'s' * (len(chosen) != 1)}") as step:
        log = settings.logs / "operators.log"
        process = await LocalProcess.start(
            [sys.executable, "-P", "-m", "tiers.operators", str(tier.checkpoint), *options],
            vllm_environment(tier, installed_backend()),
            log,
            pipe_output=True,
        )
        try:
            found = [each async for each in _events(process, step)]
            if code := await process.wait():
                last = process.last_line() or "it wrote nothing"
                raise OperatorsError(
                    f"The operators were not run to the end (exit code {code}): {last[:300]}; the log is {log}."
                )
        finally:
            await process.stop()
    return found


async def _events(process: LocalProcess, step: Step) -> AsyncIterator[Finding]:
    async for line in process.output:
        event = json.loads(line)
        if "step" in event:
            step.detail(event["step"])
        else:
            yield Finding.model_validate(event["finding"])


def operators_table(found: Sequence[Finding]) -> Table:
    """A line for each operator, kernel and model's widths: its case that is nearest to its bounds."""
    made = table("operator", "kernel", "widths of", "cases", "nearest", "", "max", "allowed", "RMS", "allowed", "")
    for column in (3, *range(6, 10)):
        made.columns[column].justify = "right"
    present = [each for each in found if each.outcome != "absent"]
    for (name, kernel, widths), group in groupby(present, lambda each: (each.operator, each.kernel, each.widths)):
        cases = list(group)
        worst = max(cases, key=lambda each: (each.outcome == "FAIL", each.nearness))
        figures = (worst.max_ulps, worst.allowed_ulps, worst.rms_ulps, worst.allowed_rms_ulps)
        colour = "green" if worst.outcome == "PASS" else "red"
        made.add_row(
            name,
            escape(kernel),
            widths,
            str(len(cases)),
            escape(worst.shape),
            worst.precision,
            *("" if figure is None else f"{figure:.3g}" for figure in figures),
            f"[{colour}]{worst.outcome}[/]",
        )
    return made
