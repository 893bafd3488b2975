"""What an engine is asked when it is measured: to answer, to be walked along answers, and to be broken.

Knows the routes and nothing of processes: those are `server.engines.engine`'s.
"""

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from tiers.conformance.faults import FaultName, Planting
from tiers.conformance.pack import Answer
from tiers.conformance.prompts import Prompt
from tiers.conformance.sequence import Scored
from tiers.conformance.sequence import Sequence as Walk
from tiers.probe.reading import CALLERS_ROUTE, FAULT_ROUTE, SCORE_ROUTE

POLL_S = 0.5
ANSWER_TIMEOUT_S = 300.0
"""For what an engine is asked about itself, and for its first request."""
MEASURING_TIMEOUT_S = 3600.0
"""For one sequence, among many and behind callers'."""
WAITS_FOR_CALLERS_S = 10.0
"""How long, before each sequence, whoever measures an engine that serves lets its callers go first."""


class Measurable(ABC):
    """An engine, as far as it is measured."""

    gives_way: bool
    """Whether callers have it too, who go first."""

    @abstractmethod
    async def ask(
        self, method: str, route: str, what: str, body: Any = None, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> bytes:
        """The answer to what the engine is asked about itself."""

    async def callers(self) -> int:
        """How many requests it works on, or holds back, that measure nothing.

        Raises:
            EngineNotStarted: it does not tell.
        """
        return int(await self.ask("GET", CALLERS_ROUTE, "its callers"))

    async def walk(self, sequence: Walk) -> Scored:
        """Have it compute one sequence, and say how far its distributions are from the reference's.

        Raises:
            EngineNotStarted: it cannot, or is gone.
        """
        body = sequence.model_dump(mode="json")
        await self._until_callers_are_gone()
        said = await self.ask("POST", SCORE_ROUTE, "being measured", body, MEASURING_TIMEOUT_S)
        return Scored.model_validate_json(said)

    async def tokens(self, model: str, text: str) -> list[int]:
        """The tokens of a text, with what the tokenizer puts before it.

        Raises:
            EngineNotStarted: it does not tell.
        """
        said = json.loads(await self.ask("POST", "/tokenize", "a text's tokens", {"model": model, "prompt": text}))
        return [int(token) for token in said["tokens"]]

    async def text(self, model: str, tokens: Sequence[int]) -> str:
        """What these tokens say.

        Raises:
            EngineNotStarted: it does not tell.
        """
        said = await self.ask("POST", "/detokenize", "its tokens' text", {"model": model, "tokens": [*tokens]})
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
        what = f"the prompt {prompt.id}"
        said = json.loads(await self.ask("POST", "/v1/chat/completions", what, body, MEASURING_TIMEOUT_S))
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
        said = json.loads(await self.ask("POST", "/v1/completions", "a prompt", body))
        choice: dict[str, Any] = said["choices"][0]
        return choice

    async def plant(self, fault: FaultName | None) -> int:
        """Break it so and not otherwise, or mend it; in how many places, none where it has no such part.

        Raises:
            EngineNotStarted: it was not started to be broken, or this could not be done.
        """
        body = Planting(fault=fault).model_dump()
        return int(await self.ask("POST", FAULT_ROUTE, f"having {fault or 'nothing'} planted", body))

    async def _until_callers_are_gone(self) -> None:
        """Wait while a caller's request runs, on an engine that callers have too; or for a while of that."""
        if self.gives_way:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAITS_FOR_CALLERS_S):
                    while await self.callers():
                        await asyncio.sleep(POLL_S)
