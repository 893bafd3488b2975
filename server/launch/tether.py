"""Ties a process tree to the life of whoever started it.

usage: python -m server.launch.tether GRACE_SECONDS[:ORPHANED_SECONDS] COMMAND...

Runs COMMAND and ends with its exit code. When standard input closes (the starter is gone, however it died) or
SIGTERM comes, COMMAND gets SIGTERM and GRACE_SECONDS to end, or ORPHANED_SECONDS when it is the starter that is
gone. In every case, nothing that COMMAND started is left when this process ends. Uses the standard library and
psutil only: it must start at once.

COMMAND may be a tether itself. It then learns of this one's end, even of one by SIGKILL, as this one of its
starter's, by its standard input.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import psutil

POLL_S = 0.1
PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h: orphans of the tree become children of this process instead of init's."""


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
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    while child.poll() is None and not released:
        time.sleep(POLL_S)
    code = child.returncode if child.returncode is not None else _end(child, released[0])
    _kill_what_is_left()
    return code if code >= 0 else 128 - code


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
