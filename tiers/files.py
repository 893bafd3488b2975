"""Files that are whole or not there, whoever reads them meanwhile and whenever the power goes."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes, mode: int = 0o666, *, keep_owner: bool = False) -> None:
    """Put it in place of what is there, once all of it is on the disk. Several may do so at once; one stays.

    Args:
        path: in a folder that is there.
        content: all of it.
        mode: who may read and write it, less what the umask takes.
        keep_owner: whether the file stays whose it is, as root can have it.

    Raises:
        OSError: it could not be written; what was there still is, and nothing else.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            if keep_owner and path.exists() and (owner := path.stat()).st_uid != os.geteuid():
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # or its entry could be lost, and the old file be back
    finally:
        os.close(folder)
