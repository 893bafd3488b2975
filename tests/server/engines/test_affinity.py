"""Prompts that begin alike go to an engine that has read the beginning, as long as that saves work."""

from collections import Counter
from dataclasses import dataclass, field

import msgspec
import pytest

from server.call import Call, read_call
from server.engines.affinity import (
    HEAD_CHARACTERS,
    MOST_HEADS,
    SHORTEST_HEAD,
    Load,
    Work,
    choose,
    head_of,
    seed_of,
)
from server.responses_call import ResponsesCall
from server.text_call import ChatCall, CompletionCall


@dataclass
class One:
    """An engine, as a choice sees it."""

    name: str
    running: int = 0
    load: Load = field(init=False)

    def __post_init__(self) -> None:
        self.load = Load(self.name)


def engines(count: int) -> list[One]:
    return [One(f"engine {number}") for number in range(count)]


def heads(count: int) -> list[int]:
    return [seed_of(f"head {number}") for number in range(count)]


def test_a_new_head_goes_to_its_home_and_heads_are_spread_evenly() -> None:
    homes = [choose(engines(4), Work(100, 10, head)).name for head in heads(4000)]
    assert homes == [choose(engines(4), Work(100, 10, head)).name for head in heads(4000)], "in every gateway"
    assert all(900 < count < 1100 for count in Counter(homes).values()), Counter(homes)


def test_an_engine_that_goes_moves_no_heads_but_its_own() -> None:
    five = engines(5)
    before = {head: choose(five, Work(100, 10, head)) for head in heads(2000)}
    after = {head: choose(five[:-1], Work(100, 10, head)) for head in heads(2000)}
    moved = {head for head in before if before[head] is not after[head]}
    assert moved == {head for head in before if before[head] is five[-1]}
    assert max(Counter(after[head].name for head in moved).values()) < 0.35 * len(moved), "spread over all"


def test_waiting_for_the_engine_that_knows_the_head_is_bounded_by_what_that_saves() -> None:
    knows, other = engines(2)
    work = Work(prompt=500, answer=10, head=7)
    knows.load.remember(work)
    with knows.load.take(Work(prompt=499)):
        assert choose([other, knows], work) is knows
        with knows.load.take(Work(prompt=2)):
            assert choose([other, knows], work) is other


def test_an_engine_that_took_what_was_too_much_for_home_knows_the_head_too() -> None:
    work = Work(prompt=500, answer=10, head=7)
    three = engines(3)
    home = choose(three, work)
    home.load.remember(work)
    with home.load.take(Work(prompt=1000)):
        second = choose(three, work)
        assert second is not home
        second.load.remember(work)
        assert choose(three, work) is second
    assert choose([home], work) is home


def test_of_a_prompt_that_has_grown_only_the_new_part_is_to_be_read() -> None:
    load = Load("engine")
    load.remember(Work(prompt=400, head=7))
    assert load.unread(Work(prompt=450, head=7)) == 50
    assert load.unread(Work(prompt=300, head=7)) == 0
    assert load.unread(Work(prompt=450, head=8)) == 450
    load.forget()
    assert load.unread(Work(prompt=450, head=7)) == 450


def test_a_prompt_is_no_work_once_the_answer_has_begun_and_nothing_is_left_at_the_end() -> None:
    load = Load("engine")
    with load.take(Work(prompt=400, answer=30)) as burden:
        assert load.outstanding == 430
        burden.has_read()
        assert load.outstanding == 30
    assert load.outstanding == 0
    with pytest.raises(ZeroDivisionError), load.take(Work(prompt=400, answer=30)):
        raise ZeroDivisionError
    assert load.outstanding == 0


def test_only_so_many_heads_are_remembered_those_that_came_last() -> None:
    load = Load("engine")
    for head in range(MOST_HEADS + 1):
        load.remember(Work(prompt=1, head=head))
    assert not load.knows(0)
    assert load.knows(MOST_HEADS)


def test_without_a_head_the_least_outstanding_tokens_count_and_not_requests() -> None:
    few_long, many_short = One("few", running=2), One("many", running=9)
    with few_long.load.take(Work(9000)), many_short.load.take(Work(500)):
        assert choose([few_long, many_short], Work(10)) is many_short
    idle = One("idle", running=1)
    assert choose([One("first", running=2), idle], Work(10)) is idle


def test_a_popular_head_does_not_fall_upon_one_engine() -> None:
    four = engines(4)
    burdens = [choose(four, Work(500, 100, 7)).load.take(Work(500, 100, 7)).__enter__() for _ in range(100)]
    loads = [each.load.outstanding for each in four]
    assert min(loads) > 0
    assert max(loads) - min(loads) <= 600
    assert len(burdens) == 100


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
