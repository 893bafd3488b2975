"""How much memory is free, in a container and outside."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tiers.hardware import GIB, Machine
from tiers.ram import free_ram

MACHINE = 100 * GIB


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))


def lay(folder: Path, **figures: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (folder / f"memory.{name}").write_text(f"{figure}\n")


def free(cgroups: Path, *lines: str) -> int:
    own = cgroups.parent / "own"
    own.write_text("".join(f"{line}\n" for line in lines))
    return free_ram(cgroups, own)


@pytest.fixture
def cgroups(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def test_a_containers_limit_counts_less_what_is_used_and_not_given_back(cgroups: Path) -> None:
    stat = f"anon {5 * GIB}\nfile {3 * GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}"
    lay(cgroups, max=16 * GIB, current=9 * GIB, stat=stat)
    assert free(cgroups, "0::/") == 9 * GIB


def test_the_first_version_of_cgroups_says_it_under_other_names(cgroups: Path) -> None:
    stat = f"inactive_file 0\ntotal_inactive_file {2 * GIB}"
    lay(cgroups / "memory" / "pod", limit_in_bytes=16 * GIB, usage_in_bytes=9 * GIB, stat=stat)
    lay(cgroups / "memory", limit_in_bytes=(1 << 63) - 4096, usage_in_bytes=50 * GIB, stat="total_inactive_file 0")
    assert free(cgroups, "9:name=systemd:/pod", "4:cpu,memory:/pod", "0::/") == 9 * GIB


@pytest.mark.parametrize(
    ("outer", "inner", "least"), [("max", 8, 8), (8, "max", 8), (4, 8, 4), ("max", "max", 100)]
)
def test_the_limit_may_be_on_one_that_it_is_in(
    cgroups: Path, outer: int | str, inner: int | str, least: int
) -> None:
    lay(cgroups / "pod", max=outer if outer == "max" else int(outer) * GIB, current=0, stat="")
    lay(cgroups / "pod" / "box", max=inner if inner == "max" else int(inner) * GIB, current=0, stat="")
    assert free(cgroups, "0::/pod/box") == least * GIB


def test_a_path_of_the_whole_machine_leaves_what_is_mounted_here(cgroups: Path) -> None:
    lay(cgroups, max=8 * GIB, current=GIB, stat="inactive_file 0")
    assert free(cgroups, "0::/kubepods/pod1/box") == 7 * GIB
    assert free(cgroups, "0::/../../elsewhere") == 7 * GIB


def test_a_limit_above_what_the_machine_has_changes_nothing(cgroups: Path) -> None:
    lay(cgroups, max=200 * GIB, current=0, stat="inactive_file 0")
    assert free(cgroups, "0::/") == MACHINE


def test_beyond_the_limit_nothing_is_free(cgroups: Path) -> None:
    lay(cgroups, max=8 * GIB, current=9 * GIB, stat="inactive_file 0")
    assert free(cgroups, "0::/") == 0


def test_without_cgroups_it_is_the_machines(cgroups: Path, tmp_path: Path) -> None:
    assert free_ram(cgroups, tmp_path / "none") == MACHINE
    assert free(cgroups, "0::/") == MACHINE


def test_engines_on_a_cpu_are_planned_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiers.hardware.free_ram", lambda: 3 * GIB)
    assert Machine.here("cpu").ram == 3 * GIB
