"""A checkpoint's birth certificate: what it was made from, how, with which versions, and every file's digest."""

import hashlib
import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tiers.digests import sha256_of
from tiers.errors import CheckpointError
from tiers.precision import Precision
from tiers.source import Source

MANIFEST_NAME = "manifest.json"
FORMAT = 2
SHORT_DIGEST = 12
"""Hex digits of a checkpoint digest that headers and tables show: 48 bits tell any two checkpoints apart."""


class OutdatedManifest(CheckpointError):
    """The manifest is of an earlier format; what it speaks of must be built again."""


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    size: int


class Calibration(BaseModel):
    """The text a recipe was calibrated on."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    conversations: int
    tokens: int
    seed: int


class Manifest(BaseModel):
    """Everything that is known of a checkpoint. Written last: a checkpoint without one is not finished."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    model: str
    recipe: str
    recipe_text: str
    precision: Precision
    source: Source
    provenance: str
    """One sentence a person reads: what these weights are, and what they are not."""
    revision: str | None = None
    """The commit of a hub model that was downloaded."""
    reference: str | None = None
    """The digest of the reference checkpoint a quantized one was made from."""
    calibration: Calibration | None = None
    seed: int
    """What every random generator of the build began with."""
    bits_per_weight: float
    """Of the linear layers in the blocks: every byte that stands for them, scales and zero points too."""
    versions: dict[str, str]
    created: datetime
    files: dict[str, FileEntry]

    @property
    def digest(self) -> str:
        """SHA-256 over the names, sizes and digests of all files: two equal ones are the same checkpoint."""
        entries = {name: [entry.size, entry.sha256] for name, entry in sorted(self.files.items())}
        return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()

    @property
    def short_digest(self) -> str:
        """The first digits of `digest`, for headers and tables."""
        return self.digest[:SHORT_DIGEST]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files.values())

    def write(self, folder: Path) -> None:
        """Put the manifest beside the files it speaks of."""
        (folder / MANIFEST_NAME).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of the checkpoint in ``folder``.

        Raises:
            OutdatedManifest: it was written by an earlier version of Assay.
            CheckpointError: there is none, or it cannot be read.
        """
        path = folder / MANIFEST_NAME
        try:
            text = path.read_bytes()
            if _format_of(text) < FORMAT:
                raise OutdatedManifest(f"{path} was written by an earlier version: run `assay build`.")
            return cls.model_validate_json(text)
        except FileNotFoundError:
            raise CheckpointError(
                f"There is no finished checkpoint in {folder} (no {MANIFEST_NAME}): run `assay build`."
            ) from None
        except ValidationError as error:
            raise CheckpointError(
                f"{path} is damaged ({error.error_count()} fields are wrong): run `assay build --rebuild`."
            ) from error

    def verify(
        self,
        folder: Path,
        on_file: Callable[[str], None] = lambda name: None,
        digest_of: Callable[[Path, Callable[[], None]], str] = sha256_of,
    ) -> None:
        """Hold every file against its entry: presence and size of all first, then the digests.

        ``on_file`` is called often, with the name of the file at hand; what it raises ends the work. ``digest_of``
        may be a cache's.

        Raises:
            CheckpointError: names the first file that is missing, extra, or not what it was.
        """
        remedy = "run `assay build --rebuild` for this tier, or put the original file back."
        for name, entry in self.files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: {remedy}")
            if path.stat().st_size != entry.size:
                raise CheckpointError(
                    f"{path} has {path.stat().st_size} bytes where the manifest says {entry.size}: {remedy}"
                )
        extra = sorted(files_of(folder) - set(self.files))
        if extra:
            raise CheckpointError(f"{folder / extra[0]} is not in the manifest: remove it, or {remedy}")
        for name, entry in self.files.items():
            if digest_of(folder / name, partial(on_file, name)) != entry.sha256:
                raise CheckpointError(f"{folder / name} is damaged, its digest has changed: {remedy}")


def files_of(folder: Path) -> set[str]:
    """The names, relative to ``folder``, of every file that belongs into a manifest."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        # The hub's client keeps its notes on a download in .cache; they are no part of the model.
        if path.is_file() and path.name != MANIFEST_NAME and ".cache" not in path.relative_to(folder).parts
    }


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """An entry for every file in ``folder``."""
    paths = {name: folder / name for name in sorted(files_of(folder))}
    return {name: FileEntry(sha256=sha256_of(path), size=path.stat().st_size) for name, path in paths.items()}


def _format_of(text: bytes) -> int:
    """The manifest's format; the present one for what is no manifest at all, which is another error."""
    try:
        return int(json.loads(text)["format"])
    except (ValueError, KeyError, TypeError):
        return FORMAT
