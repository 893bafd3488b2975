"""The Jobs: that they have the memory for what they do, and that whoever waits for one hears how it ended."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from server.checkpoints import _check_memory
from server.config_file import load_config
from tests.deploy.api_server import LOG, api_server
from tests.deploy.cluster import KUBERNETES, OVERLAYS, Cluster, size_of
from tests.programs import program
from tiers.catalog import find_member
from tiers.conformance.room import truth_bytes
from tiers.errors import BuildError
from tiers.hardware import GIB
from tiers.tier import Tier, TierKind

ITSELF = GIB
"""What `assay certify` takes besides, and what runs in the other environment while it builds."""


def tiers_of(cluster: Cluster, folder: Path) -> tuple[Tier, ...]:
    path = folder / "assay.yaml"
    path.write_text(cluster.config())
    return load_config(path).tiers


def memory_of(cluster: Cluster, job: str) -> tuple[float, float]:
    """What it is promised, and what it may take."""
    resources = next(pod for pod in cluster.pods() if pod.component == job).main["resources"]
    return size_of(resources["requests"]["memory"]), size_of(resources["limits"]["memory"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_certifies_has_memory_for_the_reference_in_fp32(overlay: str, tmp_path: Path) -> None:
    cluster = Cluster.of(overlay)
    (model,) = {tier.model for tier in tiers_of(cluster, tmp_path)}
    needed = truth_bytes(find_member(model).shape) + ITSELF
    promised, limit = memory_of(cluster, "certify")
    assert promised >= needed
    assert limit >= 1.25 * needed, "it is an estimate"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_builds_has_memory_for_the_weights_that_are_quantized(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster.of(overlay)
    promised, _ = memory_of(cluster, "build")
    for tier in tiers_of(cluster, tmp_path):
        for available in (promised / 1.2 - ITSELF, 1e9):
            monkeypatch.setattr("server.checkpoints.free_ram", lambda free=available: free)
            if available > 1e9 or overlay == "demo-cpu" or tier.kind is TierKind.REFERENCE:
                _check_memory(tier)
            else:
                with pytest.raises(BuildError, match="all of it in memory"):
                    _check_memory(tier)


def ended(folder: Path, *conditions: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What the guide has one wait with says of a Job whose conditions are these, one after the other."""
    program("kubectl")
    with api_server(folder, "assay-build", *conditions) as environment:
        return subprocess.run(
            [KUBERNETES / "ended.sh", "assay-build"],
            env=os.environ | environment | {"EVERY_S": "0.01"},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


def test_who_waits_for_a_job_that_fails_hears_so_and_why(tmp_path: Path) -> None:
    done = ended(tmp_path, [], ["FailureTarget"], ["FailureTarget", "Failed"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [LOG, "assay-build has failed."]


def test_who_waits_for_a_job_that_completes_goes_on(tmp_path: Path) -> None:
    done = ended(tmp_path, [], ["SuccessCriteriaMet"], ["SuccessCriteriaMet", "Complete"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
