"""What no walk sees of an engine is seen by asking it."""

import json
import math
from pathlib import Path
from typing import Any, Literal, cast

import pytest

from server.engines.engine import Engine
from server.measuring import checks
from server.measuring.checks import DRAWN, Found
from tiers.conformance.pack import Answer, Pack
from tiers.conformance.prompts import Prompt

PROMPT = [1, 2, 3, 4]
PROMPTS = {name: Prompt(name, "chat", "en", ({"role": "user", "content": name},)) for name in ("a", "b")}


def answer(name: str, *, greedy: bool = True, prompt: list[int] = PROMPT) -> Answer:
    source: Literal["greedy", "sampled"] = "greedy" if greedy else "sampled"
    return Answer(prompt_id=name, kind="chat", language="en", source=source, prompt=prompt, answer=[9])


class Answers:
    """A pack, as far as it is asked."""

    answers = tuple(answer(name, greedy=greedy) for name in PROMPTS for greedy in (True, False))


class Asked:
    """An engine that answers as it is told."""

    def __init__(self, *, writes: Any = None, draws: float = 0.0, stops: Any = None) -> None:
        self.writes = writes or {}
        self.draws = draws
        self.stops = stops
        self.bodies: list[dict[str, Any]] = []

    async def answer(self, model: str, prompt: Prompt, **fields: Any) -> Answer:
        return answer(prompt.id, prompt=self.writes.get(prompt.id, PROMPT))

    async def completion(self, model: str, prompt: list[int], **fields: Any) -> dict[str, Any]:
        self.bodies.append(fields)
        if "logit_bias" in fields:
            (token,) = fields["logit_bias"]
            return {"finish_reason": "stop" if int(token) in self.stops else "length"}
        # The likeliest, of 0.4, the next, of 0.3; and whichever else the engine may draw.
        shown = {"token_id:1": math.log(0.4), "token_id:2": math.log(0.3)}
        own = math.log(0.3)
        last = self.draws if len(self.bodies) == 3 and self.draws else own
        return {"logprobs": {"token_logprobs": [own] * (DRAWN - 1) + [last], "top_logprobs": [shown] * DRAWN}}


async def rendering(**how: Any) -> Found | None:
    return await checks.rendering(cast(Engine, Asked(**how)), "m", cast(Pack, Answers()), PROMPTS)


async def test_chats_that_become_the_same_tokens_are_right() -> None:
    assert await rendering() is None


async def test_chats_that_become_others_are_not() -> None:
    assert await rendering(writes={"b": [1, 2, 0, 4]}) == Found("prompt token", len(PROMPT) + 3)
    assert await rendering(writes={"b": [1, 2, 3]}) == Found("prompt length", len(PROMPT) + 3)
    assert await rendering(writes={"a": [*PROMPT, 5]}) == Found("prompt length", len(PROMPT))


async def test_only_a_token_behind_the_nucleus_is_outside_it() -> None:
    pack = cast(Pack, Answers())
    sound = Asked()
    assert await checks.nucleus(cast(Engine, sound), "m", pack) is None, "0.4 lie before the second: it is inside"
    assert {body["top_p"] for body in sound.bodies} == {checks.TOP_P}
    assert len({body["seed"] for body in sound.bodies}) == len(Answers.answers)
    beyond = await checks.nucleus(cast(Engine, Asked(draws=math.log(0.1))), "m", pack)
    assert beyond == Found("token outside the nucleus", 3 * DRAWN)


@pytest.mark.parametrize(
    ("stops", "found"),
    [
        ({128001, 128008, 128009}, None),
        ({128001, 128009}, Found("finish reason", 3)),
        ({128002, 128009, 128010}, Found("finish reason", 1)),
        ({128001, 128008, 128009, 128010}, Found("finish reason", 5)),
    ],
)
async def test_answers_end_where_the_checkpoint_says_and_nowhere_else(
    tmp_path: Path, stops: set[int], found: Found | None
) -> None:
    ends = {"eos_token_id": [128001, 128008, 128009]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    engine = cast(Engine, Asked(stops=stops))
    assert await checks.end(engine, "m", cast(Pack, Answers()), tmp_path) == found


async def test_a_checkpoint_without_generation_config_names_its_end_in_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    pack = cast(Pack, Answers())
    assert await checks.end(cast(Engine, Asked(stops={2})), "m", pack, tmp_path) is None
    assert await checks.end(cast(Engine, Asked(stops={0})), "m", pack, tmp_path) == Found("finish reason", 1)
