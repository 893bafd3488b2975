"""Prompts that begin alike go to one engine, as long as that is no worse off than the others."""

import random
from collections import Counter
from dataclasses import dataclass, field

import msgspec
import pytest

from server.call import Call, read_call
from server.engines.affinity import HEAD_CHARACTERS, MOST_LOAD, SHORTEST_HEAD, Work, choose, head_of, seed_of
from server.responses_call import ResponsesCall
from server.text_call import ChatCall, CompletionCall


@dataclass
class One:
    """An engine, as a choice sees it."""

    name: str
    outstanding: int = 0
    running: int = 0
    rank_seed: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank_seed = seed_of(self.name)


def engines(count: int) -> list[One]:
    return [One(f"engine {number}") for number in range(count)]


def heads(count: int) -> list[int]:
    return [seed_of(f"head {number}") for number in range(count)]


def test_the_same_head_goes_to_the_same_engine_and_heads_are_spread_evenly() -> None:
    four = engines(4)
    first = [choose(four, Work(100, head)).name for head in heads(4000)]
    assert first == [choose(four, Work(100, head)).name for head in heads(4000)]
    assert all(900 < count < 1100 for count in Counter(first).values()), Counter(first)


def test_an_engine_that_goes_moves_no_heads_but_its_own() -> None:
    five = engines(5)
    before = {head: choose(five, Work(100, head)) for head in heads(2000)}
    after = {head: choose(five[:-1], Work(100, head)) for head in heads(2000)}
    moved = {head for head in before if before[head] is not after[head]}
    assert moved == {head for head in before if before[head] is five[-1]}
    assert max(Counter(after[head].name for head in moved).values()) < 0.35 * len(moved), "spread over all"


def test_no_engine_gets_more_than_the_bound_however_popular_a_head() -> None:
    four, cost = engines(4), 100
    for _ in range(400):
        choose(four, Work(cost, 7)).outstanding += cost
        mean = sum(each.outstanding for each in four) / 4
        assert max(each.outstanding for each in four) <= MOST_LOAD * mean + cost
    assert len({each.outstanding for each in four}) > 1, "the favourite has more than the others"


def test_without_a_head_the_least_outstanding_tokens_count_and_not_requests() -> None:
    few_long, many_short = One("few", outstanding=9000, running=2), One("many", outstanding=500, running=9)
    assert choose([few_long, many_short], Work(10)) is many_short
    idle = One("idle", running=1)
    assert choose([One("first", running=2), idle], Work(10)) is idle


def test_a_random_workload_is_balanced_and_keeps_its_heads() -> None:
    draw, four = random.Random(5), engines(4)
    underway: list[tuple[One, int]] = []
    favourite = {head: choose(engines(4), Work(1, head)).name for head in heads(40)}
    kept = 0
    for _ in range(4000):
        head, cost = draw.choice(heads(40)), draw.randint(50, 2000)
        chosen = choose(four, Work(cost, head))
        chosen.outstanding += cost
        underway.append((chosen, cost))
        kept += chosen.name == favourite[head]
        if len(underway) > 64:
            done, its = underway.pop(draw.randrange(len(underway)))
            done.outstanding -= its
    assert kept / 4000 > 0.7, "most find their engine"
    loads = [each.outstanding for each in four]
    assert max(loads) <= MOST_LOAD * sum(loads) / 4 + 2000


LONG = "You are a helpful assistant of a large company. " * 40


def chat(*messages: tuple[str, str], **fields: object) -> ChatCall:
    body = {"model": "m", "messages": [{"role": role, "content": text} for role, text in messages], **fields}
    return read_call(encoded(body), ChatCall)


def encoded(body: object) -> bytes:
    return msgspec.json.encode(body)


def head(call: Call) -> int | None:
    return head_of(call.beginning)


def test_a_conversation_keeps_its_head_as_it_grows() -> None:
    question = "Tell me about the sea. " * 20
    first = chat(("system", "Be brief."), ("user", question))
    later = chat(("system", "Be brief."), ("user", question), ("assistant", "It is wet."), ("user", "And deep?"))
    assert head(first) is not None
    assert head(first) == head(later)
    assert head(first) != head(chat(("system", "Be brief."), ("user", question + "Now.")))


def test_a_long_system_message_is_the_head_of_all_that_share_it() -> None:
    assert len(LONG) > HEAD_CHARACTERS
    assert head(chat(("system", LONG), ("user", "a"))) == head(chat(("system", LONG), ("user", "b")))


def test_what_is_too_short_to_be_found_again_has_no_head() -> None:
    assert head(chat(("user", "x" * (SHORTEST_HEAD // 2)))) is None


def test_another_salt_is_another_head() -> None:
    assert head_of([LONG], "mine") != head_of([LONG], "yours")


def test_tools_and_instructions_stand_before_what_is_said() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    said = ("user", LONG[: HEAD_CHARACTERS // 2])
    assert head(chat(said, tools=[tool])) != head(chat(said))
    response = {"model": "m", "instructions": LONG, "input": "a"}
    other = response | {"input": [{"role": "user", "content": "b"}]}
    assert head(read_call(encoded(response), ResponsesCall)) == head(read_call(encoded(other), ResponsesCall))


@pytest.mark.parametrize("prompt", [LONG, [LONG, "other"], list(range(2000)), [list(range(2000)), [1]]])
def test_a_text_completion_has_the_head_of_its_first_prompt(prompt: object) -> None:
    found = head(read_call(encoded({"model": "m", "prompt": prompt}), CompletionCall))
    first = prompt[0] if isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt
    assert found is not None
    assert found == head(read_call(encoded({"model": "m", "prompt": first}), CompletionCall))
