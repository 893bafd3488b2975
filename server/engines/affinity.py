"""Which of several engines takes a request: the one that has least to do until it is answered.

An engine keeps what it computed of earlier prompts (vLLM's prefix cache), and reads only what is new of one that
begins alike. So what a request costs an engine is what is outstanding there and what it must read of this prompt.
Where no engine is known to have read the prompt's head, another gateway may have sent it somewhere: each head has
a home by highest random weight (Thaler and Ravishankar, 1998), a consistent hash that needs no state, is the same
in every gateway, and moves only the heads of an engine that comes or goes. At home it counts as read.

The load of the engines that a popular head prefers is bounded by what that saves: as soon as reading all of the
prompt elsewhere is less work than waiting, it goes there. A bound in proportion to the mean load (Mirrokni, Thorup
and Zadimoghaddam, 2018) was tried first, and took longer than round robin: deploy/README.md has the table.
Knows loads and heads; knows nothing of engines or HTTP.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import Protocol, Self, TypeVar

HEAD_CHARACTERS = 1024
"""Of a prompt, that say where it goes. Prompts that differ only later count as alike."""
SHORTEST_HEAD = 256
"""A prompt with less has nothing that is worth finding again: vLLM keeps whole blocks of 16 to 128 tokens."""
MOST_HEADS = 1024
"""That are remembered of an engine: those it was sent last."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Work:
    """What one request is to an engine, in tokens, about."""

    prompt: int = 0
    answer: int = 0
    head: int | None = None
    """64 bits of the head of its prompt; None where that is too short to matter."""


NO_WORK = Work()
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


class Load:
    """What one engine has still to do, and which heads it has read."""

    def __init__(self, name: str) -> None:
        self._seed = seed_of(name)
        self.outstanding = 0
        """Tokens that it has to read or to write."""
        self._read: OrderedDict[int, int] = OrderedDict()
        """Of each head the longest prompt, in tokens."""

    def knows(self, head: int) -> bool:
        """Whether it was sent a prompt with this head."""
        return head in self._read

    def unread(self, work: Work) -> int:
        """Tokens of its prompt that the engine would have to read."""
        return work.prompt if work.head is None else max(0, work.prompt - self._read.get(work.head, 0))

    def rank(self, head: int) -> int:
        """64 bits by which engines are ranked for a head; the greatest is its home."""
        return _mixed(head ^ self._seed)

    def take(self, work: Work) -> "Burden":
        """Count the work within a block."""
        return Burden(self, work)

    def remember(self, work: Work) -> None:
        """The engine has read, or is about to."""
        if work.head is not None:
            self._read[work.head] = max(work.prompt, self._read.get(work.head, 0))
            self._read.move_to_end(work.head)
            if len(self._read) > MOST_HEADS:
                self._read.popitem(last=False)

    def forget(self) -> None:
        """It has read nothing: it was started anew."""
        self._read.clear()


class Burden:
    """One request's part of a load. A class, for every request has one, and a generator costs more."""

    def __init__(self, load: Load, work: Work) -> None:
        self._load = load
        self._work = work
        self._reading = self._writing = 0

    def __enter__(self) -> Self:
        self._reading, self._writing = self._load.unread(self._work), self._work.answer
        self._load.outstanding += self._reading + self._writing
        self._load.remember(self._work)
        return self

    def has_read(self) -> None:
        """The answer has begun: the prompt is no work any more."""
        self._load.outstanding -= self._reading
        self._reading = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._load.outstanding -= self._reading + self._writing
        self._reading = self._writing = 0


class Loaded(Protocol):
    """What takes requests, and has some already."""

    @property
    def load(self) -> Load:
        """What it has to do."""

    @property
    def running(self) -> int:
        """Requests that it works on."""


L = TypeVar("L", bound=Loaded)


def choose(able: Sequence[L], work: Work) -> L:
    """The one of ``able``, at least one, that has least to do until it has read the prompt; of equals the first.

    Nobody waits longer than it would take to read all of the prompt elsewhere.
    """
    if len(able) == 1:
        return able[0]
    head = work.head
    home = None
    if head is not None and not any(each.load.knows(head) for each in able):
        home = max(able, key=lambda each: each.load.rank(head))

    def until_read(each: L) -> tuple[int, int]:
        return each.load.outstanding + (0 if each is home else each.load.unread(work)), each.running

    return min(able, key=until_read)


def _mixed(value: int) -> int:
    """64 bits of which each depends on all of ``value``'s (the finalizer of MurmurHash3)."""
    value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD & _MASK
    value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 & _MASK
    return value ^ (value >> 33)
