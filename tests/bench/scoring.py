"""Prompt tokens per second that an engine scores, beside those that it merely reads.

usage: make bench-scoring ARGS="[--rounds N] [--quick] [--json]"

Starts `assay serve` with the Reference tier only, has it answer the quick prompts, and then does both by turns:
reads each prompt with its answer, to write one token, and is walked along it as `assay certify` does in
prefill. As many at once both times, and nothing from the prefix cache. The ratio is the mean over the rounds,
with a 95% bootstrap. Run it on a machine that does nothing else.
"""

import argparse
import asyncio
import json
import secrets
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from server.config import Config
from server.engines.engine import Engine
from server.measuring.measure import AT_ONCE, make_pack, score
from server.progress import Step, Steps
from tests.bench.bootstrap import interval
from tests.bench.throughput import serving
from tests.bench.upstream import MODEL
from tiers.conformance.pack import Pack
from tiers.conformance.prompts import load_prompts

AT_LEAST = 0.5
TOKENS = 48


async def read_s(engine: Engine, pack: Pack) -> float:
    """Seconds for reading every prompt with its answer."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def read(tokens: list[int]) -> None:
        async with gate:
            await engine.completion(MODEL, tokens, max_tokens=1, cache_salt=secrets.token_hex(16))

    began = time.monotonic()
    await asyncio.gather(*(read([*each.prompt, *each.answer[:-1]]) for each in pack.answers))
    return time.monotonic() - began


async def scored_s(engine: Engine, pack: Pack, checkpoint: Path) -> float:
    """Seconds for scoring them."""
    began = time.monotonic()
    await score(engine, pack, checkpoint, "prefill", say=lambda text: None)
    return time.monotonic() - began


async def rates_of(
    engine: Engine, checkpoint: Path, folder: Path, rounds: int, step: Step
) -> dict[str, list[float]]:
    """Tokens per second of each round, both ways."""
    pack = await make_pack(
        engine,
        MODEL,
        checkpoint,
        load_prompts(quick=True),
        (),
        folder,
        tokens=TOKENS,
        fingerprint="",
        say=step.detail,
    )
    tokens = sum(len(each.prompt) + len(each.answer) - 1 for each in pack.answers)
    ways = {"read": partial(read_s, engine, pack), "scored": partial(scored_s, engine, pack, checkpoint)}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in sorted(ways, reverse=bool(number % 2)):
            step.detail(f"round {number + 1} of {rounds}: {way}")
            rates[way].append(tokens / await ways[way]())
    return rates


def measure(home: Path, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each round, both ways."""
    (tier, *_) = Config(home=home).tiers
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder, Steps() as steps, ExitStack() as running:
        with steps.step("assay serve"):
            served = running.enter_context(serving(home, Path(folder)))

        async def both(step: Step) -> dict[str, list[float]]:
            engine = Engine(tier.name, served.engine, served.engine_key, None)
            try:
                return await rates_of(engine, tier.checkpoint, Path(folder) / "pack", rounds, step)
            finally:
                await engine.stop()

        with steps.step("prompts, read and scored") as step:
            return asyncio.run(both(step))


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".assay"), help="where the checkpoint is, or will be")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    options.rounds = 2 if options.quick else options.rounds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through all that ends processes
    rates = measure(options.home, options.rounds)
    ratios = [scored / read for scored, read in zip(rates["scored"], rates["read"], strict=True)]
    ratio, (low, high) = statistics.fmean(ratios), interval([torch.tensor([each]) for each in ratios])
    if options.json:
        json.dump({"tokens_per_s": rates, "ratio": ratio, "interval": (low, high)}, sys.stdout, indent=2)
        return
    read, scored = (f"{statistics.fmean(rates[way]):,.0f} tokens/s" for way in ("read", "scored"))
    settled = "reached" if low >= AT_LEAST else "missed" if high < AT_LEAST else "open: more rounds would tell"
    table = Table("read", "scored", "ratio (95%)", "at least", "", box=None)
    table.add_row(read, scored, f"{ratio:.2f} ({low:.2f}–{high:.2f})", f"{AT_LEAST}", settled)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
