"""SHA-256 of files, remembered as long as a file is untouched: 800 GB need not be read again at every start."""

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from tiers.files import write_whole

_BLOCK = 1 << 22
_SETTLED_S = 2.0
"""A file changed more recently than this may change again within one tick of its file system's clock."""


class Stamp(NamedTuple):
    """What of a file changes when anybody writes to it; ``ctime_ns`` cannot be set back by a program."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The file's stamp now, through symbolic links."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class DigestCache:
    """Digests by absolute path and stamp, in one JSON file; without that file everything is only slower."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[Stamp, str]] = {}
        with contextlib.suppress(OSError, msgspec.DecodeError):
            self._known = msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[Stamp, str]])

    def sha256(self, path: Path, on_block: Callable[[], None] = lambda: None) -> str:
        """The digest of a file as hex, read again only if the file was touched since; see `sha256_of`."""
        key, before = str(path.absolute()), Stamp.of(path)
        stamp, digest = self._known.get(key, (None, ""))
        if stamp == before:
            on_block()
            return digest
        digest = sha256_of(path, on_block)
        settled = time.time_ns() - max(before.mtime_ns, before.ctime_ns) > _SETTLED_S * 1e9
        if settled and Stamp.of(path) == before:
            self._known[key] = (before, digest)
            self._save()
        return digest

    def _save(self) -> None:
        with contextlib.suppress(OSError):
            write_whole(self._path, msgspec.json.encode(self._known))


def sha256_of(path: Path, on_block: Callable[[], None] = lambda: None) -> str:
    """The SHA-256 of a file, as hex; whatever ``on_block`` raises ends it early."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            on_block()
            digest.update(block)
    return digest.hexdigest()
