"""The Jobs: that whoever waits for one hears how it ended."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.deploy.api_server import LOG, api_server
from tests.deploy.cluster import KUBERNETES
from tests.programs import program


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
