"""The picture of a measurement: a bar a unit, with its interval. SVG that stands by itself."""

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiers.sensitivity.findings import Findings, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _MUTED, _RULE, _CARD = "#1b1c1e", "#5c6066", "#e1e1db", "#ffffff"
_HUES = {"both": "#85888e", "prefill": "#2458c9", "decode": "#b4470f"}
"""Of phases, as a report's page has them by day."""
_ROW = 0.27
"""Inches."""


def picture(findings: Findings) -> str:
    """All rows from top to bottom; in a level's the two phases lie together."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # a second, for which who reads findings need not wait

    units = list(dict.fromkeys(row.unit for row in findings.rows))
    phases = [phase for phase in _HUES if any(_phase(row) == phase for row in findings.rows)]
    pairs = len(findings.rows) > len(units)
    figure = Figure(figsize=(7.2, 1.3 + _ROW * len(units) * (1.7 if pairs else 1)), layout="constrained")
    figure.set_facecolor(_CARD)
    axes = figure.add_subplot()
    for phase in phases:
        rows = [row for row in findings.rows if _phase(row) == phase]
        shift = 0.0 if not pairs else -0.2 if phase == "prefill" else 0.2
        places = np.array([units.index(row.unit) for row in rows]) + shift
        _bars(axes, places, rows, _HUES[phase], 0.36 if pairs else 0.66)
        if len(phases) > 1:  # named where it first is, which needs no legend
            name = {"both": "both phases"}.get(phase, phase)
            axes.annotate(
                name,
                (_ends(rows[0])[1], places[0]),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=_HUES[phase],
                weight="bold",
                fontsize=9,
            )
    axes.set_yticks(range(len(units)), units)
    axes.set_ylim(len(units) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(_RULE)
    axes.grid(axis="x", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    alone = "at each level" if findings.by == "level" else f"when one {findings.by} alone is quantized"
    axes.set_title(
        f"{findings.model}: mean KL from the reference {alone}, nats", loc="left", color=_INK, fontsize=10
    )
    axes.set_xlabel(
        f"{findings.format.upper()}; {findings.prompts} prompts, {findings.tokens} tokens; "
        "bars have 95% intervals over prompts",
        color=_MUTED, fontsize=9,
    )  # fmt: skip
    stream = io.StringIO()
    unsigned = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text stays text; the salt makes the same picture the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "assay"}):
        figure.savefig(stream, format="svg", metadata=unsigned)
    return stream.getvalue()


def _bars(axes: "Axes", places: NDArray[np.float64], rows: list[Row], colour: str, height: float) -> None:
    axes.barh(places, [row.kl.value for row in rows], height=height, color=colour, alpha=0.45)
    low, high = np.array([_ends(row) for row in rows]).T
    axes.hlines(places, np.maximum(low, 0), high, color=colour, linewidth=1.6)


def _ends(row: Row) -> tuple[float, float]:
    """Of its interval; of too few prompts there is none."""
    return (row.kl.low, row.kl.high) if row.kl.is_bounded else (row.kl.value, row.kl.value)


def _phase(row: Row) -> str:
    return "both" if row.is_of_both else row.phase
