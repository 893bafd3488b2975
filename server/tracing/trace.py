"""What the gateway tells a request's trace. Knows no OpenTelemetry, whose SDK is only imported for tracing."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from server.call import Call
    from server.engines.replica import Replica
    from server.exchange import Reply, Send

_NOTHING = nullcontext()


class Trace(Protocol):
    """One request's. Nothing is called for a part of a stream: what does not trace is to cost nothing."""

    header: str
    """Lines of a request to an engine, by which that continues the trace."""
    ids: tuple[str, str] | None
    """Of the trace and of the gateway's span, in hexadecimal."""

    def overhears(self, send: "Send") -> "Send":
        """What the answer is to be sent by."""

    def asked(self, call: "Call", body: bytes, tier: str) -> None:
        """The body was read, and it is this tier that is to answer."""

    def waits(self) -> None:
        """It waits for its turn from now on."""

    def admitted(self) -> None:
        """It has its place."""

    def attempt(self, replica: "Replica", path: str) -> AbstractContextManager[None]:
        """Within the block this replica works on it, whose engine is asked at this path."""

    def end(self, reply: "Reply") -> None:
        """It is answered, or will not be."""


class Untraced:
    """That of a request which is not traced."""

    header = ""
    ids: tuple[str, str] | None = None

    def overhears(self, send: "Send") -> "Send":
        return send

    def asked(self, call: "Call", body: bytes, tier: str) -> None:
        pass

    def waits(self) -> None:
        pass

    def admitted(self) -> None:
        pass

    def attempt(self, replica: "Replica", path: str) -> AbstractContextManager[None]:
        return _NOTHING

    def end(self, reply: "Reply") -> None:
        pass


UNTRACED: Trace = Untraced()
