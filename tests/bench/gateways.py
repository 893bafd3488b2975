"""The gateways that are measured: how each is installed, started, asked how it fares, and ended."""

import hashlib
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import psutil
import yaml

from server.keys import KeyFile
from server.launch.process import free_port
from tests.bench.answers import WrongAnswer
from tests.bench.load import ROOT, Load, Order
from tests.bench.machine import first_core, other_cores
from tests.bench.upstream import MODEL

ENVIRONMENT = ROOT / ".venv-bench"
START_S = 120.0
INSTALL_S = 1200.0
LITELLM_KEY = "sk-bench"


class NotMeasured(Exception):
    """A gateway could not be installed or started, or answered wrongly: one sentence of why."""


class Gateway(ABC):
    """One process tree that answers chat completions; a context in which it runs."""

    name: ClassVar[str]
    switched_on: ClassVar[str]
    """What it does with each request besides passing it on."""
    pins: ClassVar[tuple[str, ...]] = ()
    """What pip installs for it into the bench environment."""

    def __init__(self, upstream: str, folder: Path) -> None:
        self.upstream = upstream
        self.folder = folder / self.name
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def version(self) -> str:
        """What is measured, exactly."""
        return ", ".join(self.pins) or self.name

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """What it asks of its callers."""
        return {}

    @property
    def environment(self) -> dict[str, str]:
        """Added to the environment of its process."""
        return {}

    @property
    def cores(self) -> list[int]:
        """One that is all its own, for a process that others push aside costs more."""
        return first_core()

    @abstractmethod
    def command(self) -> list[str]:
        """What starts it."""

    def install(self, say: Callable[[str], None]) -> None:
        """Make sure that it can be started.

        Raises:
            NotMeasured: it cannot be had.
        """
        if not self.pins:
            return
        stamp = ENVIRONMENT / f".installed-{self.name}"
        wanted = hashlib.sha256("\n".join(self.pins).encode()).hexdigest()
        if stamp.exists() and stamp.read_text() == wanted:
            return
        if not (ENVIRONMENT / "bin" / "pip").exists():
            _run([sys.executable, "-m", "venv", str(ENVIRONMENT)])
        say("installing " + ", ".join(self.pins))
        _run([str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", *self.pins])
        stamp.write_text(wanted)

    def start(self, say: Callable[[str], None]) -> None:
        """Start it, and wait until it answers rightly.

        Raises:
            NotMeasured: it ended, or did not answer in time.
        """
        self.folder.mkdir(parents=True)
        log = self.folder / "log"
        inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command(),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=inherited | self.environment,
                start_new_session=True,
            )
        psutil.Process(self._process.pid).cpu_affinity(self.cores)
        say("starting")
        began, problem = time.monotonic(), ""
        while time.monotonic() - began < START_S:
            if self._process.poll() is not None:
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                raise NotMeasured(f"it ended while starting: {(lines or ['it wrote nothing'])[-1]}")
            try:
                with Load(self.order(connections=1, kinds=("whole", "stream"), requests=1)) as load:
                    load.run()
            except WrongAnswer as error:
                problem = str(error)
                say(problem)
                time.sleep(0.5)
            else:
                return
        raise NotMeasured(f"it gave no right answer within {START_S:.0f} s: {problem}")

    def order(self, **what: object) -> Order:
        """An order for a `Load` of this gateway."""
        return Order(url=self.url, headers=self.headers, **what)  # type: ignore[arg-type]

    @property
    def is_running(self) -> bool:
        """Whether there is anything to measure."""
        return self._process is not None and self._process.poll() is None

    def tree(self) -> list[psutil.Process]:
        """Its processes."""
        assert self._process is not None
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def cpu_s(self) -> float:
        """CPU time of its processes since they began, user and system, in seconds."""
        return sum(time.clock_gettime(_cpu_clock(process.pid)) for process in self.tree())

    def rss_mb(self) -> float:
        """Memory of its processes."""
        return sum(process.memory_info().rss for process in self.tree()) / 1e6

    def stop(self) -> None:
        """End it and all that it started."""
        if self._process is None or not self.is_running:
            return
        tree = self.tree()
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=10)
        self._process.wait()


def _cpu_clock(pid: int) -> int:
    """The clock of a process's CPU time in nanoseconds, ended threads included: clock_getcpuclockid(3)."""
    return ~pid << 3 | 2


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotMeasured(f"it could not be installed: {(errors or done.stderr.splitlines() or ['?'])[-1][:300]}")


class Direct(Gateway):
    """No gateway: what the upstream itself costs, and the latency that nothing can be under."""

    name = "upstream alone"
    switched_on = "nothing between"

    def __init__(self, folder: Path) -> None:
        super().__init__("", folder)

    @property
    def cores(self) -> list[int]:
        """Those of whoever asks: it answers for every gateway, and must take nothing from any."""
        return other_cores()

    def command(self) -> list[str]:
        """Our own module."""
        return [sys.executable, "-m", "tests.bench.upstream", "--port", str(self.port)]


class Ours(Gateway):
    """This repository's."""

    name = "assay"
    switched_on = "one key with its limits, queue, time limits, metrics, usage counted"

    @cached_property
    def headers(self) -> dict[str, str]:
        """With the one key there is, which has every limit."""
        most = 1 << 40
        key = KeyFile(self.folder / "keys.json").add(
            "bench", requests_per_minute=most, tokens_per_minute=most, concurrent_requests=most
        )
        return {"authorization": f"Bearer {key}"}

    def command(self) -> list[str]:
        """The application of `assay serve`, which starts no engine."""
        assert self.headers, "the key is made before the server looks"
        options = {"--upstream": self.upstream, "--port": str(self.port), "--home": str(self.folder)}
        return [sys.executable, "-m", "tests.bench.ours", *(each for pair in options.items() for each in pair)]


class VllmRouter(Gateway):
    """vLLM's own router, in Rust."""

    name = "vllm-router"
    switched_on = "metrics; round robin, its cheapest policy; it knows no keys of callers"
    pins = ("vllm-router==0.1.17",)

    def command(self) -> list[str]:
        """Its console script."""
        options = {
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--worker-urls": self.upstream,
            "--policy": "round_robin",
            "--prometheus-host": "127.0.0.1",
            "--prometheus-port": str(free_port()),
            "--worker-startup-check-interval": "1",
            "--log-level": "warning",
        }
        script = str(ENVIRONMENT / "bin" / "vllm-router")
        return [script, *(each for pair in options.items() for each in pair)]


class LiteLLM(Gateway):
    """LiteLLM's proxy, in Python."""

    name = "litellm"
    switched_on = "one key; no database, no metrics, one worker"
    pins = ("litellm[proxy]==1.102.4",)

    @property
    def headers(self) -> dict[str, str]:
        """With the master key."""
        return {"authorization": f"Bearer {LITELLM_KEY}"}

    @property
    def environment(self) -> dict[str, str]:
        """Nothing is asked of the network, and nothing is logged that is no error."""
        return {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
            "LITELLM_LOG": "ERROR",
            "LITELLM_MODE": "PRODUCTION",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def command(self) -> list[str]:
        """Its console script, with one model and one key."""
        params = {"model": f"openai/{MODEL}", "api_base": f"{self.upstream}/v1", "api_key": "unused"}
        config = {
            "model_list": [{"model_name": MODEL, "litellm_params": params}],
            "litellm_settings": {"telemetry": False},
            "general_settings": {"master_key": LITELLM_KEY},
        }
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        options = {"--config": str(file), "--host": "127.0.0.1", "--port": str(self.port), "--num_workers": "1"}
        script = str(ENVIRONMENT / "bin" / "litellm")
        return [script, *(each for pair in options.items() for each in pair)]
