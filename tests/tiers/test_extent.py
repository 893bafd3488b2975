"""How much is measured, and of what: every beginning stands for the whole."""

from pathlib import Path

import pytest

from tiers.conformance.corpus import SHORTEST, digest, load_corpus
from tiers.conformance.extent import QUICK, QUICK_TOKENS, TOKENS, Asked, Extent
from tiers.conformance.prompts import KINDS, LANGUAGES, load_prompts
from tiers.errors import PromptsError

CONTEXT = 8192


def test_quick_is_the_quick_prompts_with_every_kind_and_language() -> None:
    extent = Extent.of(Asked(quick=True), CONTEXT)
    assert len(extent.prompts) == QUICK
    assert {each.id for each in extent.prompts} == {each.id for each in load_prompts(quick=True)}
    assert (extent.tokens, extent.stages) == (QUICK_TOKENS, (QUICK,))
    assert {each.language for each in extent.passages} == {*LANGUAGES}


def test_the_whole_is_all_prompts_and_the_whole_corpus() -> None:
    extent = Extent.of(Asked(), CONTEXT)
    assert {each.id for each in extent.prompts} == {each.id for each in load_prompts()}
    assert {*extent.passages} == {*load_corpus()}
    assert (extent.tokens, extent.stages) == (TOKENS, (len(extent.prompts),))


def test_until_decided_begins_with_few_and_ends_with_all_at_a_confidence_for_all_looks() -> None:
    extent = Extent.of(Asked(until_decided=True), CONTEXT)
    assert extent.stages == (24, 48, 96, len(load_prompts()))
    assert extent.confidence == pytest.approx(1 - 0.05 / 4)
    assert Extent.of(Asked(), CONTEXT).confidence == 0.95
    assert Extent.of(Asked(prompts=30, until_decided=True), CONTEXT).stages == (24, 30)
    for stage in extent.stages:
        assert {each.kind for each in extent.prompts[:stage]} == {*KINDS}
        assert {each.language for each in extent.prompts[:stage]} == {*LANGUAGES}


def test_a_shorter_extent_is_the_beginning_of_a_longer_one() -> None:
    few, all_of_them = Extent.of(Asked(prompts=10), CONTEXT), Extent.of(Asked(), CONTEXT)
    assert few.prompts == all_of_them.prompts[:10]
    assert few.passages == all_of_them.passages[:10]


@pytest.mark.parametrize("prompts", [5, 10_000])
def test_no_other_number_of_prompts_can_be_measured(prompts: int) -> None:
    with pytest.raises(PromptsError, match="Between 6 and"):
        Extent.of(Asked(prompts=prompts), CONTEXT)


def test_where_the_context_is_long_so_are_the_longest_prompts() -> None:
    def longest(context: int) -> int:
        prompts = Extent.of(Asked(quick=True), context).prompts
        return max(sum(len(each["content"]) for each in prompt.messages) for prompt in prompts)

    assert longest(131_072) > 4 * longest(CONTEXT)


def test_a_passage_is_a_paragraph_of_a_document_and_long_enough_to_tell_something() -> None:
    passages = load_corpus()
    assert {each.language for each in passages} == {*LANGUAGES}
    assert len({each.id for each in passages}) == len(passages)
    assert min(len(each.text.encode()) for each in passages) >= SHORTEST
    assert all("\n\n" not in each.text for each in passages)


def test_the_digest_is_of_what_the_passages_say() -> None:
    passages = load_corpus()
    assert digest(passages) == digest(passages[::-1]) != digest(passages[1:])


def test_a_document_of_no_known_language_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text-xx.txt").write_text("x" * 200)
    with pytest.raises(PromptsError, match="ends in no language"):
        load_corpus(tmp_path)
