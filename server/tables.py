"""Tables for the terminal: every cell whole, numbers in the units people compare."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tiers.hardware import GIB
from tiers.plan import TierPlan

KIB = 1 << 10
WIDE = 200
"""Columns, however narrow the terminal: names are there to be copied."""


def table(*columns: str) -> Table:
    """An empty table with these columns, none of which is cut."""
    made = Table(box=None)
    for column in columns:
        made.add_column(column, no_wrap=True)
    return made


def show(rows: Table) -> None:
    """Print it."""
    Console(highlight=False, width=WIDE).print(rows)


def plan_table(plans: Sequence[TierPlan]) -> Table:
    """What each tier takes; weights in GB as models are published, memory in GiB as cards have it."""
    each = "GPU" if any(plan.gpus for plan in plans) else "RAM"
    made = table(
        "tier", "precision", "weights", "KV/token", "context", "KV at that", "runs on",
        f"{each}: weights", "activations", "graphs", "other", "left for KV", "requests at once",
    )  # fmt: skip
    for column in made.columns[2:]:
        column.justify = "right"
    for plan in plans:
        made.add_row(plan.name, plan.precision, *(_cells(plan) if plan.is_known else ("not known yet",)))
    return made


def _cells(plan: TierPlan) -> tuple[str, ...]:
    parts = plan.per_device
    return (
        f"{plan.weights_bytes / 1e9:.1f} GB",
        f"{plan.kv_bytes_per_token / KIB:g} KiB",
        str(plan.context_length),
        f"{plan.kv_bytes_full_context / GIB:.1f} GiB",
        _where(plan),
        *(f"{part / GIB:.1f}" for part in (parts.weights, parts.activations, parts.graphs, parts.overhead)),
        f"{plan.kv_cache_bytes / GIB:.1f} GiB",
        "[red]does not fit[/]" if plan.problem else f"[green]{plan.concurrent_requests}[/]",
    )


def _where(plan: TierPlan) -> str:
    if plan.gpus == 0:
        return "CPU"
    return f"{plan.gpus} GPUs, {plan.degree}" if plan.gpus > 1 else "1 GPU"
