"""One exposition of several gateway processes: what each says of itself, put together.

prometheus_client's own multiprocess mode keeps numbers in files, and has no place for gauges that are asked when
they are scraped, as ours are. So each process is asked, and its answer read by prometheus_client's own parser. How
gauges are put together stands at each one's definition, in prometheus_client's words (`multiprocess_mode`): a sum
of what is counted, the least or the most of what is true of a tier, where one that sees it otherwise must show.

What was counted by a process that has ended, or does not answer now, stays counted as it was last seen: sums that
went down would be read as a restart, and all they count as new.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from server.series import WORKERS

PATIENCE_S = 1.0
"""Who has not said by then what they counted is left out."""
CUMULATIVE = ("counter", "histogram")
CREATED = "_created"
"""What the gauge is called that says since when something is counted."""

Combine = Callable[[Iterable[float]], float]


def _least(values: Iterable[float]) -> float:
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def _most(values: Iterable[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


_COMBINE: dict[str, Combine] = {"sum": sum, "min": _least, "max": _most}


def gauges_of(registry: CollectorRegistry) -> dict[str, Combine]:
    """How each gauge is put together.

    Raises:
        KeyError: one does not say so.
    """
    named: Mapping[str, Collector] = registry._names_to_collectors
    return {name: _COMBINE[each._multiprocess_mode] for name, each in named.items() if isinstance(each, Gauge)}


class Families(Collector):
    """Series of any number of processes, by name."""

    def __init__(self, families: Iterable[Metric] = ()) -> None:
        self._families = {family.name: family for family in families}

    @classmethod
    def read(cls, text: str) -> "Families":
        """One process' exposition."""
        return cls(text_string_to_metric_families(text))

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        yield from self._families.values()

    def cumulative(self) -> "Families":
        """Those that only grow, and since when."""
        return Families(each for each in self.collect() if each.type in CUMULATIVE or each.name.endswith(CREATED))

    @classmethod
    def together(cls, parts: Sequence["Families"], gauges: Mapping[str, Combine]) -> "Families":
        """One family of each name."""
        names = dict.fromkeys(name for part in parts for name in part._families)
        return cls(
            _one_of([part._families[name] for part in parts if name in part._families], gauges) for name in names
        )


def _one_of(families: Sequence[Metric], gauges: Mapping[str, Combine]) -> Metric:
    first = families[0]
    # What is neither counted nor one of our gauges says since when something is counted.
    combine = sum if first.type in CUMULATIVE else gauges.get(first.name, _least)
    values: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}
    for family in families:
        for sample in family.samples:
            values.setdefault((sample.name, tuple(sample.labels.items())), []).append(sample.value)
    one = Metric(first.name, first.documentation, first.type)
    one.samples = [Sample(name, dict(labels), combine(each)) for (name, labels), each in values.items()]
    return one


class Processes:
    """What all processes say, and what those said that say nothing any more."""

    def __init__(self, registry: CollectorRegistry, gauges: Mapping[str, Combine]) -> None:
        self._gauges = gauges
        self._registry = registry
        self._answering = WORKERS.make(registry)
        self._sockets: dict[int, Path] = {}
        self._seen: dict[int, Families] = {}
        self._departed = Families()

    def joined(self, process: int, socket: Path) -> None:
        """Ask this one too, from now on."""
        self._sockets[process] = socket

    def left(self, process: int) -> None:
        """It has ended."""
        del self._sockets[process]
        if seen := self._seen.pop(process, None):
            self._departed = Families.together([self._departed, seen.cumulative()], self._gauges)

    async def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        asked = list(self._sockets.items())
        texts = await asyncio.gather(*(ask(socket, PATIENCE_S) for _, socket in asked), return_exceptions=True)
        answers: dict[int, Families] = {}
        for (process, _), text in zip(asked, texts, strict=True):
            if isinstance(text, bytes) and process in self._sockets:  # it may have ended since
                answers[process] = self._seen[process] = Families.read(text.decode())
            elif isinstance(text, BaseException) and not isinstance(text, OSError):
                raise text
        self._answering.set(len(answers))
        parts = [answers[each] if each in answers else seen.cumulative() for each, seen in self._seen.items()]
        together = Families.together([self._departed, *parts], self._gauges)
        return generate_latest(together) + generate_latest(self._registry)


async def ask(socket: Path, patience_s: float) -> bytes:
    """What is said on a socket to whoever connects.

    Raises:
        OSError: nobody is there, or says nothing in time (TimeoutError).
    """
    async with asyncio.timeout(patience_s):
        reader, writer = await asyncio.open_unix_connection(socket)
        try:
            if text := await reader.read(-1):
                return text
            raise ConnectionResetError(f"{socket} was closed")
        finally:
            writer.close()


async def tell(socket: Path, what: Callable[[], Awaitable[bytes]]) -> asyncio.Server:
    """Say it to whoever of this user connects to the socket."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(await what())
            await writer.drain()
        except ConnectionError:
            return  # they no longer want to know
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, socket)
    socket.chmod(0o600)
    return server
