"""Where a replica is in its life."""

from enum import StrEnum


class State(StrEnum):
    """From its start to its end; several come more than once.

    `DRAINING` and `DRAINED` are how an operator's work on it is shown; see `Pool.shown`.
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


UP = frozenset({State.READY, State.ASLEEP, State.SUSPENDED})
"""Those in which there is an engine to watch."""
