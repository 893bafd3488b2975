"""One running vLLM server: started, asked, ended. Knows its routes; knows nothing of tiers or callers."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import TypeAdapter, ValidationError

from server.engines.address import Address
from server.engines.failures import EngineNotStarted, KeyRefused, NoProbe
from server.engines.resolution import OnlyThere
from server.engines.upstream import IDLE_S, Upstream, tls_for
from server.launch.launch import Launched, Process
from server.measuring.measurable import ANSWER_TIMEOUT_S, POLL_S, Measurable
from tiers.errors import AssayError
from tiers.probe.reading import (
    CHECKPOINT_ROUTE,
    DRAIN_ROUTE,
    DRAINING,
    OWN,
    READING_ROUTE,
    READY_ROUTE,
    SLEEP_ROUTE,
    VERIFYING,
    WAKE_ROUTE,
    CheckpointReading,
    EngineReading,
)

HEALTH_TIMEOUT_S = 5.0
REACH_TIMEOUT_S = 3.0
"""For a connection, which the kernel makes however busy an engine is: only a machine that is gone makes none."""

log = logging.getLogger("assay.engine")

_READINGS = TypeAdapter(list[EngineReading])
_WORK = (b"vllm:prompt_tokens_total", b"vllm:generation_tokens_total", b"vllm:kv_cache_usage_perc")
"""What moves in vLLM's metrics with every step of an engine: when a prompt is done, with each token, and with each
piece of a prompt."""


class Engine(Measurable):
    """A vLLM server that answers to the holder of its key."""

    def __init__(
        self,
        name: str,
        url: str,
        key: str,
        process: Process | None,
        *,
        address: str | None = None,
        gives_way: bool = False,
    ) -> None:
        self.name = name
        self.url = url
        self._key = key
        self.process = process
        self.gives_way = gives_way
        self.drains = False
        """Whether it has said that it is about to end: it answers what it has, and takes no more."""
        self._written_down: tuple[Address, Path] | None = None
        self.upstream = Upstream(url, key, address)
        """The way for callers' requests; what an engine is asked about itself goes by the session."""
        resolver = OnlyThere(address) if address else None
        self._session = aiohttp.ClientSession(
            url,
            headers={"authorization": f"Bearer {key}"},
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=IDLE_S, resolver=resolver, ssl=tls_for(url) or True
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        )

    @classmethod
    def of(cls, name: str, launched: Launched) -> "Engine":
        """What was launched; it need not answer yet. Whoever holds this has its processes to end."""
        return cls(name, launched.url, launched.key, launched.process, address=launched.address)

    def write_down(self, checkpoint: str, file: Path) -> None:
        """Have it be known how it is reached, until it ends.

        Args:
            checkpoint: the digest of the manifest that it is loaded by.
            file: for whom it is, who measures it.

        Raises:
            EngineNotStarted: the file cannot be written.
        """
        address = Address(url=self.url, key=self._key, checkpoint=checkpoint)
        try:
            address.write(file)
        except OSError as error:
            raise self._problem(f"how it is reached cannot be written to {file} ({error.strerror})") from error
        self._written_down = (address, file)

    async def until_it_answers(self, say: Callable[[str], None], timeout_s: float) -> str:
        """Wait until the model is loaded; the version of vLLM.

        Raises:
            EngineNotStarted: it ended before, was not ready in time, or is somebody else's and takes another key.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._version(say)
        except TimeoutError:
            raise self._problem(f"the engine was not ready after {timeout_s:.0f} s (start_timeout_s)") from None

    async def _version(self, say: Callable[[str], None]) -> str:
        while True:
            if self.process is not None:
                if self.process.exit_code is not None:
                    raise self._problem(f"the engine ended while starting ({_reason(self.process.tail())})")
                say(self.process.last_line().rpartition("] ")[2].strip())
            if (version := await self._asked_version()) is not None:
                return version
            await asyncio.sleep(POLL_S)

    async def _asked_version(self) -> str | None:
        try:
            return await self.version()
        except KeyRefused:
            if self.process is None:
                raise
            return None  # ours is not up yet, and something else has answered in its place

    async def version(self) -> str | None:
        """Of vLLM; None while it does not answer.

        Raises:
            KeyRefused: it does, and not to this key.
        """
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError, KeyError):
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
            async with self._session.get("/version", timeout=timeout) as answer:
                if answer.status == HTTPStatus.UNAUTHORIZED:
                    raise KeyRefused(self.name, self.url)
                if answer.status == HTTPStatus.OK:
                    return str((await answer.json())["version"])
        return None

    async def readings(self) -> list[EngineReading]:
        """What each worker says that it computes.

        Raises:
            EngineNotStarted: it does not say, or not so that it can be understood.
        """
        answer = await self.ask("GET", READING_ROUTE, "what it computes")
        try:
            return _READINGS.validate_json(answer)
        except ValidationError as error:
            raise self._problem(
                f"the engine's account of what it computes is not understood ({error!r:.300})"
            ) from error

    async def checkpoint(self) -> CheckpointReading:
        """The manifest and the config.json of what it runs.

        Raises:
            EngineNotStarted: it does not say, or not so that it can be understood.
        """
        answer = await self.ask("GET", CHECKPOINT_ROUTE, "what it runs")
        try:
            return CheckpointReading.model_validate_json(answer)
        except ValidationError as error:
            raise self._problem(
                f"the engine's account of its checkpoint is not understood ({error!r:.300})"
            ) from error

    async def drain(self) -> int:
        """Have it take no further request; how many it still works on.

        Raises:
            EngineNotStarted: it is gone.
        """
        return int(await self.ask("POST", DRAIN_ROUTE, "being drained", timeout_s=HEALTH_TIMEOUT_S))

    async def say_ready(self) -> None:
        """Have it be well from now on for orchestrators, which a vLLM of `assay engine` is not before.

        Raises:
            EngineNotStarted: it is gone.
        """
        await self.ask("POST", READY_ROUTE, "being ready", timeout_s=HEALTH_TIMEOUT_S)

    async def warm_up(self, model: str) -> None:
        """Two short requests: the first ones pay for memory, kernels and grammars, which no caller should.

        Raises:
            EngineNotStarted: it does not answer it.
        """
        body = {"model": model, "prompt": "Hello", "max_tokens": 8, "logprobs": 1}
        await self.ask("POST", "/v1/completions", "the warm-up request", body)
        choice = body | {"structured_outputs": {"choice": ["yes", "no"]}}
        await self.ask("POST", "/v1/completions", "the warm-up request with a grammar", choice)

    async def one_token(self, model: str) -> int:
        """The status of the answer to the shortest of requests, however long it takes.

        Raises:
            aiohttp.ClientError: nobody is there, or nobody any more.
        """
        body = {"model": model, "prompt": "Hello", "max_tokens": 1}
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.post("/v1/completions", json=body, timeout=timeout) as answer:
            await answer.read()
            return answer.status

    async def work_done(self, timeout_s: float) -> tuple[bytes, ...]:
        """What vLLM has counted of its work; where two are unequal it worked between. Empty if it does not say."""
        return tuple(line for line in await self._metrics(timeout_s) if line.startswith(_WORK))

    async def sleep(self) -> None:
        """Give the GPU's memory back: weights go to RAM, the KV cache is dropped.

        Raises:
            EngineNotStarted: it cannot.
        """
        await self.ask("POST", SLEEP_ROUTE, "being sent to sleep")

    async def wake(self) -> None:
        """Take the memory again and put the weights back into it.

        Raises:
            EngineNotStarted: it cannot.
        """
        await self.ask("POST", WAKE_ROUTE, "being woken")

    async def is_alive(self) -> bool:
        """Ask it now; one that is too busy to answer is alive, as is one that drains or is verified by others."""
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S, sock_connect=REACH_TIMEOUT_S)
            async with self._session.get("/health", timeout=timeout) as answer:
                self.drains = DRAINING in answer.headers
                return self.drains or VERIFYING in answer.headers or answer.status == HTTPStatus.OK
        except aiohttp.ConnectionTimeoutError:
            return False
        except TimeoutError:
            return True
        except aiohttp.ClientError:
            return False

    async def stop(self) -> None:
        """End it; returns when nothing of it is left."""
        if self._written_down is not None:
            address, file = self._written_down
            try:
                address.take_away(file)
            except (OSError, AssayError) as error:  # which leaves no engine running
                log.warning("%s: what says how it was reached stays (%s)", self.name, error)
        self.upstream.close()
        await self._session.close()
        if self.process is not None:
            await self.process.stop()

    async def _metrics(self, timeout_s: float) -> list[bytes]:
        """What vLLM shows of itself, by lines; none if it does not answer."""
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            plain = {"accept-encoding": "identity"}
            async with self._session.get("/metrics", headers=plain, timeout=timeout) as answer:
                return (await answer.read()).splitlines()
        except (aiohttp.ClientError, TimeoutError):
            return []

    async def ask(
        self, method: str, route: str, what: str, body: Any = None, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> bytes:
        """The answer to what the engine is asked about itself.

        Args:
            method: of HTTP.
            route: where it answers.
            what: is asked, for people.
            body: as JSON.
            timeout_s: for all of it.

        Raises:
            EngineNotStarted: it gives none, or another than 200.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        own = {"x-request-id": f"{OWN}{secrets.token_hex(8)}"}
        try:
            async with self._session.request(method, route, json=body, headers=own, timeout=timeout) as answer:
                text = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._problem(f"the engine gives no answer to {what} ({error!r})") from error
        if answer.status == HTTPStatus.NOT_FOUND and route in (READING_ROUTE, CHECKPOINT_ROUTE):
            raise NoProbe(self.name, self.url)
        if answer.status != HTTPStatus.OK:
            raise self._problem(f"the engine fails at {what}: {text[:300].decode(errors='replace')}")
        return text

    def _problem(self, what: str) -> EngineNotStarted:
        its_log = f"; its log is {self.process.log}" if self.process else ""
        return EngineNotStarted(f"{self.name}: {what}{its_log}.")


def _reason(tail: str) -> str:
    """The line of a log that says most: the last that names an error, or else the last."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line and "Traceback" not in line]
    return (telling or lines or ["it wrote nothing"])[-1][-300:]
