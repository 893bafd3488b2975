"""A process tree on this machine, tied to the gateway's life. Knows commands and logs; knows nothing of HTTP."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

GRACE_S = 10.0
"""Between SIGTERM and SIGKILL; an engine has nothing to save."""
TETHER_GRACE_S = 5.0
"""What its tether may take beyond that; it is killed too if somebody has stopped it (SIGSTOP)."""


def tethered(command: Sequence[str], orphaned_s: float | None = None) -> list[str]:
    """The command that runs ``command`` and lets nothing of it outlive whoever started it.

    Args:
        command: what to run.
        orphaned_s: how long it may take to end when its starter is gone; as when it is told to by default.
    """
    grace = f"{GRACE_S}" if orphaned_s is None else f"{GRACE_S}:{orphaned_s}"
    # Not from the working directory, which may hold a `server` of its own.
    return [sys.executable, "-P", "-m", "server.launch.tether", grace, *command]


def free_port(host: str = "127.0.0.1") -> int:
    """A port of that address, loopback by default, that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


class LocalProcess:
    """A command and everything it starts, in a session of its own: a terminal's Ctrl-C does not reach it."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self.log = log

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: dict[str, str], log: Path, *, pipe_output: bool = False
    ) -> "LocalProcess":
        """Start ``command`` with its output in ``log``; with ``pipe_output``, standard output in `output`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            log.replace(log.with_suffix(".previous.log"))
        # Appended to, so that it can be cut off while it is written (logrotate's copytruncate) and leaves no hole.
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *tethered(command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE if pipe_output else output,
                stderr=output,
                env=os.environ | environment,
                start_new_session=True,
            )
        return cls(process, log)

    @property
    def output(self) -> asyncio.StreamReader:
        """Standard output, if it was piped."""
        assert self._process.stdout is not None, "started without pipe_output"
        return self._process.stdout

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait until the whole tree has ended."""
        return await self._process.wait()

    async def stop(self) -> None:
        """End the whole tree; returns when nothing of it is left. Safe to call again."""
        if self._process.returncode is None:
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), GRACE_S + TETHER_GRACE_S)
        # The tether has left nothing, unless somebody killed or stopped the tether.
        while self._kill_group():
            await asyncio.sleep(0.05)
        await self._process.wait()

    def _kill_group(self) -> bool:
        """Kill whoever is left of the process group that the tether led; False once nobody lives."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return False
        return any(self._is_alive_member(process) for process in psutil.process_iter())

    def _is_alive_member(self, process: psutil.Process) -> bool:
        # A dead process whose new parent does not collect it stays in the group: it is no reason to wait.
        try:
            return os.getpgid(process.pid) == self._process.pid and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    def last_line(self) -> str:
        """The last thing it logged, for people who wait."""
        lines = self.tail().splitlines()
        return lines[-1] if lines else ""

    def tail(self, size: int = 4096) -> str:
        """The end of the log."""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace").strip()
