"""The replicas of one tier, and which of them takes a request. Knows load and health; knows nothing of HTTP."""

from collections.abc import Callable, Collection, Iterable

from server.engines.affinity import NO_WORK, Work, choose
from server.engines.replica import Replica
from server.engines.service import Service, TierDrained
from server.engines.state import State
from server.errors import Refusal, TierUnavailable
from server.metrics import Metrics
from tiers.manifest import Manifest
from tiers.tier import Tier
from tiers.verification import VerifiedPrecision

_BEST_FIRST = (
    *(State.READY, State.ASLEEP, State.SUSPENDED, State.WARMING_UP, State.STARTING, State.RESTARTING),
    *(State.DRAINING, State.DRAINED, State.REFUSED, State.STOPPED),
)
"""By how soon an answer is to be had."""
AN_ENGINE_S = 10
"""When to ask again where no engine is even known."""
LATELY = 64
"""Answers by which a tier's usual length is known."""


class Pool:
    """The replicas of one tier: engines of the same checkpoint, each as good as any other."""

    def __init__(
        self,
        tier: Tier,
        manifest: Manifest,
        context_length: int,
        replicas: Iterable[Replica],
        metrics: Metrics,
        *,
        max_num_seqs: int,
    ) -> None:
        self.tier = tier
        self.manifest = manifest
        self.context_length = context_length
        self.replicas = tuple(replicas)
        """Those there are now; `Fleet.add` and `Fleet.remove` make it more or fewer."""
        self.service = Service(tier.name, lambda: self.replicas)
        """What an operator has a say in."""
        self._max_num_seqs = max_num_seqs
        self._mean_answer = 128.0
        self._waiting: Callable[[], int] = int
        for replica in self.replicas:
            replica.on_ready = self.service.changed
        metrics.declare(tier.name, self)

    def add(self, replica: Replica) -> None:
        """One more, which takes requests as soon as it can."""
        self.replicas += (replica,)
        replica.on_ready = self.service.changed
        self.service.changed()

    def remove(self, replica: Replica) -> None:
        """One fewer; what it works on is its own to end."""
        self.replicas = tuple(each for each in self.replicas if each is not replica)

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Know how many requests wait in the tier's queue."""
        self._waiting = waiting

    @property
    def waiting(self) -> int:
        """Requests that no engine works on: in the tier's queue, or handed to engines that are full.

        An engine that leaves has its requests to itself: they are in nobody's way.
        """
        beyond = sum(each.running - self._max_num_seqs for each in self.replicas if each.can_answer)
        return self._waiting() + max(0, beyond)

    @property
    def requests_at_once(self) -> int:
        """What the engines work on together; 0 while requests are to wait for one that is started again."""
        return self.service.places(self._max_num_seqs)

    @property
    def can_answer(self) -> bool:
        """Whether a request would be answered, by whichever."""
        return any(replica.can_answer for replica in self.replicas)

    @property
    def takes_requests(self) -> bool:
        """Whether it would be answered, now or once an engine is back that an operator has started again."""
        return self.can_answer or self.service.is_paused

    @property
    def ready(self) -> int:
        """How many of the replicas could answer it."""
        return sum(replica.can_answer for replica in self.replicas)

    @property
    def running(self) -> int:
        """Requests that the engines work on now, or are woken for."""
        return sum(replica.running for replica in self.replicas)

    @property
    def expected(self) -> int:
        """How many replicas would answer if all were well: without those that leave, and are not missed."""
        return sum(not each.leaving or self.service.has_out(each) for each in self.replicas)

    @property
    def drained(self) -> int:
        """How many of the replicas an operator has out of service."""
        return self.service.drained

    @property
    def is_asleep(self) -> bool:
        """Whether an engine would have to wake first."""
        return self.state is State.ASLEEP

    @property
    def is_verified(self) -> bool:
        """Whether engines were seen to compute what their checkpoint declares, and none anything else."""
        return self.verified is not None and self.verified.agrees

    @property
    def state(self) -> State:
        """That of the replica which could answer soonest."""
        return min(map(self.service.shown, self.replicas), key=_BEST_FIRST.index, default=State.STOPPED)

    @property
    def restarts(self) -> int:
        """Times that any engine was started again."""
        return sum(replica.restarts for replica in self.replicas)

    @property
    def engine_version(self) -> str | None:
        """What the engines say they are; None before the first has said it."""
        return next((each.engine_version for each in self.replicas if each.engine_version), None)

    @property
    def verified(self) -> VerifiedPrecision | None:
        """What was read back from an engine: from the first that disagrees with its checkpoint, if one does."""
        known = [replica.verified for replica in self.replicas if replica.verified is not None]
        return min(known, key=lambda each: each.agrees, default=None)

    def pick(self, work: Work = NO_WORK, tried: Collection[Replica] = ()) -> Replica:
        """The replica that takes the work, of those that can answer and were not tried; see `affinity.choose`.

        One that sleeps is woken, and one that has all it works on at once is asked, only when there is no other.

        Raises:
            Refusal: there is none; what `unavailable` says.
        """
        if len(self.replicas) == 1 and not tried and (only := self.replicas[0]).takes_requests:
            return only  # most tiers have no other, and every request comes by here
        able = [replica for replica in self.replicas if replica.takes_requests and replica not in tried]
        if len(able) > 1 and self.service.returning in able:
            able.remove(self.service.returning)
        if not able and any(replica.takes_requests for replica in tried):
            raise TierUnavailable(self.tier.name, "failing", retry_after=1)
        if not able:
            raise self.unavailable()

        return choose([each for each in able if self._has_room(each)] or able, work)

    def _has_room(self, replica: Replica) -> bool:
        return replica.state is not State.ASLEEP and replica.running < self._max_num_seqs

    def expected_answer(self, most: int | None) -> int:
        """Tokens that an answer will take, about: as many as others lately, if the caller allows so many."""
        return round(self._mean_answer) if most is None else min(most, round(self._mean_answer))

    def answered(self, tokens: int) -> None:
        """One took so many."""
        self._mean_answer += (tokens - self._mean_answer) / LATELY

    def has_another(self, tried: Collection[Replica]) -> bool:
        """Whether one could answer that was not tried."""
        return any(replica.takes_requests for replica in self.replicas if replica not in tried)

    def unavailable(self) -> Refusal:
        """Why nobody can answer, and when somebody could: what the replica says that is back first."""
        if not self.replicas:
            return TierUnavailable(self.tier.name, "without an engine", retry_after=AN_ENGINE_S)
        refusals = [replica.unavailable() for replica in self.replicas if not replica.leaving]
        if not refusals:
            return TierDrained(self.tier.name)
        waits = [refusal for refusal in refusals if isinstance(refusal, TierUnavailable)]
        return min(waits, key=lambda refusal: refusal.retry_after, default=refusals[0])
