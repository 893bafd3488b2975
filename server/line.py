"""How a connection ends: so that its last answer is read, and when a caller who is silent counts as gone.

Knows sockets and transports; knows no HTTP.
"""

import asyncio
import socket

LINGER_S = 2.0
LINGER_BYTES = 16 << 20
"""After a refusal: how long and how much of what still comes is thrown away, so that the refusal is read.

A socket closed over unread bytes resets the connection, and the reset overtakes the answer. Enough bytes for a
body somewhat over the limit of this server.
"""

GONE_AFTER_S = 60
"""A caller who has acknowledged nothing for so long, or read nothing of what waits for them, is cut off."""


def notice_the_gone(listener: socket.socket) -> None:
    """Have the system end the connections made here whose other side has vanished, or has stopped reading."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, GONE_AFTER_S // 2)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, GONE_AFTER_S // 4)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_AFTER_S * 1000)


class Line:
    """A transport as uvicorn sees it, with a `close` that lets the last answer arrive."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._ending: asyncio.TimerHandle | None = None
        self._left = LINGER_BYTES
        self.unread = False
        """Whether the client may still be sending what nobody will read."""
        self.closed = False
        # The transport's own, with nothing in between: an answer's bytes take this way.
        self.write = transport.write
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.get_extra_info = transport.get_extra_info

    def is_closing(self) -> bool:
        """Whether nothing more should be written."""
        return self.closed or self._transport.is_closing()

    def close(self) -> None:
        """End it once all is written; what the client may still be sending is thrown away for a bounded time."""
        if self.is_closing():
            return
        self.closed = True
        if self.unread and self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()
            self._ending = asyncio.get_running_loop().call_later(LINGER_S, self._transport.close)
        else:
            self._transport.close()

    def discard(self, count: int) -> None:
        """Throw away what came after the end."""
        self._left -= count
        if self._left < 0:
            self._transport.close()

    def lost(self) -> None:
        """There is nothing left to close."""
        self.closed = True
        if self._ending:
            self._ending.cancel()
