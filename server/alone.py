"""What two processes must not do at once in one folder. Knows locks; knows nothing of what is done."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiers.errors import AssayError


@contextmanager
def alone(folder: Path, occupied: AssayError, unwritable: type[AssayError]) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back when the process ends, however it does.

    Args:
        folder: made if need be.
        occupied: raised if another process holds it.
        unwritable: raised, with a sentence, if there can be no lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(f"{folder} cannot be written ({error.strerror}): set `home`.") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise occupied from None
        yield
    finally:
        os.close(file)
