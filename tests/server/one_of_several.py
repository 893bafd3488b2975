"""One gateway process of several, with real HTTP in front and an engine of the test's behind."""

import asyncio
import json
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from server.worker import Worker


async def _run(home: Path, fields: dict[str, Any], worker: Worker) -> None:
    from aiohttp import web  # nothing of which `cannot_begin` needs

    from server.config import Config
    from server.listener import http_server
    from tests.server.conftest import running_gateway
    from tests.server.test_admission import USAGE

    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)

    async def handler(request: web.Request) -> web.StreamResponse:
        if "at the end" in json.loads(await request.read())["messages"][0]["content"]:
            await asked.wait()  # so that it is under way when the end is asked for
        body = {"choices": [], "usage": USAGE, "pid": os.getpid()}
        return web.json_response(body)

    async with AsyncExitStack() as stack:
        folder = home / str(os.getpid())
        gateway = await stack.enter_async_context(
            running_gateway(folder, scrape=worker.scrape, max_waiting=64, **fields)
        )
        gateway.handler = handler
        await stack.enter_async_context(worker.telling(gateway.metrics))
        server = http_server(gateway.app, Config(home=folder), gateway.metrics)
        serving = asyncio.create_task(server.serve([worker.listen()]))
        while not server.started:
            await asyncio.sleep(0.01)
        worker.tell_ready()
        await asked.wait()
        server.should_exit = True
        await serving


def run(home: Path, fields: dict[str, Any], worker: Worker) -> None:
    """Answer until SIGTERM."""
    asyncio.run(_run(home, fields, worker))


def cannot_begin(worker: Worker) -> None:
    """End at once."""
    raise SystemExit(3)
