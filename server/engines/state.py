"""Where a replica is in its life."""

from enum import StrEnum


class State(StrEnum):
    """From its start to its end; several come more than once.

    An engine that somebody else stops is `DRAINING`. So is shown, or as `DRAINED`, what an operator has out of
    service here (`Service.shown`).
    """

    STARTING = "starting"
    WARMING_UP = "warming up"
    READY = "ready"
    ASLEEP = "asleep"
    SUSPENDED = "suspended"
    DRAINING = "draining"
    DRAINED = "drained"
    RESTARTING = "restarting"
    REFUSED = "refused"
    STOPPED = "stopped"


UP = frozenset({State.READY, State.ASLEEP, State.SUSPENDED, State.DRAINING})
"""Those in which there is an engine to watch."""
FIRST = frozenset({State.STARTING, State.WARMING_UP, State.STOPPED})
"""Those before there is an engine for the first time; `STOPPED` is also that of one that is not to be started."""
