"""What the limits of a key cost a request: counted in the process, and in a Redis on this machine.

usage: make bench-limits ARGS="[--requests N]"

CPU time of this process, which is what a gateway has least of, and the time from asking to answer with one request
at once; of a request with limits of each kind, begun, charged and ended.
"""

import argparse
import asyncio
import statistics
import time
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from server.keys import Key
from server.limits import Limits, LocalLimits
from server.shared_limits import SharedLimits
from tests.server.redis_server import redis_server

PLENTY = 1_000_000_000
KINDS: dict[str, dict[str, int]] = {
    "requests a minute": {"requests_per_minute": PLENTY},
    "tokens a minute": {"tokens_per_minute": PLENTY},
    "requests at once": {"concurrent_requests": PLENTY},
}
KINDS["all three"] = {name: value for limits in KINDS.values() for name, value in limits.items()}
AT_ONCE = 32


async def request(limits: Limits, key: Key) -> None:
    """One, from its headers to its end."""
    entry, charge = await limits.enter(key), None
    if key.tokens_per_minute is not None:
        _, charge = await limits.take_tokens(key, key.tokens_per_minute, 100)
    await limits.leave(key, entry, charge, 40)


async def measure(limits: Limits, key: Key, requests: int) -> tuple[float, float]:
    """Microseconds of CPU per request with many at once, and of the median one's time alone."""
    alone = []
    for _ in range(requests // 10):
        began = time.perf_counter()
        await request(limits, key)
        alone.append(time.perf_counter() - began)

    async def in_turn() -> None:
        for _ in range(requests // AT_ONCE):
            await request(limits, key)

    began = time.process_time()
    await asyncio.gather(*(in_turn() for _ in range(AT_ONCE)))
    cpu = (time.process_time() - began) / (requests // AT_ONCE * AT_ONCE)
    return cpu * 1e6, statistics.median(alone) * 1e6


async def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4000)
    requests: int = parser.parse_args().requests
    table = Table("limits", "counted", "CPU per request", "alone, median")
    with redis_server() as redis:
        places: dict[str, Limits] = {"in the process": LocalLimits(), "in Redis": SharedLimits(redis.url, None)}
        for kind, limited in KINDS.items():
            for place, limits in places.items():
                made = datetime.now(UTC)
                key = Key.model_validate(
                    {"name": "ann", "id": "0" * 12, "salt": b"0" * 16, "hash": b"0" * 32, "created": made}
                    | limited
                )
                before = redis.scripts_run()
                cpu, alone = await measure(limits, key, requests)
                asked = (redis.scripts_run() - before) / (requests // 10 + requests // AT_ONCE * AT_ONCE)
                trips = f"{place}, {asked:.2f} round trips" if asked else place
                table.add_row(kind, trips, f"{cpu:.0f} µs", f"{alone:.0f} µs")
        for limits in places.values():
            await limits.close()
    Console().print(table)


if __name__ == "__main__":
    asyncio.run(main())
