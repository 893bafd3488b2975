"""A manifest holds a checkpoint to its word."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tiers.errors import CheckpointError
from tiers.manifest import Manifest, OutdatedManifest, describe_files
from tiers.precision import int4
from tiers.source import Source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "config.json").write_text("{}")
    make(tmp_path).write(tmp_path)
    return tmp_path


def make(folder: Path) -> Manifest:
    return Manifest(
        model="M",
        recipe="w4a16-gptq",
        recipe_text="text",
        precision=int4(64),
        seed=1,
        bits_per_weight=4.25,
        source=Source.parse("./m"),
        provenance="p",
        versions={"torch": "1"},
        created=datetime.now(UTC),
        files=describe_files(folder),
    )


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[1000] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def cut_short(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"short")


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def slip_in(folder: Path) -> None:
    (folder / "model-2.safetensors").write_bytes(b"more")


def test_what_was_written_is_read_and_holds(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest == make(folder).model_copy(update={"created": manifest.created})
    manifest.verify(folder)


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, remove, slip_in], ids=lambda f: f.__name__)
def test_any_damage_is_named(folder: Path, damage: Callable[[Path], None]) -> None:
    manifest = Manifest.read(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=r"model(-2)?\.safetensors"):
        manifest.verify(folder)


def test_verifying_can_be_ended(folder: Path) -> None:
    def stop(name: str) -> None:
        raise InterruptedError(name)

    with pytest.raises(InterruptedError):
        Manifest.read(folder).verify(folder, stop)


def test_the_digest_is_of_the_files_alone(folder: Path) -> None:
    first = make(folder)
    assert make(folder).digest == first.digest
    flip_a_byte(folder)
    assert make(folder).digest != first.digest


def test_no_manifest_means_not_finished(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        Manifest.read(tmp_path)


def test_a_manifest_of_an_earlier_format_is_told_apart(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "model": "M"}')
    with pytest.raises(OutdatedManifest, match="an earlier version"):
        Manifest.read(folder)


def test_a_damaged_manifest_is_a_sentence(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        Manifest.read(folder)
