"""A file is all of what was there, or all of what is now."""

import os
import stat
from pathlib import Path

import pytest

from tiers.files import write_whole


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_no_name_stands_for_what_is_not_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    write_whole(path, b"first")
    kept: list[bytes] = []

    def lost(descriptor: int) -> None:
        kept.append(path.read_bytes())
        raise OSError("the power is gone")

    monkeypatch.setattr(os, "fsync", lost)
    with pytest.raises(OSError, match="the power is gone"):
        write_whole(path, b"second")
    assert kept == [b"first"]
    assert [each.name for each in tmp_path.iterdir()] == ["a.npz"], "a draft is left"


def test_its_name_is_on_the_disk_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write_whole(tmp_path / "a", b"whole")
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


def test_what_is_private_never_was_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "open", b"")
        seen: list[int] = []
        monkeypatch.setattr(
            os, "fsync", lambda descriptor: seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        )
        write_whole(tmp_path / "private", b"", 0o600)
    finally:
        os.umask(before)
    assert (mode_of(tmp_path / "open"), mode_of(tmp_path / "private"), stat.S_IMODE(seen[0])) == (
        0o644,
        0o600,
        0o600,
    )
