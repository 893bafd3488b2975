"""Tokens per second of a real engine through the gateway, beside those of the engine alone.

usage: make bench-throughput ARGS="[--rounds N] [--streams N] [--tokens N] [--quick] [--json]"

Starts `assay serve` itself, with the Reference tier only, for an engine answers nobody but its gateway: its port
and its key are read from its process. Both ways are asked by turns, so that whatever else the machine does weighs
on both; the ratio is the mean over the rounds, with a 95% bootstrap. Run it on a machine that does nothing else.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table

from server.launch.process import free_port
from server.progress import Steps
from tests.bench.bootstrap import interval
from tests.bench.load import ROOT, Load, Order
from tests.bench.upstream import MODEL
from tiers.source import EMBEDDED_PACKAGE

AT_LEAST = 0.98
START_S = 600.0
STOP_S = 120.0


@dataclass(frozen=True)
class Served:
    """A running gateway and the way past it."""

    gateway: str
    engine: str
    engine_key: str


@contextmanager
def serving(home: Path, folder: Path) -> Iterator[Served]:
    """`assay serve` with one engine, until the end of the block.

    Raises:
        RuntimeError: it did not come up; its last line says why.
    """
    config, log, port = folder / "config.yaml", folder / "log", free_port()
    model = {
        "name": MODEL,
        "source": f"package:{EMBEDDED_PACKAGE}",
        "context_length": 2048,
        "tiers": {"Reference": {}},
    }
    config.write_text(
        yaml.safe_dump(
            {
                "port": port,
                "home": str(home.absolute()),
                "keys": str(folder / "keys.json"),
                "certify": "off",
                "models": [model],
            }
        )
    )
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--config", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"assay serve is not ready: {log.read_text().strip().splitlines()[-1:]}")
            time.sleep(0.5)
        yield Served(url, *_engine_of(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(json.load(answer)["ready"])
    except OSError:
        return False


def _engine_of(gateway: int) -> tuple[str, str]:
    """The URL and the key of the engine that a gateway started."""
    for process in psutil.Process(gateway).children(recursive=True):
        port = [word.removeprefix("--port=") for word in process.cmdline() if word.startswith("--port=")]
        if port and (key := process.environ().get("VLLM_API_KEY")):
            return f"http://127.0.0.1:{port[0]}", key
    raise RuntimeError("the gateway has started no engine")


def tokens_per_s(url: str, key: str, streams: int, tokens: int) -> float:
    """Of so many streams at once, together."""
    order = Order(
        url=url,
        connections=streams,
        kinds=("generate",),
        headers={"authorization": f"Bearer {key}"},
        tokens=tokens,
        requests=streams,
    )
    with Load(order) as load:
        return streams * tokens / load.run().seconds


def measure(home: Path, *, rounds: int, streams: int, tokens: int) -> dict[str, list[float]]:
    """Tokens per second of each round, on both ways."""
    rates: dict[str, list[float]] = {"direct": [], "gateway": []}
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder, Steps() as steps, ExitStack() as running:
        with steps.step("assay serve"):
            served = running.enter_context(serving(home, Path(folder)))
        ways = {"direct": (served.engine, served.engine_key), "gateway": (served.gateway, "unused")}
        for number in range(rounds):
            with steps.step(f"round {number + 1} of {rounds}") as step:
                for way in sorted(ways, reverse=bool(number % 2)):
                    step.detail(way)
                    rates[way].append(tokens_per_s(*ways[way], streams, tokens))
    return rates


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".assay"), help="where the checkpoint is, or will be")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--streams", type=int, default=8, help="at once")
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--quick", action="store_true", help="two short rounds: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = 2, 16
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through all that ends processes
    rates = measure(options.home, rounds=options.rounds, streams=options.streams, tokens=options.tokens)
    ratios = [through / direct for through, direct in zip(rates["gateway"], rates["direct"], strict=True)]
    ratio, (low, high) = statistics.fmean(ratios), interval([torch.tensor([each]) for each in ratios])
    if options.json:
        json.dump({"tokens_per_s": rates, "ratio": ratio, "interval": (low, high)}, sys.stdout, indent=2)
        return
    direct, through = (statistics.fmean(rates[way]) for way in ("direct", "gateway"))
    settled = "reached" if low >= AT_LEAST else "missed" if high < AT_LEAST else "open: more rounds would tell"
    table = Table("streams", "tokens", "direct", "through the gateway", "ratio (95%)", "at least", "", box=None)
    table.add_row(
        str(options.streams),
        str(options.tokens),
        f"{direct:.1f}/s",
        f"{through:.1f}/s",
        f"{ratio:.3f} ({low:.3f}–{high:.3f})",
        f"{AT_LEAST}",
        settled,
    )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
