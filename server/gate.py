"""Whether a tier may answer, by how it stands. Knows what was configured; knows nothing of requests."""

import logging
from typing import Literal

from server.engines.pool import Pool
from server.errors import TierNotCertified
from server.standing import Standing, Standings

log = logging.getLogger("assay.gate")


class Gate:
    """What becomes of requests to a tier that has not passed: they are refused, or answered and warned of."""

    def __init__(self, mode: Literal["enforce", "warn", "off"], standings: Standings) -> None:
        self._mode = mode
        self._standings = standings
        self._warned_of: dict[Pool, Standing] = {}

    def standing(self, pool: Pool) -> Standing:
        """How the tier stands now."""
        return self._standings.of(pool)

    def answers(self, pool: Pool) -> bool:
        """Whether a request to the tier would be answered now: an engine can, and this lets it."""
        return pool.can_answer and (self._mode != "enforce" or self.standing(pool).has_passed)

    def check(self, pool: Pool, standing: Standing) -> None:
        """Decide on a request to a tier that stands so.

        Raises:
            TierNotCertified: it has not passed, and is to be refused.
            Refusal: the same while none of its engines can answer: what they say of when they can.
        """
        if self._mode == "off":
            return
        if standing.has_passed:
            self._warned_of.pop(pool, None)
        elif self._mode == "enforce" and pool.service.is_paused:
            return  # it waits for an engine that is started again, and is checked once that is there
        elif self._mode == "enforce":
            # Whoever waited for an engine that starts would be answered by it, whatever it turned out to be.
            raise TierNotCertified(pool.tier.name, standing.reasons) if pool.can_answer else pool.unavailable()
        elif standing is not self._warned_of.get(pool) and pool.can_answer:
            self._warn(pool, standing)

    def _warn(self, pool: Pool, standing: Standing) -> None:
        if standing != self._warned_of.get(pool):
            log.warning(
                "%s is served, and no certificate says that it passes: %s",
                pool.tier.name,
                " ".join(standing.reasons),
            )
        self._warned_of[pool] = standing
