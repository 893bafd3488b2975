"""The pictures of a report, as SVG to stand inside its page and take its font and colours, light or dark.

Knows scores and figures; knows nothing of the page but the names of its colours.
"""

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from tiers.conformance.findings import Estimate
from tiers.conformance.scores import Phase, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib wants colours that it knows: each of these stands for one of the page's, put in its place at last.
_INK, _MUTED, _RULE, _NOISE, _LIMIT = "#010101", "#020202", "#030303", "#040404", "#050505"
_PHASE: dict[Phase, str] = {"prefill": "#060606", "decode": "#070707"}
_PAGE = {
    _INK: "ink",
    _MUTED: "muted",
    _RULE: "rule",
    _NOISE: "noise",
    _LIMIT: "limit",
    _PHASE["prefill"]: "prefill",
    _PHASE["decode"]: "decode",
}
_SMALLEST, _LARGEST = 1e-8, 10.0
"""Nats: what lies beyond is drawn at the edge; below, an FP32 softmax says nothing."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def spread(phase: Phase, scores: Scores, noise: Scores | None, limit: float | None, alt: str) -> Markup:
    """How many tokens have which KL divergence, over the same of the noise floor."""
    figure, axes = _canvas(4.2, 2.5)
    edges = np.geomspace(_SMALLEST, _LARGEST, 73)
    tallest = 0.0
    for each, colour, alpha in ((noise, _NOISE, 0.35), (scores, _PHASE[phase], 0.45)):
        if each is None:
            continue
        shares = 100 * np.histogram(_clipped(each.kl), edges)[0] / len(each)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=alpha)
        peak = int(np.argmax(shares))
        tallest = max(tallest, float(shares[peak]))
        name = "noise floor" if each is noise else "this tier"
        axes.annotate(
            name,
            (edges[peak], float(shares[peak])),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=_MUTED if each is noise else colour,
            weight="bold",
        )
    axes.set_ylim(0, tallest * 1.32)
    mean = max(_SMALLEST, float(scores.kl.mean()))
    # The names on the outer sides, so that they never meet.
    _mark(axes, mean, "mean", _INK, "left" if limit and limit < mean else "right")
    if limit:
        _mark(axes, limit, "limit", _LIMIT, "right" if limit < mean else "left")
    axes.set_xscale("log")
    axes.set_xlim(_SMALLEST, _LARGEST)
    _label(axes, "KL divergence of one token, nats", "% of tokens")
    axes.xaxis.set_major_formatter(_power)
    axes.xaxis.set_ticks([10.0**power for power in range(-8, 2, 2)])
    return _svg(figure, alt)


def by_prompt(scores: Mapping[Phase, Scores], alt: str) -> Markup:
    """Each prompt's mean KL divergence in prefill, and above it that in decode."""
    figure, axes = _canvas(4.2, 3.2)
    both = np.intersect1d(scores["prefill"].prompt, scores["decode"].prompt)
    prefill, decode = (_means(scores[phase], both) for phase in ("prefill", "decode"))
    together = np.concatenate([prefill, decode])
    low, high = together.min() / 1.5, together.max() * 1.5
    axes.plot([low, high], [low, high], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(
        prefill, decode, "o", markersize=4.5, color=_PHASE["decode"], alpha=0.6, markeredgewidth=0, clip_on=False
    )
    share = 100 * float(np.mean(decode > prefill))
    axes.text(0.03, 0.95, f"{share:.0f}% differ more in decode", transform=axes.transAxes, color=_MUTED, va="top")
    axes.text(
        0.97, 0.05, f"{100 - share:.0f}% more in prefill", transform=axes.transAxes, color=_MUTED, ha="right"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_plain)
        axis.set_minor_formatter(_few(low, high))
    _label(axes, "mean KL in prefill, nats", "mean KL in decode, nats")
    return _svg(figure, alt)


def by_position(phases: Mapping[Phase, Mapping[str, Estimate]], alt: str) -> Markup:
    """Mean KL divergence by where in the answer a token stands, with its interval where there is one."""
    figure, axes = _canvas(4.2, 3.2)
    last = {phase: list(ranges.values())[-1].value for phase, ranges in phases.items() if ranges}
    for phase, ranges in phases.items():
        if not ranges:
            continue
        colour, places = _PHASE[phase], np.arange(len(ranges))
        low, mean, high = (
            np.array([getattr(estimate, end) for estimate in ranges.values()]) for end in ("low", "value", "high")
        )
        bounded = np.isfinite(low) & np.isfinite(high)
        axes.fill_between(places, low, high, where=bounded, color=colour, alpha=0.16, linewidth=0)
        axes.plot(places, mean, "o-", color=colour, linewidth=1.8, markersize=4.5)
        axes.annotate(
            phase,
            (places[-1], mean[-1]),
            # The upper name above its line's end and the lower one below, so that they never meet.
            xytext=(7, 0),
            textcoords="offset points",
            color=colour,
            weight="bold",
            va="bottom" if mean[-1] == max(last.values()) else "top",
            annotation_clip=False,
        )
        axes.set_xticks(places, list(ranges))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.04)
    axes.yaxis.set_major_formatter(_plain)
    _label(axes, "token of the answer", "mean KL, nats")
    return _svg(figure, alt)


def _canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty picture; sizes in inches, of which a page has its own idea."""
    from matplotlib.figure import Figure  # a second, and the gateway never draws

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _label(axes: "Axes", across: str, up: str) -> None:
    # Upright and above: nobody tilts a head.
    axes.set_title(up, loc="left", color=_MUTED, fontsize=9.5)
    axes.set_xlabel(across, color=_MUTED, fontsize=9.5)
    axes.tick_params(which="both", colors=_MUTED, labelsize=9, length=0)
    axes.tick_params(axis="x", which="both", pad=6)


def _mark(axes: "Axes", at: float, name: str, colour: str, side: str) -> None:
    """A line from top to bottom, its name on one side of it."""
    axes.axvline(at, color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.annotate(
        f"{name} {_number(at)}",
        (at, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if side == "right" else 4, -1),
        textcoords="offset points",
        ha="right" if side == "right" else "left",
        va="top",
        color=colour,
    )


def _means(scores: Scores, prompts: NDArray[np.int32]) -> NDArray[np.float64]:
    """Of each prompt the mean KL, [P]."""
    return _clipped(np.array([scores.kl[scores.prompt == prompt].mean() for prompt in prompts]))


def _clipped(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(values, _SMALLEST, _LARGEST * 0.999)


def _number(value: float) -> str:
    return f"{value:.{max(0, 1 - int(np.floor(np.log10(value))))}f}" if value > 0 else "0"


def _plain(value: float, _place: float = 0) -> str:
    return f"{value:.8f}".rstrip("0").rstrip(".")


def _few(low: float, high: float) -> Callable[[float, float], str]:
    """Names for ticks between powers of ten: some, where there is but one power or none."""
    named = (2, 5) if high / low < 100 else ()

    def name(value: float, _place: float) -> str:
        return _plain(value) if round(value / 10 ** np.floor(np.log10(value))) in named else ""

    return name


def _power(value: float, _place: float = 0) -> str:
    power = round(np.log10(value))
    return "1" if power == 0 else f"10{str(power).translate(_SUPERSCRIPTS)}"


def _svg(figure: "Figure", alt: str) -> Markup:
    """The picture as an element of a page, in the page's font and colours and as wide as there is room."""
    from matplotlib import rc_context

    stream = io.StringIO()
    unsigned = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text stays text: it can be read out, found and printed sharp. The salt makes the same picture the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "assay"}):
        figure.savefig(stream, format="svg", transparent=True, metadata=unsigned)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in _PAGE.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would be the whole page's
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # there are several pictures in a page, and an id is one's alone
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1))  # noqa: S704  # drawn here
