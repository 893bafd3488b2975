"""Starts an engine again whenever it has ended or hangs, waiting longer after each failure. Knows no callers."""

import asyncio
import logging
import time

from server.engines.replica import FIRST_BACKOFF_S, Replica
from server.engines.state import UP, State
from tiers.errors import AssayError

log = logging.getLogger("assay.replica")

LONGEST_BACKOFF_S = 60.0


async def keep(replica: Replica) -> None:
    """Watch its engine for ever, or until one is refused."""
    backoff = FIRST_BACKOFF_S
    while replica.state is not State.REFUSED:
        if replica.state in UP:
            ready_since = time.monotonic()
            await replica.until_it_fails()
            if time.monotonic() - ready_since > LONGEST_BACKOFF_S:
                backoff = FIRST_BACKOFF_S
        await replica.clear_away(backoff)
        log.warning("%s: the engine ended; trying again in %.0f s", replica.name, backoff)
        await asyncio.sleep(backoff)
        backoff = min(backoff * 2, LONGEST_BACKOFF_S)
        try:
            await replica.start_again()
        except AssayError as error:
            log.error("%s", error)  # noqa: TRY400  # the sentence says it all
        except Exception:
            # Whatever it was, the next try may do better; a keeper that ends would leave its tier dead.
            log.exception("%s: starting the engine failed", replica.name)
        else:
            log.warning("%s: the engine is back", replica.name)
