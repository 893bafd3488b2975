"""What is known of a request while it is handled: for the lines of the log, for its trace, for the access log."""

from dataclasses import dataclass

from server.answer import Usage
from server.errors import Refusal
from server.tracing.trace import UNTRACED, Trace

CLIENT_CLOSED_REQUEST = 499
"""Nobody gets this status; it is how metrics and log tell callers who left, after nginx's custom."""
CLIENT_LEFT = "client_left"
"""What such a request ended with, among the codes of errors."""


def code_of(refusal: Refusal) -> str:
    """What kind of error it is: its code, or OpenAI's type where that has to do."""
    return refusal.code or refusal.type


@dataclass(slots=True)
class Record:
    """One request. Nothing in it is a caller's words, but for the name that the caller may give the request."""

    request_id: str
    trace: Trace = UNTRACED
    tier: str | None = None
    """Once it is known."""
    key: str | None = None
    """Whose it is: the name, and never the key."""
    usage: Usage | None = None
    first_token: float | None = None
    """When that of a stream was sent; what heartbeats and errors begin has none."""
    code: str | None = None
    """Of the error that it ended with."""
    has_failed: bool = False
    """By a fault of ours or of an engine's."""
    has_left: bool = False
    """Its caller has, before the answer ended."""
    is_over: bool = False
    """Whoever goes on then, in a task that this request began, works for nobody in particular."""

    def refused(self, refusal: Refusal) -> None:
        """It ended with this error."""
        self.code = code_of(refusal)
        self.has_failed = refusal.status >= 500

    def left(self) -> None:
        """Its caller has."""
        self.code, self.has_left = CLIENT_LEFT, True
