"""How much is measured: which prompts, how long answers, how much of the corpus, and how often one looks."""

from collections import Counter
from dataclasses import dataclass
from typing import Self, TypeVar

from tiers.conformance import corpus
from tiers.conformance.corpus import Passage, load_corpus
from tiers.conformance.findings import FEWEST_PROMPTS
from tiers.conformance.prompts import SHORTEST_CONTEXT, Prompt, digest, load_prompts
from tiers.errors import PromptsError

QUICK = 24
"""Prompts: those that are marked as quick, which have every kind and language."""
QUICK_TOKENS, TOKENS = 48, 128
MISS = 0.05
"""How often a verdict may be wrong, over all looks together."""
_LONG = 12_288
"""Tokens of the longest prompts, where the model's context has room for them beside much else."""

_Text = TypeVar("_Text", Prompt, Passage)


@dataclass(frozen=True)
class Asked:
    """What a person wants measured, of whichever model."""

    quick: bool = False
    prompts: int | None = None
    """How many, instead of the few or all."""
    until_decided: bool = False
    """Whether to begin with few, and go on until every verdict is settled or there are no more."""


@dataclass(frozen=True)
class Extent:
    """Of one model."""

    prompts: tuple[Prompt, ...]
    """In an order of which every beginning has something of everything."""
    passages: tuple[Passage, ...]
    """Likewise."""
    tokens: int
    """Of each answer, at most."""
    twice: bool
    """Whether each prompt is answered both greedily and sampled, or one this way and the next that."""
    stages: tuple[int, ...]
    """After so many prompts one looks whether the verdict is settled; the last are all."""

    @classmethod
    def of(cls, asked: Asked, context_length: int) -> Self:
        """What is to be measured of a model with that context.

        Raises:
            PromptsError: more prompts are asked for than there are, or fewer than intervals need, or the context
                has no room for the longest.
        """
        if context_length < SHORTEST_CONTEXT:
            raise PromptsError(
                f"A context of {context_length} tokens has no room for the longest prompts; measuring takes "
                f"{SHORTEST_CONTEXT} or more (context_length)."
            )
        # Near the context's end there would be no room for answers; what is short is by itself long enough.
        prompts = load_prompts(context_length=_LONG if context_length > _LONG + _LONG // 4 else None)
        ordered = _in_turn(prompts)
        most = asked.prompts or (QUICK if asked.quick and not asked.until_decided else len(ordered))
        if not FEWEST_PROMPTS <= most <= len(ordered):
            raise PromptsError(f"Between {FEWEST_PROMPTS} and {len(ordered)} prompts can be measured, not {most}.")
        return cls(
            prompts=ordered[:most],
            passages=_in_turn(load_corpus())[:most],
            tokens=QUICK_TOKENS if asked.quick else TOKENS,
            twice=not asked.quick,
            stages=tuple(_doubling(min(QUICK, most), most)) if asked.until_decided else (most,),
        )

    def mark(self, prompts: int) -> str:
        """By what a pack of so many of them is found: the digests of what is asked, and the length of answers."""
        asked, read = digest(self.prompts[:prompts]), corpus.digest(self.passages[:prompts])
        return f"{asked[:12]}-{read[:12]}-{self.tokens}"

    @property
    def confidence(self) -> float:
        """Of each interval, that all looks together are wrong no more often than `MISS` (Bonferroni)."""
        return 1 - MISS / len(self.stages)


def _in_turn(texts: tuple[_Text, ...]) -> tuple[_Text, ...]:
    """The quick prompts first, then of each kind one in each language, again and again; passages by documents."""
    seen: Counter[tuple[bool, str, str]] = Counter()
    places = {}
    for text in texts:
        kind, later = (text.kind, not text.quick) if isinstance(text, Prompt) else (text.document, True)
        places[text.id] = (later, seen[later, kind, text.language])
        seen[later, kind, text.language] += 1
    return tuple(sorted(texts, key=lambda text: places[text.id]))


def _doubling(first: int, last: int) -> list[int]:
    """24, 48, 96, …: as long as the last is half as many again."""
    steps = [first]
    while steps[-1] * 3 <= last:
        steps.append(steps[-1] * 2)
    return steps if steps[-1] == last else [*steps, last]
