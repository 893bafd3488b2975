"""Where a replica is in its life."""

from enum import StrEnum


class State(StrEnum):
    """From its start to its end; several come more than once."""

    STARTING = "starting"
    WARMING_UP = "warming up"
    READY = "ready"
    ASLEEP = "asleep"
    SUSPENDED = "suspended"
    DRAINING = "draining"
    RESTARTING = "restarting"
    REFUSED = "refused"
    STOPPED = "stopped"


UP = frozenset({State.READY, State.ASLEEP, State.SUSPENDED, State.DRAINING})
"""Those in which there is an engine to watch."""
