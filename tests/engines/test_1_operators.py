"""`assay operators`, as its users run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.conftest import MODEL, ROOT, Server, home_in
from tiers.operators.findings import Finding

ASSAY = str(Path(sys.executable).with_name("assay"))


@pytest.mark.slow
def test_the_command_runs_them_in_a_process_of_their_own_and_exits_with_what_was_found(
    assay: Server, tmp_path: Path
) -> None:
    assert assay.is_ready(), "the checkpoint is there"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {"ASSAY_HOME": str(home_in(tmp_path)), "TMPDIR": str(temporary)}
    command = [ASSAY, "operators", "--only", "greedy", "--own-widths", "--json", "--plant", "second-best"]
    ran = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, timeout=250)
    assert ran.returncode == 1, ran.stderr
    (broken,) = [Finding.model_validate(each) for each in json.loads(ran.stdout)]
    assert (broken.operator, broken.outcome, broken.widths) == ("greedy", "FAIL", MODEL)
    assert list(temporary.iterdir()) == [], "what it makes for itself is removed"
