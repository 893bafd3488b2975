"""Goes on, whatever a step meets: what works for as long as the server does may not end by an error."""

import logging
from collections.abc import Awaitable

from tiers.errors import AssayError

log = logging.getLogger("assay.replica")


async def goes_well(name: str, step: Awaitable[None]) -> bool:
    """Whether the step came to its end; what went wrong is said, and not raised. ``name`` is of whom it is for."""
    try:
        await step
    except AssayError as error:
        log.error("%s", error)  # noqa: TRY400  # the sentence says it all
        return False
    except Exception:
        # Whatever it was, the next try may do better; a keeper that ends would leave its tier dead.
        log.exception("%s: who looks after it met something unforeseen", name)
        return False
    return True
