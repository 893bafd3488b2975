"""One line of the log for every request that has ended: who, what for, how long, and nothing of what was said."""

import logging
import time
from collections.abc import Collection

from server.exchange import OTHER, Reply, Scope, known_method
from server.health import OPEN_PATHS
from server.record import CLIENT_CLOSED_REQUEST

log = logging.getLogger("assay.access")


class AccessLog:
    """What `access_log: true` writes."""

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = paths
        log.setLevel(logging.INFO)

    def write(self, scope: Scope, reply: Reply) -> None:
        """The line of a request; none of an orchestrator's, which asks every few seconds."""
        record, path = reply.record, self._path_of(scope)
        if path in OPEN_PATHS:
            return
        method = known_method(scope["method"])
        status = CLIENT_CLOSED_REQUEST if record.has_left else reply.status or 500
        seconds = round(time.monotonic() - reply.request_began, 4)
        facts: dict[str, object] = {"method": method, "path": path, "status": status, "seconds": seconds}
        if record.usage is not None:
            facts |= {"prompt_tokens": record.usage.prompt, "answer_tokens": record.usage.answer}
        if record.key is not None:
            facts["key"] = record.key
        if record.code is not None:
            facts["error"] = record.code
        further = {"tier": record.tier, **facts} if record.tier else facts
        log.info("request: %s", " ".join(f"{name}={value}" for name, value in further.items()), extra=facts)

    def _path_of(self, scope: Scope) -> str:
        if scope["path"] in self._paths:
            return str(scope["path"])
        return str(getattr(scope.get("route"), "path", OTHER))  # with {names} instead of what was given for them
