"""What the gateway listens on: the socket, whom it may be reached by, and uvicorn's server on it."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from server.app import Gateway
from server.config import Config
from server.connections import ConnectionLimits, connection_class
from server.keys import Keys
from server.launch.process import GRACE_S
from server.line import notice_the_gone
from server.metrics import Metrics
from tiers.errors import AssayError, ConfigError

LAST_WORDS_S = 5.0
"""After the engines are gone: for the error events of the streams they broke off to reach their callers."""


class PortTaken(AssayError):
    """The address to listen on cannot be had."""


class Server(uvicorn.Server):
    """uvicorn without signal handlers: signals end the fleet first, which is `serve`'s to decide."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


def listening_socket(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """The socket the gateway will answer on; taken first, so that a port in use is found before any work.

    With ``shared`` it is one of several on a port that `reserved_port` holds.

    Raises:
        PortTaken: somebody has it, or the address is not this machine's.
    """
    listener = _bound(host, port, shared=shared, listens=True)
    notice_the_gone(listener)
    return listener


def reserved_port(host: str, port: int) -> socket.socket:
    """Holds a port that several processes will listen on: a socket that accepts nobody.

    Raises:
        PortTaken: somebody has it, or the address is not this machine's.
    """
    reserved = _bound(host, port)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # only now: nobody was to be joined
    return reserved


def _bound(host: str, port: int, *, shared: bool = False, listens: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
        if listens:  # at once: until then somebody else could bind it too
            bound.listen(2048)
    except OSError as error:
        bound.close()
        raise PortTaken(
            f"{host}:{port} cannot be had ({error.strerror}): stop what uses it or choose another by --port."
        ) from error
    return bound


def check_reach(listener: socket.socket, keys: Keys) -> None:
    """Without keys nobody but this machine may reach the gateway.

    The address is the one that was bound, which is what a name such as localhost came to.

    Raises:
        ConfigError: others can reach it, and it would answer anybody.
    """
    host = listener.getsockname()[0]
    if not (keys.required or ipaddress.ip_address(host).is_loopback):
        raise ConfigError(
            f"On {host} others can reach this server, and without keys it would answer anybody: run `assay keys "
            "add NAME` first, or listen on 127.0.0.1."
        )


def http_server(app: Gateway, config: Config, metrics: Metrics) -> Server:
    """What speaks HTTP in front of ``app``."""
    limits = ConnectionLimits(config.header_timeout_s, config.keep_alive_s, config.max_connections)
    return Server(
        uvicorn.Config(
            app,
            loop="uvloop",
            http=connection_class(limits, lambda refusal: metrics.connections_refused.labels(refusal.code).inc()),
            ws="none",
            proxy_headers=False,  # nothing here asks who the caller's address belongs to
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(config.drain_timeout_s + GRACE_S + LAST_WORDS_S),
        )
    )


def url_of(listener: socket.socket) -> str:
    """How to reach it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
