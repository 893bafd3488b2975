"""The Dockerfile: linted, pinned, and what it promises of the process that a container begins with.

What its commands do is seen in tests/engines/test_5_image.py, which runs them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.programs import program
from tiers.hardware import FIRST_DRIVER, NEEDS_CUDA

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HADOLINT = Path(sys.executable).with_name("hadolint")
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as an image's build does")


def instructions(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ").strip() for line in LINES if line.startswith(f"{name} ")]


def lint(text: str) -> subprocess.CompletedProcess[str]:
    command = [str(HADOLINT), "--no-color", "--failure-threshold", "style", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say_and_no_rule_is_ignored() -> None:
    checked = lint(DOCKERFILE)
    assert (checked.returncode, checked.stdout) == (0, "")
    assert "hadolint" not in DOCKERFILE
    assert not list(ROOT.glob(".hadolint.y*ml"))
    assert "DL3007" in lint("FROM python:latest\n").stdout, "the linter finds nothing at all"


def test_every_base_is_pinned_by_its_version_or_is_a_stage() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert len(stages) == len(instructions("FROM"))
    names = {name for _, name in stages}
    assert {"cpu", "cuda", "quantize-cpu", "quantize-cuda"} <= names
    assert {base for base, _ in stages} - names == {"${BASE}"}
    assert re.fullmatch(r"BASE=python:\d+\.\d+\.\d+-slim-[a-z]+", instructions("ARG")[0])


def test_what_is_run_is_a_script_that_is_there() -> None:
    commands = [part for line in instructions("RUN") for part in re.sub(r"--mount=\S+", "", line).split("&&")]
    assert commands
    for command in commands:
        script = ROOT / command.split()[0].removeprefix("/opt/assay/")
        assert script.parent == ROOT / "deploy" / "image"
        assert os.access(script, os.X_OK)


def test_what_is_copied_is_there_and_sent_and_the_rest_is_not() -> None:
    *_, rules = [(ROOT / ".dockerignore").read_text().splitlines()]
    sent = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert "*" in rules
    copied = {path for line in instructions("COPY") if "--from" not in line for path in line.split()[:-1]}
    assert all((ROOT / path).exists() for path in copied)
    assert {path.split("/")[0] for path in copied} == sent
    left_out = [rule.removeprefix("**/") for rule in rules if rule.startswith("**/")]
    files = [file for name in sent for file in (ROOT / name).rglob("*") if file.is_file()]
    size = sum(
        file.stat().st_size
        for file in files
        if not any(fnmatch(part, rule) for part in file.parts for rule in left_out)
    )
    assert size < 4e6, "the build's context"


def test_the_labels_say_what_pyproject_does() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', DOCKERFILE))
    assert labels == {
        "title": "Assay",
        "description": PROJECT["description"],
        "licenses": PROJECT["license"],
        "version": "${VERSION}",
        "revision": "${REVISION}",
    }
    assert f"VERSION={PROJECT['version']}" in instructions("ARG")


def test_only_cuda_has_a_compiler() -> None:
    stage = None
    for line in LINES:
        if started := re.match(r"FROM \S+ AS (\S+)", line):
            stage = started[1]
        if "packages.sh cuda" in line:
            assert stage == "cuda"
    assert "deploy/image/packages.sh cuda" in instructions("RUN")


def test_an_image_for_gpus_starts_on_no_driver_that_its_engines_would_not() -> None:
    needs = f"cuda>={'.'.join(map(str, NEEDS_CUDA))}"
    (said,) = re.findall(r'NVIDIA_REQUIRE_CUDA="([^"]*)"', DOCKERFILE)
    assert said == needs
    cuda = DOCKERFILE.partition("FROM runtime AS cuda")[2].partition("\nFROM ")[0]
    assert needs in cuda
    assert f"of {FIRST_DRIVER} or newer" in (ROOT / "deploy" / "README.md").read_text()


@ROOT_ONLY
def test_the_user_has_a_number_of_its_own_and_a_home_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group"):
        (tmp_path / "etc" / name).write_text("root:x:0:0::/root:/bin/sh\n")
    for _ in range(2):
        subprocess.run([ROOT / "deploy/image/user.sh", tmp_path, "10001", "/var/lib/assay"], check=True)
    (line,) = [line for line in (tmp_path / "etc/passwd").read_text().splitlines() if line.startswith("assay")]
    assert line == "assay:x:10001:10001:Assay:/var/lib/assay:/usr/sbin/nologin"
    for folder in ("var/lib/assay", "var/lib/assay/.cache"):
        assert ((tmp_path / folder).stat().st_uid, (tmp_path / folder).stat().st_gid) == (10001, 10001)
    assert instructions("USER")[-1] == "10001:10001"


@ROOT_ONLY
def test_the_first_process_hands_on_sigterm_and_collects_orphans() -> None:
    first, *rest = json.loads(instructions("ENTRYPOINT")[0])
    assert (first, rest) == ("tini", ["--", "assay"])
    # A command that takes no signals of its own, as any is before it has set its handlers, and an orphan.
    shell = "sh -c 'sleep 0.05 &'; exec sleep 60"
    ended, zombies = _in_a_container([program(first), "--", "sh", "-c", shell])
    assert (ended, zombies) == (True, 0)
    ended, zombies = _in_a_container(["sh", "-c", shell])
    assert (ended, zombies > 0) == (False, True), "without it, it would be no other: tini is not needed"


def _in_a_container(command: list[str]) -> tuple[bool, int]:
    """Whether a first process ends by SIGTERM, and how many dead ones it has left uncollected before."""
    unshare = subprocess.Popen([program("unshare"), "--pid", "--fork", "--kill-child", *command])
    try:
        time.sleep(0.25)
        (first,) = psutil.Process(unshare.pid).children()
        dead = sum(each.status() == psutil.STATUS_ZOMBIE for each in first.children(recursive=True))
        first.send_signal(signal.SIGTERM)
        try:
            unshare.wait(0.25)
        except subprocess.TimeoutExpired:
            return False, dead
        return True, dead
    finally:
        unshare.kill()
        unshare.wait()
