"""The benches run and measure; what they measure is no test."""

import json
import subprocess
from typing import Any

import pytest

from tests.engines.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(target: str, options: str) -> Any:
    done = subprocess.run(
        ["make", "--silent", target, f"ARGS=--quick --json {options}"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,  # 1 says that a bar was missed, or not measured
        cwd=ROOT,
    )
    assert done.returncode in (0, 1)
    return json.loads(done.stdout)


def test_the_bench_of_gateways_measures_ours() -> None:
    """Alone: the others would have to be installed first."""
    measured = run("bench-gateway", "--only assay --requests 500")
    ours = next(row for row in measured["gateways"] if row["gateway"] == "assay")
    assert ours["problem"] is None
    assert ours["medians"]["cpu_us_per_request_1"] > 0
    assert ours["medians"]["cpu_us_per_chunk"] > 0


@pytest.mark.parametrize(
    ("target", "ways"), [("bench-throughput", ("direct", "gateway")), ("bench-scoring", ("read", "scored"))]
)
def test_a_bench_of_an_engine_measures_both_ways(target: str, ways: tuple[str, str]) -> None:
    measured = run(target, "")
    assert all(rate > 0 for way in ways for rate in measured["tokens_per_s"][way])


def test_the_bench_of_divergence_measures_time_and_memory() -> None:
    measured = run("bench-divergence", "")["cpu"]
    assert all(min(of["seconds"]["ours"]) > 0 for of in measured["times"].values())
    assert 0 < measured["peak_bytes"]["ours"] < measured["peak_bytes"]["log_softmax + kl_div"]


def test_the_bench_of_routing_measures_both_choices() -> None:
    rounds = run("bench-routing", "")["rounds"]
    assert rounds.keys() == {"affinity", "round robin"}
    assert all(one["first_s"] > 0 and 0 <= one["hits"] < 1 for way in rounds.values() for one in way)
