"""How much memory may still be taken here: the machine's, or what the cgroup leaves. Knows nothing of what for."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_ram(cgroups: Path = _CGROUPS, own: Path = _OWN) -> int:
    """Bytes that this process and its children can take.

    The machine's are not all a container's: beyond its limit the kernel ends it without a word. Files that nobody
    has read lately are given back before that, and count as free.

    Args:
        cgroups: where the kernel shows them.
        own: where it says which this process is in.
    """
    return max(0, min([psutil.virtual_memory().available, *_left(cgroups, own)]))


def _left(cgroups: Path, own: Path) -> Iterator[int]:
    """What each cgroup leaves that has a limit: a limit may be on one that another is in."""
    for folder in _folders(cgroups, own):
        if (limit := _read(folder / "memory.max")) is not None:
            yield limit - (_read(folder / "memory.current") or 0) + _idle(folder, "inactive_file")
        if (limit := _read(folder / "memory.limit_in_bytes")) is not None:
            yield limit - (_read(folder / "memory.usage_in_bytes") or 0) + _idle(folder, "total_inactive_file")


def _folders(cgroups: Path, own: Path) -> Iterator[Path]:
    """Of this process's cgroup, in version 2 and in version 1 for memory, and of all that it is in.

    In a container the mount may begin at its own cgroup, and the path be that of the whole machine: what of it is
    not there has no limit either, and those of the mount itself count.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            for mount in (cgroups / "memory",) if controllers else (cgroups, cgroups / "unified"):
                parts = [part for part in path.split("/") if part not in {"", ".."}]
                yield from (mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1))


def _read(file: Path) -> int | None:
    """A number of bytes; None where there is none, or no limit."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _idle(folder: Path, name: str) -> int:
    """Bytes of files that are in memory and were not used lately."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    figures = dict(line.split(maxsplit=1) for line in lines if line)
    return int(figures.get(name, 0))
