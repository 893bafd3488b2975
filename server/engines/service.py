"""What an operator has out of a tier's service: a replica for a moment, or some until they are resumed.

Knows replicas and queues; knows nothing of HTTP, nor of who asks for it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from server.engines.replica import Replica
from server.engines.state import FIRST, UP, State
from server.errors import RetryLater, TierUnavailable

AN_OPERATOR_S = 60
"""When to ask again where it is for a person to say."""


class TierDrained(TierUnavailable):
    """An operator has taken the tier out of service, for as long as that takes: no failure to be alarmed by."""

    code = "tier_drained"

    def __init__(self, tier: str) -> None:
        sentence = f"{tier} is out of service, an operator has drained it; try again in {AN_OPERATOR_S} s or more."
        RetryLater.__init__(self, sentence, AN_OPERATOR_S)


class Queue(Protocol):
    """Where requests wait for the tier's engines."""

    @property
    def waiting(self) -> int:
        """Those without a place."""

    @property
    def taken(self) -> int:
        """Places that are held."""

    def look_again(self) -> None:
        """There may be more places than a moment ago."""


class Service:
    """Which replicas of one tier take requests, as far as an operator has a say in it."""

    def __init__(self, tier: str, replicas: Callable[[], Sequence[Replica]]) -> None:
        self._tier = tier
        self._replicas = replicas
        self._queues: tuple[Queue, ...] = ()
        self._out: set[Replica] = set()
        self.returning: Replica | None = None
        """It is about to be started again: it takes only what no other can, and is waited for."""
        self.closed = False
        """Whether the whole tier takes nothing new, and nothing is waited for."""

    def follow(self, *queues: Queue) -> None:
        """Tell these of places that come back; what they hold is asked of them."""
        self._queues = queues

    @property
    def is_paused(self) -> bool:
        """Whether requests are to wait for a replica that an operator has started again: there is no other."""
        returning = self.returning
        return returning is not None and not any(
            replica.takes_requests for replica in self._replicas() if replica is not returning
        )

    def places(self, each: int) -> int:
        """How many requests may be on the engines now, with so many for each replica that is in service.

        Those that one out of service still works on take nobody's place. Replicas that failed count as if they
        worked: who comes for them is told so, and does not wait. Those that start for the first time count only
        while there is no engine yet: else the one that is there would have their requests as well.
        """
        if self.is_paused:
            return 0
        out = [replica for replica in self._replicas() if self._is_out(replica)]
        staying = [replica for replica in self._replicas() if replica not in out]
        if any(replica.can_answer for replica in staying):
            staying = [replica for replica in staying if replica.state not in FIRST]
        return each * max(1, len(staying)) + sum(replica.running for replica in out)

    @property
    def drained(self) -> int:
        """How many replicas an operator has out of service."""
        return len(self._out | {self.returning} - {None})

    def take_out(self, replica: Replica) -> None:
        """Until it is taken back it gets nothing new."""
        replica.leaving = True
        self._out.add(replica)

    def take_back(self, replica: Replica) -> None:
        """It takes requests as soon as it can."""
        replica.leaving = False
        self._out.discard(replica)

    def has_out(self, replica: Replica) -> bool:
        """Whether an operator has it out of service until it is resumed; other replicas leave by themselves."""
        return replica in self._out

    @property
    def is_worked_on(self) -> bool:
        """Whether an operator has the whole tier ended, or one of its engines started again, at this moment."""
        return self.closed or self.returning is not None

    def _is_out(self, replica: Replica) -> bool:
        return replica.leaving or replica is self.returning

    def shown(self, replica: Replica) -> State:
        """Its state, as people are told: an operator's work on it is said before how the engine fares."""
        if replica.state is State.STOPPED and replica.leaving:
            return State.DRAINED
        return State.DRAINING if self._is_out(replica) and replica.state in UP else replica.state

    def is_done_with(self, replica: Replica) -> bool:
        """Whether no request is on it that it must answer, or on its way there.

        Who holds a place goes to whichever replica can take it, which is this one where there is no other.
        """
        return not replica.running and not (self.is_paused and any(queue.taken for queue in self._queues))

    @property
    def is_empty(self) -> bool:
        """Whether no request is on any replica, or waits for one."""
        held = any(queue.taken or queue.waiting for queue in self._queues)
        return not held and not any(replica.running for replica in self._replicas())

    def check_open(self) -> None:
        """Let a request wait for a place, or not. Raises TierDrained."""
        if self.closed:
            raise TierDrained(self._tier)

    def changed(self) -> None:
        """There are other places than before."""
        for queue in self._queues:
            queue.look_again()
