"""Ties a process tree to the life of whoever started it.

usage: python -m server.launch.tether GRACE_SECONDS[:ORPHANED_SECONDS] COMMAND...

Runs COMMAND and ends with its exit code. When standard input closes (the starter is gone, however it died) or
SIGTERM comes, COMMAND gets SIGTERM and GRACE_SECONDS to end, or ORPHANED_SECONDS when it is the starter that is
gone. In every case, nothing that COMMAND started is left when this process ends, nor the sockets by which the
processes of a vLLM talk to each other, which would stay in the temporary folder by the thousand. Uses the standard
library and psutil only: it must start at once.

COMMAND may be a tether itself. It then learns of this one's end, even of one by SIGKILL, as this one of its
starter's, by its standard input.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

POLL_S = 0.1
PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h: orphans of the tree become children of this process instead of init's."""
SOCKETS = "VLLM_RPC_BASE_PATH"
"""Names the folder of vLLM's sockets; by default they are in the temporary one."""
LONGEST_FOLDER = 107 - len("/") - len(str(uuid.UUID(int=0)))
"""From linux/un.h: a socket's path has 107 characters. vLLM names each by a UUID."""


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    asked, _, orphaned = arguments[0].partition(":")
    command = arguments[1:]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A list, not an Event: a signal handler that takes a lock which the main thread holds never returns.
    released: list[float] = []
    """With how long it may take."""
    signal.signal(signal.SIGTERM, lambda number, frame: released.append(float(asked)))
    threading.Thread(target=_wait_for_end_of_input, args=(released, float(orphaned or asked)), daemon=True).start()
    # A pipe that nobody writes to, and that ends with this process.
    with _sockets() as environment:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | environment)
        while child.poll() is None and not released:
            time.sleep(POLL_S)
        code = child.returncode if child.returncode is not None else _end(child, released[0])
        _kill_what_is_left()
    return code if code >= 0 else 128 - code


@contextmanager
def _sockets() -> Iterator[dict[str, str]]:
    """What names a folder of its own for the sockets, which ends with this process."""
    with tempfile.TemporaryDirectory(
        prefix="assay-", dir=os.environ.get(SOCKETS), ignore_cleanup_errors=True
    ) as own:
        yield {SOCKETS: own} if len(own) <= LONGEST_FOLDER else {}


def _wait_for_end_of_input(released: list[float], grace: float) -> None:
    while os.read(0, 1024):
        pass
    released.append(grace)


def _end(child: subprocess.Popen[bytes], grace: float) -> int:
    child.terminate()
    try:
        return child.wait(grace)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _kill_what_is_left() -> None:
    # A killed process's children come to us only after its death: look again until nobody is left.
    while left := psutil.Process().children(recursive=True):
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
