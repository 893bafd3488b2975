"""What comparing distributions costs: time and memory, ours beside others.

usage: make bench-divergence ARGS="[--rounds N] [--positions T] [--quick] [--json]"

On the CPU, from two matrices of logits, 512 × 49,152 in FP32: `kernels.divergence.compare`, which finds KL, TV,
both entropies, the given token's log-probabilities and the likeliest; `log_softmax` and `kl_div` of PyTorch,
which find KL alone; and all that ours finds, in PyTorch's words. By turns in this process, each round in another
order; a ratio is that of the same round's times, the mean over rounds with a 95% bootstrap. Three pairs, from
nearly equal to far apart. Memory is what the process grows by at its largest (the kernel's VmHWM, reset before),
each way in a process of its own with both matrices made.

On an NVIDIA GPU, where there is one, from hidden states and a head, 4,096 × 4,096 and 128,256 × 4,096, and the
tier's logits, all BF16: ours beside the head's product alone, PyTorch eager, `torch.compile`, and Liger-Kernel's
fused linear JSD where it is installed (it makes both sides' logits, and a mean alone). CUDA events; medians.

Exits with 1 if a bar is missed: 3 times as fast as `log_softmax` and `kl_div` with a quarter of the memory, and on
a GPU 1.3 times the head's product alone.
"""

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from kernels.divergence import compare
from kernels.head import Projected, fp32_logits, rows_at_once
from tests.bench.bootstrap import interval

VOCABULARY = 49_152
PAIRS = {"nearly equal": 0.003, "as FP8": 0.3, "as INT4": 1.0}
"""How far logits are moved, each by itself; KL is near 4e-6, 0.04 and 0.4 nats."""
FASTER, SMALLER = 3.0, 0.25
"""Than `log_softmax` and `kl_div`."""
BESIDE_PRODUCT = 1.3

Way = Callable[[], Any]


def by_kl_div(p: Tensor, q: Tensor) -> Tensor:
    """KL alone."""
    ln_p, ln_q = functional.log_softmax(p, -1), functional.log_softmax(q, -1)
    return functional.kl_div(ln_q, ln_p, reduction="none", log_target=True).sum(-1)


def in_torch(p: Tensor, q: Tensor, tokens: Tensor) -> list[Tensor]:
    """Every figure of ours, as one writes it down."""
    ln_p, ln_q = functional.log_softmax(p.float(), -1), functional.log_softmax(q.float(), -1)
    p, q, given = ln_p.exp(), ln_q.exp(), tokens.unsqueeze(-1)
    return [
        (p * (ln_p - ln_q)).sum(-1),
        (p - q).abs().sum(-1) / 2,
        ln_p.gather(-1, given),
        ln_q.gather(-1, given),
        ln_p.argmax(-1),
        ln_q.argmax(-1),
        -(p * ln_p).sum(-1),
        -(q * ln_q).sum(-1),
    ]


def cpu_ways(positions: int, noise: float) -> dict[str, Way]:
    """From logits."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(positions, VOCABULARY, generator=generator).mul_(4)
    q = p.clone()
    for row in q:
        row.add_(torch.randn(VOCABULARY, generator=generator), alpha=noise)
    tokens = torch.arange(positions)
    return {
        "ours": lambda: compare(p, q, tokens),
        "log_softmax + kl_div": lambda: by_kl_div(p, q),
        "all figures in PyTorch": lambda: in_torch(p, q, tokens),
    }


def cpu_seconds(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Of each round; the first is for caches and threads, and not kept."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            ways[way]()
            if number:
                seconds[way].append(time.perf_counter() - began)
    return seconds


def grown_by(way: str, positions: int) -> int:
    """Bytes that this process grows by at its largest."""
    for each in cpu_ways(8, PAIRS["as FP8"]).values():  # threads, and what libraries allocate once
        each()
    run = cpu_ways(positions, PAIRS["as FP8"])[way]
    Path("/proc/self/clear_refs").write_text("5")  # what it has been at its largest is forgotten
    before = psutil.Process().memory_info().rss
    run()
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(line) * 1024 - before


def peak_bytes(way: str, positions: int) -> int:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.divergence", "--grown-by", way, "--positions", str(positions)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure_cpu(positions: int, rounds: int) -> dict[str, Any]:
    """Times of every pair, and memory of each way."""
    times = {}
    for pair, noise in PAIRS.items():
        seconds = cpu_seconds(cpu_ways(positions, noise), rounds)
        ratios = {}
        for way in list(seconds)[1:]:
            each = [theirs / ours for theirs, ours in zip(seconds[way], seconds["ours"], strict=True)]
            ratios[way] = {
                "ratio": statistics.fmean(each),
                "interval": interval([torch.tensor([r]) for r in each]),
            }
        times[pair] = {"seconds": seconds, "faster_than": ratios}
    return {
        "positions": positions,
        "vocabulary": VOCABULARY,
        "threads": torch.get_num_threads(),
        "times": times,
        "peak_bytes": {way: peak_bytes(way, positions) for way in seconds},
    }


def gpu_ways(positions: int, vocabulary: int, width: int) -> tuple[dict[str, Way], dict[str, str]]:
    """From hidden states; and why a way is not there."""
    generator = torch.Generator("cuda").manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    hidden, head = made(positions, width), made(vocabulary, width) * 4 / width**0.5
    tier = hidden + 0.1 * made(positions, width)
    q, tokens = tier @ head.t(), torch.arange(positions, device="cuda") % vocabulary

    def product_in_runs() -> None:
        for part in rows_at_once(positions, vocabulary, is_cuda=True):
            fp32_logits(hidden[part], head)

    def eager() -> list[Tensor]:
        return in_torch(hidden @ head.t(), q, tokens)

    ways: dict[str, Way] = {
        "head alone": lambda: hidden @ head.t(),
        "head alone, FP32, in runs of rows": product_in_runs,
        "ours": lambda: compare(Projected(hidden, head), q, tokens),
        "PyTorch eager": eager,
        "torch.compile": torch.compile(eager),
    }
    if importlib.util.find_spec("liger_kernel") is None:
        return ways, {"Liger-Kernel's fused linear JSD": "liger_kernel is not installed"}
    liger = importlib.import_module("liger_kernel.transformers")
    jsd = liger.LigerFusedLinearJSD(jsd_beta=0.0)  # 0 is KL of the teacher from the student
    ways["Liger-Kernel's fused linear JSD"] = lambda: jsd(tier, head, hidden, head)
    return ways, {}


def measure_gpu(rounds: int) -> dict[str, Any]:
    """Milliseconds and memory of each way on the first GPU."""
    shape = {"positions": 4096, "vocabulary": 128_256, "width": 4096}
    ways, absent = gpu_ways(*shape.values())
    milliseconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks = {}
    for number in range(rounds + 1):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            event: Any = torch.cuda.Event  # without types
            begin, end = event(enable_timing=True), event(enable_timing=True)
            with torch.inference_mode():
                begin.record()
                ways[way]()
                end.record()
            torch.cuda.synchronize()
            peaks[way] = torch.cuda.max_memory_allocated() - before
            if number:  # the first compiles
                milliseconds[way].append(begin.elapsed_time(end))
    medians = {way: statistics.median(each) for way, each in milliseconds.items()}
    beside = {way: each / medians["head alone"] for way, each in medians.items()}
    card = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    return shape | card | {"ms": medians, "beside_head": beside, "peak_bytes": peaks, "absent": absent}


def missed_by(measured: dict[str, Any]) -> list[str]:
    """The bars that were missed, a sentence each."""
    missed = []
    cpu, gpu = measured["cpu"], measured["gpu"]
    for pair, of in cpu["times"].items():
        ratio = of["faster_than"]["log_softmax + kl_div"]["ratio"]
        if ratio < FASTER:
            missed.append(f"{pair}: {ratio:.2f} times as fast as log_softmax + kl_div, and not {FASTER}")
    share = cpu["peak_bytes"]["ours"] / cpu["peak_bytes"]["log_softmax + kl_div"]
    if share > SMALLER:
        missed.append(f"{share:.2f} of the memory of log_softmax + kl_div, and not {SMALLER}")
    if gpu is not None and gpu["beside_head"]["ours"] > BESIDE_PRODUCT:
        missed.append(f"{gpu['beside_head']['ours']:.2f} times the head alone, and not {BESIDE_PRODUCT}")
    return missed


def print_tables(measured: dict[str, Any]) -> None:
    """For people."""
    console, cpu, gpu = Console(width=115), measured["cpu"], measured["gpu"]
    console.print(f"CPU, {cpu['threads']} threads, {cpu['positions']} × {cpu['vocabulary']:,} FP32")
    table = Table("", *(f"{pair} (ms, ours faster by)" for pair in cpu["times"]), "memory (MB)", box=None)
    for way, peak in cpu["peak_bytes"].items():
        cells = []
        for of in cpu["times"].values():
            text = f"{1000 * statistics.median(of['seconds'][way]):.0f}"
            if way in of["faster_than"]:
                ratio = of["faster_than"][way]
                text += " ({:.2f}, {:.2f}–{:.2f})".format(ratio["ratio"], *ratio["interval"])
            cells.append(text)
        table.add_row(way, *cells, f"{peak / 1e6:.1f}")
    console.print(table)
    if gpu is None:
        console.print("GPU: there is none, so nothing was measured")
    else:
        console.print("{gpu}: {positions} × {vocabulary:,}, from {width} hidden units, BF16".format(**gpu))
        table = Table("", "ms", "beside the head", "memory (MB)", box=None)
        for way, ms in gpu["ms"].items():
            table.add_row(
                way, f"{ms:.2f}", f"{gpu['beside_head'][way]:.2f}", f"{gpu['peak_bytes'][way] / 1e6:.0f}"
            )
        for way, why in gpu["absent"].items():
            table.add_row(way, why)
        console.print(table)
    for sentence in measured["missed"]:
        console.print(f"missed: {sentence}")


def main() -> None:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--positions", type=int, default=512, help="on the CPU")
    parser.add_argument("--quick", action="store_true", help="two rounds of 64 positions: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--grown-by", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grown_by:
        print(grown_by(options.grown_by, options.positions))
        return
    rounds, positions = (2, 64) if options.quick else (options.rounds, options.positions)
    measured: dict[str, Any] = {"cpu": measure_cpu(positions, rounds)}
    measured["gpu"] = measure_gpu(rounds) if torch.cuda.is_available() else None
    measured["missed"] = missed_by(measured)
    if options.json:
        json.dump(measured, sys.stdout, indent=2)
    else:
        print_tables(measured)
    sys.exit(1 if measured["missed"] else 0)


if __name__ == "__main__":
    main()
