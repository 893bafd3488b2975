"""How a tier's replicas are chosen, beside turn by turn: prefix-cache hits and time to first token.

usage: make bench-routing ARGS="[--rounds N] [--groups N] [--each N] [--at-once N] [--words N] [--quick] [--json]"

Two real engines of the embedded model are started once, and two gateways stand in front of the same two:
Assay's, and one that is the same but for its choice, which goes round robin. A round is asked of both, by turns
in which of them is first: so many groups of requests, each with a long system message of its own that no other
round has, mixed by chance and so many of them at once. The ratio of the times is the mean over rounds, with a
95% bootstrap; what the prefix cache had is what the engines have counted. Run it on a machine that does nothing
else.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import torch
from rich.console import Console
from rich.table import Table

from server.app import build_app
from server.config import Config
from server.engines.affinity import NO_WORK, Work
from server.engines.fleet import Fleet
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.keys import Keys
from server.listener import http_server, listening_socket, url_of
from server.metrics import Metrics
from server.model_config import ModelConfig, TierConfig
from server.progress import Step, Steps
from server.serve import running_engines
from tests.bench.bootstrap import interval
from tests.bench.upstream import MODEL
from tiers.source import EMBEDDED_PACKAGE
from tiers.tier import TierKind

WORDS = Path(__file__).with_name("routing.py").read_text().split()
AT_ONCE = 16
"""What an engine works on; more than are asked at once, so that nobody waits in a queue."""


class RoundRobin(Pool):
    """The same replicas, each in its turn."""

    _turn = itertools.count()

    def pick(self, work: Work = NO_WORK, tried: Collection[Replica] = ()) -> Replica:
        """Whoever is next."""
        able = [replica for replica in self.replicas if replica.takes_requests and replica not in tried]
        return able[next(self._turn) % len(able)]


@dataclass(frozen=True)
class Round:
    """What was seen of one way in one round."""

    first_s: float
    """Mean time to first token."""
    p90_s: float
    hits: float
    """The share of the prompts' tokens that came from a prefix cache."""


async def seen(url: str, engines: Sequence[Replica], prompts: Sequence[str], at_once: int) -> Round:
    """Ask all of them."""
    before = [await _cache(replica) for replica in engines]
    places = asyncio.Semaphore(at_once)
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        times = await asyncio.gather(*(_first_token(session, places, prompt) for prompt in prompts))
    after = [await _cache(replica) for replica in engines]
    asked, found = (sum(a[i] - b[i] for a, b in zip(after, before, strict=True)) for i in (0, 1))
    return Round(statistics.fmean(times), statistics.quantiles(times, n=10)[-1], found / asked)


async def _first_token(session: aiohttp.ClientSession, places: asyncio.Semaphore, prompt: str) -> float:
    messages = [{"role": "system", "content": prompt}, {"role": "user", "content": f"In a word: {hash(prompt)}?"}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, "stream": True}
    async with places:
        began = time.monotonic()
        async with session.post("/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            await answer.content.readline()
            took = time.monotonic() - began
            await answer.read()
    return took


async def _cache(replica: Replica) -> tuple[float, float]:
    """Tokens that were looked for in the engine's prefix cache, and those that were found."""
    lines = (await replica.engine.ask("GET", "/metrics", "its metrics")).decode().splitlines()
    asked, found = (
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:prefix_cache_{what}_total"))
        for what in ("queries", "hits")
    )
    return asked, found


def workload(draw: random.Random, groups: int, each: int, words: int) -> list[str]:
    """System messages, every one ``each`` times, in the order of chance; none was ever asked before."""
    heads = [" ".join([f"{draw.getrandbits(64):x}", *draw.choices(WORDS, k=words)]) for _ in range(groups)]
    prompts = heads * each
    draw.shuffle(prompts)
    return prompts


@asynccontextmanager
async def gateway(config: Config, pool: Pool, metrics: Metrics) -> AsyncIterator[str]:
    """One in front of the pool, and its URL."""
    with listening_socket("127.0.0.1", 0) as listener:
        server = http_server(build_app(config, Fleet([pool]), Keys(config.keys_file), metrics), config, metrics)
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield url_of(listener)
        finally:
            server.should_exit = True
            await serving


async def measure(options: argparse.Namespace, steps: Steps) -> dict[str, list[Round]]:
    """Each way's rounds."""
    resources = TierConfig(replicas=2, kv_cache_gib=options.cache, max_num_seqs=AT_ONCE)
    model = ModelConfig(
        name=MODEL,
        source=f"package:{EMBEDDED_PACKAGE}",
        context_length=2048,
        tiers={TierKind.REFERENCE: resources},
    )
    config = Config(home=options.home, certify="off", models=(model,))
    draw = random.Random(options.seed)
    rounds: dict[str, list[Round]] = {"affinity": [], "round robin": []}
    async with AsyncExitStack() as running:
        fleet = await running.enter_async_context(running_engines(config, steps))
        (ours,) = fleet.pools
        metrics = Metrics()
        turns = RoundRobin(
            ours.tier, ours.manifest, ours.context_length, ours.replicas, metrics, max_num_seqs=AT_ONCE
        )
        ways = {
            "affinity": await running.enter_async_context(gateway(config, ours, Metrics())),
            "round robin": await running.enter_async_context(gateway(config, turns, metrics)),
        }
        for number in range(options.rounds):
            with steps.step(f"round {number + 1} of {options.rounds}") as step:
                await _round(ways, number, rounds, ours.replicas, draw, options, step)
    return rounds


async def _round(
    ways: dict[str, str],
    number: int,
    rounds: dict[str, list[Round]],
    replicas: Sequence[Replica],
    draw: random.Random,
    options: argparse.Namespace,
    step: Step,
) -> None:
    for way in sorted(ways, reverse=bool(number % 2)):
        step.detail(way)
        prompts = workload(draw, options.groups, options.each, options.words)
        rounds[way].append(await seen(ways[way], replicas, prompts, options.at_once))


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".assay"), help="where the checkpoint is, or will be")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--groups", type=int, default=8, help="of prompts that begin alike")
    parser.add_argument("--each", type=int, default=8, help="prompts of a group")
    parser.add_argument("--words", type=int, default=200, help="of a system message, about 2.5 tokens each")
    parser.add_argument("--at-once", type=int, default=4, help="requests")
    parser.add_argument("--cache", type=float, default=0.25, help="GiB of KV cache of each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one small round: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.groups, options.each = 1, 3, 2
    with Steps() as steps:
        rounds = asyncio.run(measure(options, steps))
    ours, turns = rounds["affinity"], rounds["round robin"]
    ratios = [mine.first_s / other.first_s for mine, other in zip(ours, turns, strict=True)]
    ratio, (low, high) = statistics.fmean(ratios), interval([torch.tensor([each]) for each in ratios])
    if options.json:
        each = {way: [asdict(one) for one in seen] for way, seen in rounds.items()}
        json.dump({"rounds": each, "ratio": ratio, "interval": (low, high)}, sys.stdout, indent=2)
        return
    table = Table("choice", "prompt tokens from the cache", "first token, mean", "90%", box=None)
    for way, several in rounds.items():
        hits, first, p90 = (statistics.fmean(getattr(one, what) for one in several) for what in _FIGURES)
        table.add_row(way, f"{hits:.1%}", f"{first * 1000:.0f} ms", f"{p90 * 1000:.0f} ms")
    console = Console(width=120)
    console.print(table)
    console.print(f"first token: {ratio:.2f} (95%: {low:.2f}–{high:.2f}) of what round robin takes")


_FIGURES = ("hits", "first_s", "p90_s")


if __name__ == "__main__":
    main()
