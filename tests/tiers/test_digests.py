"""A digest is remembered exactly as long as the file is untouched."""

import os
from pathlib import Path

import pytest

from tiers.digests import DigestCache, sha256_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was really read."""
    seen: list[Path] = []

    def read(path: Path, *rest: object) -> str:
        seen.append(path)
        return sha256_of(path)

    monkeypatch.setattr("tiers.digests.sha256_of", read)
    monkeypatch.setattr("tiers.digests._SETTLED_S", -1)
    return seen


def test_an_untouched_file_is_read_once_even_by_the_next_process(file: Path, reads: list[Path]) -> None:
    known = file.with_name("known.json")
    digests = {DigestCache(known).sha256(file) for _ in range(3)}
    assert digests == {sha256_of(file)}
    assert len(reads) == 1


def test_a_byte_flipped_with_size_and_time_put_back_is_seen(file: Path, reads: list[Path]) -> None:
    cache = DigestCache(file.with_name("known.json"))
    before = cache.sha256(file)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    with file.open("r+b") as handle:
        handle.write(b"b")
    os.utime(file, ns=times)
    assert cache.sha256(file) == sha256_of(file) != before


def test_a_file_just_written_is_not_remembered(file: Path) -> None:
    """It could be written again within one tick of the clock."""
    known = file.with_name("known.json")
    DigestCache(known).sha256(file)
    assert not known.exists()


@pytest.mark.parametrize("content", [b"", b"{", b'{"x": 1}'])
def test_a_damaged_memory_is_only_slower(file: Path, content: bytes, reads: list[Path]) -> None:
    known = file.with_name("known.json")
    known.write_bytes(content)
    assert DigestCache(known).sha256(file) == sha256_of(file)
    assert len(reads) == 1


def test_a_folder_that_cannot_be_written_is_only_slower(file: Path, reads: list[Path]) -> None:
    cache = DigestCache(file.parent / "none" / "known.json")
    assert cache.sha256(file) == sha256_of(file)
