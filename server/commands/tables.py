"""What the command line shows: tables with every cell whole, numbers in the units people compare."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from server.keys import Key
from tiers.hardware import GIB
from tiers.manifest import SHORT_DIGEST
from tiers.plan import TierPlan
from tiers.recipe import recipes
from tiers.tier import TierKind

if TYPE_CHECKING:
    from tiers.conformance.certificate import Certificate

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


def tiers_table(tiers: Sequence[dict[str, Any]]) -> Table:
    """The tiers of a running server, as its ``/v1/tiers`` tells them."""
    made = table("model", "precision", "verified", "recipe", "bits", "checkpoint", "context", "state")
    for tier in tiers:
        state, verified, replicas = tier["state"], tier["verified"], tier["replicas"]
        if len(replicas) > 1:
            state += f" ({sum(each['state'] == tier['state'] for each in replicas)} of {len(replicas)})"
        made.add_row(
            tier["id"],
            tier["precision"],
            "not yet" if verified is None else "[green]yes[/]" if verified["agrees"] else "[red]no[/]",
            tier["recipe"]["name"],
            f"{tier['checkpoint']['bits_per_weight']:.2f}",
            tier["checkpoint"]["digest"][:SHORT_DIGEST],
            str(tier["context_length"]),
            f"[green]{state}[/]" if tier["state"] == "ready" else f"[yellow]{escape(state)}[/]",
        )
    return made


def certificates_table(certificates: Sequence["Certificate"]) -> Table:
    """What certificates say, a line for each metric that was judged."""
    made = table("model", "verdict", "phase", "metric", "measured", "95%", "budget", "")
    for certificate in certificates:
        name, verdict = certificate.predicate.tier, str(certificate.verdict)
        for each in certificate.predicate.findings.judgements:
            further = f"{each.further_prompts} more prompts would tell" if each.further_prompts else ""
            made.add_row(
                name,
                _coloured(verdict),
                each.phase,
                each.metric.replace("_", " "),
                f"{each.estimate.value:.4g}",
                f"{each.estimate.low:.4g} to {each.estimate.high:.4g}",
                f"{each.budget:.4g}",
                f"{_coloured(str(each.verdict))} {further}",
            )
            name = verdict = ""
    return made


def _coloured(verdict: str) -> str:
    colours = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}
    return f"[{colours[verdict]}]{verdict}[/]" if verdict else ""


def parts_table(tiers: Sequence[dict[str, Any]]) -> Table:
    """What each tier declares, part by part, beside what its engine was seen to compute."""
    made = table("model", "part", "declared", "verified")
    for tier in tiers:
        for part in ("weights", "activations", "kv_cache", "attention", "head"):
            read = (tier["verified"] or {}).get(part)
            made.add_row(tier["id"], part, tier["declared"][part]["text"], read["text"] if read else "")
    return made


def keys_table(keys: Sequence[Key]) -> Table:
    """Who holds a key, and what it allows; nothing of the key itself but its id."""
    made = table("name", "id", "tiers", "requests/min", "tokens/min", "at once", "created")
    for key in keys:
        limits = (key.requests_per_minute, key.tokens_per_minute, key.concurrent_requests)
        made.add_row(
            escape(key.name),
            key.id,
            "all" if key.tiers is None else escape(", ".join(key.tiers)),
            *("no limit" if limit is None else str(limit) for limit in limits),
            f"{key.created:%Y-%m-%d}",
        )
    return made


def recipe_paragraphs(backend: str) -> Iterator[RenderableType]:
    """Each recipe with its summary, and whether it can be had on this machine."""
    kinds = {kind.precision: kind for kind in TierKind}
    for name, recipe in recipes().items():
        kind = kinds[recipe.precision.name]
        default = ", its default" if name == kind.default_recipe else ""
        yield f"[bold]{name}[/]  [dim]{kind}{default}[/]"
        yield Padding(escape(recipe.summary), (0, 0, 0, 2))
        if reason := recipe.why_not_on(backend, None):
            yield Padding(f"[yellow]Not on this machine:[/] {escape(reason)}.", (0, 0, 0, 2))


def plan_table(plans: Sequence[TierPlan]) -> Table:
    """What each tier takes; weights in GB as models are published, memory in GiB as cards have it."""
    each = "GPU" if any(plan.gpus for plan in plans) else "RAM"
    made = table(
        "tier", "precision", "weights", "KV/token", "context", "KV at that", "replicas", "each on",
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
        str(plan.replicas),
        _where(plan),
        *(f"{part / GIB:.1f}" for part in (parts.weights, parts.activations, parts.graphs, parts.overhead)),
        f"{plan.kv_cache_bytes / GIB:.1f} GiB",
        "[red]does not fit[/]" if plan.problem else f"[green]{plan.concurrent_requests}[/]",
    )


def _where(plan: TierPlan) -> str:
    if plan.gpus == 0:
        return "CPU"
    return f"{plan.gpus} GPUs, {plan.degree}" if plan.gpus > 1 else "1 GPU"
