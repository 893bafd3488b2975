"""Which addresses a URL's host name has. Knows DNS; knows nothing of engines."""

import asyncio
import socket
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult


async def addresses_of(url: str) -> frozenset[str]:
    """All that the URL's host name has now, of IPv4 if there is any: with both, an engine would count twice.

    Raises:
        OSError: nobody can say.
    """
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(parts.hostname or "", parts.port, type=socket.SOCK_STREAM)
    families = {family for family, *_ in found}
    wanted = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    return frozenset(str(address[0]) for family, *_, address in found if family == wanted)


class OnlyThere(AbstractResolver):
    """Says of every name that it has one address: the one of the engine that is meant."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """That address."""
        own = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        return [ResolveResult(hostname=host, host=self._address, port=port, family=own, proto=0, flags=0)]

    async def close(self) -> None:
        """Nothing is held."""
