"""The units are what systemd takes without a word, are closed as far as engines allow, and end after requests."""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from server.config import Config
from server.launch.process import GRACE_S, TETHER_GRACE_S
from tests.programs import program

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
GUIDE = (FOLDER.parent / "README.md").read_text()
UNITS = ("assay.service", "assay-engine@.service", "assay-gateway.service")
DEVICES = "assay-nvidia.service"
WITH_ENGINES = UNITS[:2]
MOST_EXPOSED = 20
"""Of 100, by systemd's own count; an ordinary service has 96."""


class Unit(configparser.RawConfigParser):
    """A unit file, in which a key may stand more than once: the last one counts here."""

    def __init__(self, name: str) -> None:
        super().__init__(strict=False, delimiters="=", comment_prefixes="#")
        self.read(FOLDER / name)

    def optionxform(self, option: str) -> str:
        return option


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest) -> Unit:
    return Unit(request.param)


def test_systemd_takes_them_without_a_word(tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    for needed in ("opt/assay/.venv/bin/assay", "bin/sh", "usr/bin/nvidia-modprobe", "usr/bin/nvidia-smi"):
        (tmp_path / needed).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / needed).touch(0o755)
    units = tmp_path / "etc" / "systemd" / "system"
    units.mkdir(parents=True)
    for name in (*UNITS, DEVICES):
        (units / name).write_text((FOLDER / name).read_text())
    ((place, drop_in),) = re.findall(
        r"^```ini\n# /etc/systemd/system/(\S+)\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL
    )
    (units / place).parent.mkdir()
    (units / place).write_text(drop_in)
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    names = [name.replace("@", "@Turbo") for name in (*UNITS, DEVICES)]
    checked = subprocess.run(
        [analyze, "verify", f"--root={tmp_path}", *names], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", UNITS)
def test_they_leave_little_open(name: str) -> None:
    rating = subprocess.run(
        [
            program("systemd-analyze"),
            "security",
            "--offline=true",
            f"--threshold={MOST_EXPOSED}",
            "--no-pager",
            str(FOLDER / name),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert rating.returncode == 0, rating.stdout


def test_requests_may_finish_before_anything_is_killed(unit: Unit) -> None:
    service = unit["Service"]
    # The gateway gets the signal and drains; the rest of the group is killed only when that took too long.
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > Config().drain_timeout_s + GRACE_S + TETHER_GRACE_S


def test_a_config_that_is_wrong_is_not_tried_again(unit: Unit) -> None:
    assert unit["Service"]["Restart"] == "on-failure"
    assert unit["Service"]["RestartPreventExitStatus"] == "2"


def test_they_run_as_the_user_of_the_images(unit: Unit) -> None:
    kind, name, uid, _, home = (FOLDER / "assay.sysusers").read_text().splitlines()[-1].split()
    assert (kind, uid) == ("u", "10001")
    assert unit["Service"]["User"] == unit["Service"]["Group"] == name
    assert home == f"/var/lib/{unit['Service']['StateDirectory']}"


@pytest.mark.parametrize("name", WITH_ENGINES)
def test_engines_reach_gpus_and_no_other_device(name: str) -> None:
    service = Unit(name)["Service"]
    assert service["DevicePolicy"] == "closed"
    assert service["DeviceAllow"] == "char-nvidia* rw"
    assert "PrivateDevices" not in service


@pytest.mark.parametrize("name", WITH_ENGINES)
def test_devices_are_made_by_a_unit_that_may_before_the_one_that_may_not(name: str) -> None:
    unit = Unit(name)
    # With a closed policy neither its first process nor any before that makes one, whatever its privileges.
    assert "ExecStartPre" not in unit["Service"]
    assert DEVICES in unit["Unit"]["Wants"].split()
    assert DEVICES in unit["Unit"]["After"].split()
    maker = Unit(DEVICES)
    assert maker["Service"]["Type"] == "oneshot"
    assert not {"DevicePolicy", "DeviceAllow", "PrivateDevices", "User"} & set(maker["Service"])
    assert maker["Unit"]["ConditionPathExists"] == "/usr/bin/nvidia-modprobe", "not every machine has a driver"


@pytest.mark.parametrize("name", WITH_ENGINES)
def test_an_engine_that_memory_runs_out_for_takes_nobody_with_it(name: str) -> None:
    assert Unit(name)["Service"]["OOMPolicy"] == "continue"


def test_the_guide_installs_every_unit() -> None:
    (line,) = re.findall(r"^install -m 0644 (.*) /etc/systemd/system/$", GUIDE, flags=re.MULTILINE)
    assert {Path(path).name for path in line.split()} == {*UNITS, DEVICES}
    assert all((FOLDER.parents[1] / path).is_file() for path in line.split())


@pytest.mark.parametrize("name", UNITS)
def test_a_line_that_an_older_systemd_does_not_understand_says_nothing_else(name: str) -> None:
    """It leaves out a whole line for a specifier that it does not know, such as %d before 250."""
    lines = (FOLDER / name).read_text().splitlines()
    assert [line for line in lines if "%d" in line and line != "Environment=HF_TOKEN_PATH=%d/hf_token"] == []


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("assay-engine@.service", "engine Turbo --config /etc/assay/assay.yaml --no-build --port 8101"),
        ("assay-gateway.service", "gateway --config /etc/assay/assay.yaml"),
    ],
)
def test_the_engine_key_reaches_both_halves_and_no_command_line(tmp_path: Path, name: str, command: str) -> None:
    assay = tmp_path / "assay"
    assay.write_text('#!/bin/sh\necho "$ASSAY_ENGINE_KEY"\necho "$@"\n')
    assay.chmod(0o755)
    (tmp_path / "engine_key").write_text("secret\n")
    line = (
        Unit(name)["Service"]["ExecStart"].replace("/opt/assay/.venv/bin/assay", str(assay)).replace("%i", "Turbo")
    )
    shell, option, script = line.split(" ", 2)
    done = subprocess.run(
        [shell, option, script.strip("'").replace("$$", "$")],
        env=os.environ | {"CREDENTIALS_DIRECTORY": str(tmp_path), "OPTIONS": "--port 8101"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["secret", command]
