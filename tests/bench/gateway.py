"""What a gateway costs: ours, vLLM's router and LiteLLM's proxy in front of one fake upstream, in one run.

usage: make bench-gateway ARGS="[--quick] [--requests N] [--only NAME ...] [--json]"

Costs are CPU time, user and system, of all of a gateway's processes, divided by what it answered meanwhile; every
answer is checked. All gateways run at once and take turns, and a figure is the median over the rounds, so that
whatever else the machine does weighs on all of them alike. Gateways run on one core, and what asks and answers on
the others, for being pushed aside costs too. Latencies are of this machine; the row of the upstream alone says how
much of them is nobody's. Run it on a machine that does nothing else: it says how much others took.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.progress import Steps
from tests.bench.answers import WrongAnswer
from tests.bench.gateways import Direct, Gateway, LiteLLM, NotMeasured, Ours, VllmRouter
from tests.bench.load import Load, Order, Result
from tests.bench.machine import CALM, Machine

CONNECTIONS = (1, 32)
STREAMS = 32
CHUNKS = 64
MEMORY_STEPS = 10


@dataclass(frozen=True)
class Bar:
    """What the gateway has to reach: at most so many times what another one needs."""

    figure: str
    other: str
    at_most: float


PER_REQUEST = tuple(f"cpu_us_per_request_{connections}" for connections in CONNECTIONS)
PER_CHUNK = "cpu_us_per_chunk"
BARS = (
    *(Bar(figure, VllmRouter.name, 3.5) for figure in PER_REQUEST),
    Bar(PER_CHUNK, VllmRouter.name, 1.8),
    *(Bar(figure, LiteLLM.name, 1 / 30) for figure in PER_REQUEST),
    Bar(PER_CHUNK, LiteLLM.name, 1 / 12),
)


@dataclass
class Row:
    """One gateway: every figure, a value a round; or why there is none."""

    gateway: str
    version: str
    switched_on: str
    problem: str | None = None
    rounds: dict[str, list[float]] = field(default_factory=dict)
    memory_mb: list[float] = field(default_factory=list)
    """While it answered `--requests` requests, at even steps."""

    @classmethod
    def of(cls, gateway: Gateway) -> Self:
        """An empty one."""
        return cls(gateway.name, gateway.version, gateway.switched_on)

    def add(self, figure: str, value: float) -> None:
        """What one round gave."""
        self.rounds.setdefault(figure, []).append(value)

    def __getitem__(self, figure: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds[figure])

    @property
    def medians(self) -> dict[str, float]:
        """Of every figure."""
        return {figure: self[figure] for figure in self.rounds}


@dataclass
class Report:
    """What one run has found."""

    rows: list[Row]
    """One a gateway; those that could not be measured say why."""
    others: float
    """The share of the machine's time that processes took meanwhile which are no part of this: every figure above
    is higher for it, and not all by the same factor, for what shares caches and cores is slowed unevenly."""


def measure(folder: Path, *, names: Sequence[str], rounds: int, seconds: float, requests: int) -> Report:
    """Start them all, and measure them by turns."""
    with Steps() as steps, ExitStack() as running:
        direct = Direct(folder)
        others = [kind(direct.url, folder) for kind in (Ours, VllmRouter, LiteLLM) if kind.name in names]
        rows: dict[Gateway, Row] = {each: Row.of(each) for each in (direct, *others)}
        for gateway, row in rows.items():
            running.callback(gateway.stop)
            with told(row), steps.step(gateway.name) as step:
                gateway.install(step.detail)
                gateway.start(step.detail)
        machine = Machine(lambda: sum(each.cpu_s() for each in rows if each.is_running))
        for number in range(rounds):
            with steps.step(f"round {number + 1} of {rounds}") as step:
                for gateway, row in _sound(rows, number):
                    with told(row):
                        measure_once(gateway, row, seconds, step.detail)
        report = Report(list(rows.values()), machine.others)
        for gateway, row in _sound(rows, 0):
            if isinstance(gateway, Ours):
                with told(row), steps.step(f"memory of {gateway.name} over {requests:,} requests") as step:
                    measure_memory(gateway, row, requests, step.detail)
    return report


def _sound(rows: dict[Gateway, Row], first: int) -> Iterator[tuple[Gateway, Row]]:
    """Those that have no problem, each round another one first."""
    every = list(rows.items())
    first %= len(every)
    for gateway, row in every[first:] + every[:first]:
        if row.problem is None:
            yield gateway, row


@contextmanager
def told(row: Row) -> Iterator[None]:
    """What keeps a gateway from being measured is said in its row, and the others go on."""
    try:
        yield
    except (NotMeasured, WrongAnswer) as problem:
        row.problem = str(problem)


def measure_once(gateway: Gateway, row: Row, seconds: float, say: Callable[[str], None]) -> None:
    """One value of every figure.

    Raises:
        WrongAnswer: the figure would be of something else.
    """
    for connections in CONNECTIONS:
        say(f"{gateway.name}: {connections} at once")
        cpu_s, result = _cost(gateway, gateway.order(connections=connections, kinds=("whole",), seconds=seconds))
        row.add(f"cpu_us_per_request_{connections}", cpu_s * 1e6 / result.requests)
        row.add(f"p50_ms_{connections}", result.p50_ms)
        row.add(f"p99_ms_{connections}", result.p99_ms)
        row.add(f"requests_per_s_{connections}", result.requests / result.seconds)
    say(f"{gateway.name}: {STREAMS} streams")
    order = gateway.order(connections=STREAMS, kinds=("stream",), tokens=CHUNKS, seconds=seconds)
    cpu_s, result = _cost(gateway, order)
    row.add(PER_CHUNK, cpu_s * 1e6 / result.chunks)
    row.add("chunks_per_read", result.chunks_per_read)
    row.add("first_chunk_ms", result.first_ms)
    row.add("rss_mb", gateway.rss_mb())


def _cost(gateway: Gateway, order: Order) -> tuple[float, Result]:
    with Load(order) as load:
        before = gateway.cpu_s()
        result = load.run()
        return gateway.cpu_s() - before, result


def measure_memory(gateway: Gateway, row: Row, requests: int, say: Callable[[str], None]) -> None:
    """The memory in steps, while answers and short streams are asked for in turn.

    Raises:
        WrongAnswer: it did not answer.
    """
    row.memory_mb.append(gateway.rss_mb())
    share = requests // MEMORY_STEPS
    for done in range(0, share * MEMORY_STEPS, share):
        say(f"{done:,}: {row.memory_mb[-1]:.1f} MB")
        with Load(gateway.order(connections=32, kinds=("whole", "stream"), tokens=2, requests=share)) as load:
            load.run()
        row.memory_mb.append(gateway.rss_mb())


def table_of(rows: Sequence[Row]) -> Table:
    """Every figure of every gateway."""
    table = Table(
        *("gateway", "CPU/request, 1", "of 32", "p50 / p99, 1", "of 32", "CPU/chunk", "chunks/read", "memory"),
        box=None,
    )
    for row in rows:
        if row.problem:
            table.add_row(row.gateway, "[red]not measured[/]")
            continue
        table.add_row(
            row.gateway,
            *(f"{row[f'cpu_us_per_request_{n}']:,.0f} µs" for n in CONNECTIONS),
            *(f"{row[f'p50_ms_{n}']:.2f} / {row[f'p99_ms_{n}']:.2f} ms" for n in CONNECTIONS),
            f"{row[PER_CHUNK]:,.1f} µs",
            f"{row['chunks_per_read']:.2f}",
            f"{row['rss_mb']:.0f} MB",
        )
    return table


def ratios_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Ours to each of the others, and what it has to be; None where one of the two was not measured."""
    by_name = {row.gateway: row for row in rows}
    ratios = []
    for bar in BARS:
        pair = [by_name[name] for name in (Ours.name, bar.other) if name in by_name]
        if len(pair) == 2:
            ours, other = pair
            ratio = None if ours.problem or other.problem else ours[bar.figure] / other[bar.figure]
            ratios.append(
                {**asdict(bar), "ratio": ratio, "reached": None if ratio is None else ratio <= bar.at_most}
            )
    return ratios


def bars_of(ratios: Sequence[dict[str, Any]]) -> Table:
    """Ours against the bars."""
    table = Table("assay", "times that of", "is", "at most", "", box=None)
    verdicts = {True: "[green]reached[/]", False: "[red]missed[/]", None: "[red]not measured[/]"}
    for each in ratios:
        figure = each["figure"].replace("_", " ")
        table.add_row(
            figure, each["other"], *map(_times, (each["ratio"], each["at_most"])), verdicts[each["reached"]]
        )
    return table


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio:.2f} ×" if ratio >= 1 else f"1/{1 / ratio:.1f}"


def main() -> int:
    """Measure, and print tables or JSON; 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [kind.name for kind in (Ours, VllmRouter, LiteLLM)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=5, help="how often each gateway has its turn")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each of the three measurements of a turn")
    parser.add_argument("--requests", type=int, default=10_000, help="over which ours must not grow")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.requests = 1, 1.0, min(options.requests, 1000)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through all that ends processes
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
        report = measure(
            Path(folder),
            names=options.only,
            rounds=options.rounds,
            seconds=options.seconds,
            requests=options.requests,
        )
    if options.json:
        gateways = [asdict(row) | {"medians": row.medians} for row in report.rows]
        ratios = ratios_of(report.rows)
        json.dump({"gateways": gateways, "ratios": ratios, "others": report.others}, sys.stdout, indent=2)
    else:
        show(report, options.requests)
    return int(any(row.problem for row in report.rows))


def show(report: Report, requests: int) -> None:
    """Everything, for people."""
    rows = report.rows
    console = Console(width=130, highlight=False)
    console.print(table_of(rows))
    for row in rows:
        style = "red" if row.problem else "dim"
        console.print(escape(f"{row.version}: {row.problem or row.switched_on}"), style=style)
    console.print(bars_of(ratios_of(rows)))
    advice = (
        "" if report.others < CALM else ": run it again when nothing else does, for this weighs on every figure"
    )
    console.print(f"other processes took {report.others:.0%} of the machine meanwhile{advice}")
    for row in rows:
        if row.memory_mb:
            first, second, *_, last = (f"{megabytes:.1f} MB" for megabytes in row.memory_mb)
            over = f"over {requests:,} requests, {second} after a tenth of them"
            console.print(f"memory of {row.gateway} {over}: {first} before, {last} after all")


if __name__ == "__main__":
    sys.exit(main())
