"""Starts an engine again whenever it has ended or hangs, waiting longer after each failure. Knows no callers."""

import asyncio
import logging
import time

from server.engines.going_on import goes_well
from server.engines.replica import FIRST_BACKOFF_S, Replica
from server.engines.state import UP, State

log = logging.getLogger("assay.replica")

LONGEST_BACKOFF_S = 60.0


async def keep(replica: Replica) -> None:
    """Watch its engine for ever, or until one is refused."""
    backoff = FIRST_BACKOFF_S
    while replica.state is not State.REFUSED:
        if replica.state in UP:
            ready_since = time.monotonic()
            await goes_well(replica.name, replica.until_it_fails())
            if time.monotonic() - ready_since > LONGEST_BACKOFF_S:
                backoff = FIRST_BACKOFF_S
        is_clear = await goes_well(replica.name, replica.clear_away(backoff))
        what = "the engine ended" if replica.failed.is_set() else "no engine has come up"
        log.warning("%s: %s; trying again in %.0f s", replica.name, what, backoff)
        await asyncio.sleep(backoff)
        backoff = min(backoff * 2, LONGEST_BACKOFF_S)
        # What is left of the last one is not to be lost sight of: first it has to be cleared away.
        if is_clear and await goes_well(replica.name, replica.start_again()):
            log.warning("%s: an engine is there", replica.name)
