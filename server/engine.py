"""One running vLLM server: started, asked, ended. Knows its routes; knows nothing of tiers or callers."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import TypeAdapter, ValidationError

from server.address import Address
from server.launch.local import LocalProcess
from server.upstream import IDLE_S, Upstream
from tiers.conformance.faults import FaultName, Planting
from tiers.conformance.pack import Answer
from tiers.conformance.prompts import Prompt
from tiers.conformance.sequence import Scored
from tiers.conformance.sequence import Sequence as Walk
from tiers.engine import EngineCommand
from tiers.errors import AssayError
from tiers.probe.reading import (
    CALLERS_ROUTE,
    FAULT_ROUTE,
    OWN,
    READING_ROUTE,
    SCORE_ROUTE,
    SLEEP_ROUTE,
    WAKE_ROUTE,
    EngineReading,
)

POLL_S = 0.5
ANSWER_TIMEOUT_S = 300.0
"""For what an engine is asked about itself, and for its first request."""
HEALTH_TIMEOUT_S = 5.0
WAITS_FOR_CALLERS_S = 10.0
"""How long, before each sequence, whoever measures an engine that serves lets its callers go first."""

_READINGS = TypeAdapter(list[EngineReading])
_WORK = (b"vllm:prompt_tokens_total", b"vllm:generation_tokens_total", b"vllm:kv_cache_usage_perc")
"""What moves in vLLM's metrics with every step of an engine: when a prompt is done, with each token, and with each
piece of a prompt."""


class EngineNotStarted(AssayError):
    """An engine ended, or was not ready in time, when it was to be started."""


class PrecisionRefused(AssayError):
    """What an engine computes is not what its checkpoint declares; trying again would not change that."""

    def __init__(self, name: str, disagreements: tuple[str, ...]) -> None:
        super().__init__(
            f"{name} is not served, its engine does not compute what its checkpoint declares: "
            f"{'; '.join(disagreements)}."
        )


class Engine:
    """A vLLM server that answers on a loopback port to the holder of its key."""

    def __init__(
        self, name: str, url: str, key: str, process: LocalProcess | None, *, gives_way: bool = False
    ) -> None:
        self.name = name
        self.process = process
        self._address_file: Path | None = None
        self._gives_way = gives_way
        self.upstream = Upstream(url, key)
        """The way for callers' requests; what an engine is asked about itself goes by the session."""
        self._session = aiohttp.ClientSession(
            url,
            headers={"authorization": f"Bearer {key}"},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        )

    @classmethod
    async def launch(
        cls, name: str, command: EngineCommand, log: Path, address_file: Path | None = None
    ) -> "Engine":
        """Start the server's processes; it does not answer yet. Where it will is written down until it ends."""
        process = await LocalProcess.start(command.arguments, command.environment, log)
        engine = cls(name, f"http://127.0.0.1:{command.port}", command.api_key, process)
        if address_file is not None:
            Address(url=f"http://127.0.0.1:{command.port}", key=command.api_key).write(address_file)
            engine._address_file = address_file
        return engine

    async def until_it_answers(self, say: Callable[[str], None], timeout_s: float) -> str:
        """Wait until the model is loaded; the version of vLLM.

        Raises:
            EngineNotStarted: it ended before, or was not ready in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._version(say)
        except TimeoutError:
            raise self._problem(f"the engine was not ready after {timeout_s:.0f} s (start_timeout_s)") from None

    async def _version(self, say: Callable[[str], None]) -> str:
        assert self.process is not None
        while True:
            if self.process.exit_code is not None:
                raise self._problem(f"the engine ended while starting ({_reason(self.process.tail())})")
            say(self.process.last_line().rpartition("] ")[2].strip())
            if (version := await self.version()) is not None:
                return version
            await asyncio.sleep(POLL_S)

    async def version(self) -> str | None:
        """Of vLLM; None while it does not answer, or not to this key."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
            async with self._session.get("/version", timeout=timeout) as answer:
                if answer.status == 200:
                    return str((await answer.json())["version"])
        return None

    async def readings(self) -> list[EngineReading]:
        """What each worker says that it computes.

        Raises:
            EngineNotStarted: it does not say, or not so that it can be understood.
        """
        answer = await self._ask("GET", READING_ROUTE, "what it computes")
        try:
            return _READINGS.validate_json(answer)
        except ValidationError as error:
            raise self._problem(
                f"the engine's account of what it computes is not understood ({error!r:.300})"
            ) from error

    async def warm_up(self, model: str) -> None:
        """Two short requests: the first ones pay for memory, kernels and grammars, which no caller should.

        Raises:
            EngineNotStarted: it does not answer it.
        """
        body = {"model": model, "prompt": "Hello", "max_tokens": 8, "logprobs": 1}
        await self._ask("POST", "/v1/completions", "the warm-up request", body)
        choice = body | {"structured_outputs": {"choice": ["yes", "no"]}}
        await self._ask("POST", "/v1/completions", "the warm-up request with a grammar", choice)

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

    async def callers(self) -> int:
        """How many requests it works on, or holds back, that measure nothing.

        Raises:
            EngineNotStarted: it does not tell.
        """
        return int(await self._ask("GET", CALLERS_ROUTE, "its callers"))

    async def walk(self, sequence: Walk) -> Scored:
        """Have it compute one sequence, and say how far its distributions are from the reference's.

        Raises:
            EngineNotStarted: it cannot, or is gone.
        """
        body = sequence.model_dump(mode="json")
        await self._until_callers_are_gone()
        return Scored.model_validate_json(await self._ask("POST", SCORE_ROUTE, "being measured", body))

    async def tokens(self, model: str, text: str) -> list[int]:
        """The tokens of a text, with what the tokenizer puts before it.

        Raises:
            EngineNotStarted: it does not tell.
        """
        said = json.loads(
            await self._ask("POST", "/tokenize", "a text's tokens", {"model": model, "prompt": text})
        )
        return [int(token) for token in said["tokens"]]

    async def text(self, model: str, tokens: Sequence[int]) -> str:
        """What these tokens say.

        Raises:
            EngineNotStarted: it does not tell.
        """
        said = await self._ask("POST", "/detokenize", "its tokens' text", {"model": model, "tokens": [*tokens]})
        return str(json.loads(said)["prompt"])

    async def answer(self, model: str, prompt: Prompt, *, tokens: int, greedy: bool, seed: int) -> Answer:
        """Its answer to one prompt, of at most so many tokens; greedy, or sampled with a seed.

        Raises:
            EngineNotStarted: it gives none.
        """
        body: dict[str, Any] = {
            "model": model,
            "messages": prompt.messages,
            "max_tokens": tokens,
            "temperature": 0 if greedy else 1,
            "seed": seed,
            "return_token_ids": True,
        }
        if prompt.tools:
            body |= {"tools": prompt.tools, "tool_choice": "none"}
        await self._until_callers_are_gone()
        said = json.loads(await self._ask("POST", "/v1/chat/completions", f"the prompt {prompt.id}", body))
        return Answer(
            prompt_id=prompt.id,
            kind=prompt.kind,
            language=prompt.language,
            source="greedy" if greedy else "sampled",
            prompt=said["prompt_token_ids"],
            answer=said["choices"][0]["token_ids"],
        )

    async def completion(self, model: str, prompt: Sequence[int], **fields: Any) -> dict[str, Any]:
        """Its continuation of these tokens: a choice as vLLM gives it, with token ids.

        Raises:
            EngineNotStarted: it gives none.
        """
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        body = {"model": model, "prompt": [*prompt], **ids, **fields}
        said = json.loads(await self._ask("POST", "/v1/completions", "a prompt", body))
        choice: dict[str, Any] = said["choices"][0]
        return choice

    async def plant(self, fault: FaultName | None) -> int:
        """Break it so and not otherwise, or mend it; in how many places, none where it has no such part.

        Raises:
            EngineNotStarted: it was not started to be broken, or this could not be done.
        """
        body = Planting(fault=fault).model_dump()
        return int(await self._ask("POST", FAULT_ROUTE, f"having {fault or 'nothing'} planted", body))

    async def sleep(self) -> None:
        """Give the GPU's memory back: weights go to RAM, the KV cache is dropped.

        Raises:
            EngineNotStarted: it cannot.
        """
        await self._ask("POST", SLEEP_ROUTE, "being sent to sleep")

    async def wake(self) -> None:
        """Take the memory again and put the weights back into it.

        Raises:
            EngineNotStarted: it cannot.
        """
        await self._ask("POST", WAKE_ROUTE, "being woken")

    async def is_alive(self) -> bool:
        """Ask it now; one that is too busy to answer is alive."""
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
            async with self._session.get("/health", timeout=timeout) as answer:
                return answer.status == 200
        except TimeoutError:
            return True
        except aiohttp.ClientError:
            return False

    async def stop(self) -> None:
        """End it; returns when nothing of it is left."""
        if self._address_file is not None:
            self._address_file.unlink(missing_ok=True)
        self.upstream.close()
        await self._session.close()
        if self.process is not None:
            await self.process.stop()

    async def _until_callers_are_gone(self) -> None:
        """Wait while a caller's request runs, on an engine that callers have too; or for a while of that."""
        if self._gives_way:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAITS_FOR_CALLERS_S):
                    while await self.callers():
                        await asyncio.sleep(POLL_S)

    async def _metrics(self, timeout_s: float) -> list[bytes]:
        """What vLLM shows of itself, by lines; none if it does not answer."""
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            plain = {"accept-encoding": "identity"}
            async with self._session.get("/metrics", headers=plain, timeout=timeout) as answer:
                return (await answer.read()).splitlines()
        except (aiohttp.ClientError, TimeoutError):
            return []

    async def _ask(self, method: str, route: str, what: str, body: Any = None) -> bytes:
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        own = {"x-request-id": f"{OWN}{secrets.token_hex(8)}"}
        try:
            async with self._session.request(method, route, json=body, headers=own, timeout=timeout) as answer:
                text = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._problem(f"the engine gives no answer to {what} ({error!r})") from error
        if answer.status != 200:
            raise self._problem(f"the engine fails at {what}: {text[:300].decode(errors='replace')}")
        return text

    def _problem(self, what: str) -> EngineNotStarted:
        log = f"; its log is {self.process.log}" if self.process else ""
        return EngineNotStarted(f"{self.name}: {what}{log}.")


def _reason(tail: str) -> str:
    """The line of a log that says most: the last that names an error, or else the last."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line and "Traceback" not in line]
    return (telling or lines or ["it wrote nothing"])[-1][-300:]
