"""A real redis-server on a Unix socket, which keeps nothing, for tests that need one."""

import contextlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.programs import program


class RedisServer:
    """One that can be killed, started again and made to hang."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._program = program("redis-server")
        self._folder = folder
        self._options = options
        self._socket = folder / "redis.sock"
        self.url = f"unix://{self._socket}?db=0"
        self.start()

    def start(self) -> None:
        """Begin with nothing counted."""
        command = [self._program, "--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder)]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--save", "", "--appendonly", "no", *self._options], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(redis.ConnectionError), self.ask() as client:
                with contextlib.suppress(redis.AuthenticationError):
                    client.ping()
                return
            assert time.monotonic() < deadline, (self._folder / "redis.log").read_text()
            time.sleep(0.01)

    def ask(self) -> Any:
        """A client of the test's own."""
        return redis.Redis(unix_socket_path=str(self._socket), retry=Retry(NoBackoff(), 0))

    def scripts_run(self) -> int:
        """How many times gateways have asked it something."""
        with self.ask() as client:
            stats = client.info("commandstats")
        return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))

    def kill(self) -> None:
        """End it as a power cut does."""
        self._process.kill()
        self._process.wait()

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Have it accept and not answer."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """One for a block."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:  # a socket's path may not be long
        server = RedisServer(Path(folder), *options)
        try:
            yield server
        finally:
            server.kill()
