"""Which of several engines takes a request: one that knows how its prompt begins, unless that has too much to do.

An engine keeps what it computed of earlier prompts (vLLM's prefix cache), and reads only what is new of one that
begins alike. So prompts with the same head go to the same engine. Each head ranks the engines by highest random
weight (Thaler and Ravishankar, 1998): a consistent hash that needs no state, is the same in every gateway, and
moves only the heads of an engine that comes or goes. The first in rank whose load is within a bound of the mean
takes the request, so that one popular head does not fall upon one engine (consistent hashing with bounded loads:
Mirrokni, Thorup and Zadimoghaddam, 2018). Knows loads and ranks; knows nothing of engines or HTTP.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, TypeVar

HEAD_CHARACTERS = 1024
"""Of a prompt, that say where it goes. Prompts that differ only later count as alike."""
SHORTEST_HEAD = 256
"""A prompt with less has nothing that is worth finding again: vLLM keeps whole blocks of 16 to 128 tokens."""
MOST_LOAD = 1.25
"""Times the mean: the bound of the paper's own experiments."""

_MASK = (1 << 64) - 1


class Loaded(Protocol):
    """What takes requests, and has some already."""

    @property
    def rank_seed(self) -> int:
        """64 bits that are its own, the same in every process."""

    @property
    def outstanding(self) -> int:
        """Tokens that it has still to read or to write, about."""

    @property
    def running(self) -> int:
        """Requests that it works on."""


L = TypeVar("L", bound=Loaded)


@dataclass(frozen=True)
class Work:
    """What one request is to an engine."""

    tokens: int
    """Of its prompt and of its answer, about."""
    head: int | None = None
    """64 bits of the head of its prompt; None where that is too short to matter."""


NO_WORK = Work(0)
"""What costs an engine next to nothing, such as counting tokens."""


def seed_of(name: str) -> int:
    """64 bits of a name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())


def head_of(pieces: Iterable[str], salt: str = "") -> int | None:
    """64 bits of how a prompt begins.

    Args:
        pieces: of its text, in order; not more of them are asked for than count.
        salt: keeps the caches of callers apart, so that the same text is another head.
    """
    taken: list[str] = []
    room = HEAD_CHARACTERS
    for piece in pieces:
        taken.append(piece[:room])
        room -= len(taken[-1])
        if not room:
            break
    if HEAD_CHARACTERS - room < SHORTEST_HEAD:
        return None
    return seed_of("\0".join((salt, *taken)))


def choose(able: Sequence[L], work: Work) -> L:
    """The one of ``able``, at least one, that takes the work.

    With a head the highest in rank whose load is within `MOST_LOAD` times the mean, the work included; without one
    that with the least load, and of equals the first.
    """
    if len(able) == 1:
        return able[0]
    if work.head is None:
        return min(able, key=lambda each: (each.outstanding, each.running))
    head = work.head
    loads = [each.outstanding for each in able]
    bound = MOST_LOAD * (sum(loads) + work.tokens) / len(able)
    within = [each for each, load in zip(able, loads, strict=True) if load <= bound]
    return max(within, key=lambda each: _mixed(head ^ each.rank_seed))


def _mixed(value: int) -> int:
    """64 bits of which each depends on all of ``value``'s (the finalizer of MurmurHash3)."""
    value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD & _MASK
    value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 & _MASK
    return value ^ (value >> 33)
