"""The operator's way to a running server: HTTP on a socket in its home, which nobody but its own user can open.

``POST /drain`` takes a `DrainWanted` and answers with lines of JSON, each an `Account`: where the work is, as it
gets on, and at last what came of it on each tier.
"""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.alone import alone
from server.config import Config, choose_tiers
from server.engines.drains import Drain, Drains, Work
from tiers.errors import AssayError

log = logging.getLogger("assay.control")

NAME = "socket"
LOOK_S = 0.2
"""How often it is looked whether the work has got on."""
STALLED_S = 3.0
"""At the latest then an account is given again: who asked learns so that somebody is there."""


class NoServer(AssayError):
    """No server runs from that home, or it does not answer its operator."""


class NoControl(AssayError):
    """There can be no socket for operators."""


class DrainWanted(BaseModel):
    """What an operator asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tier: str
    """A grade, which several models may have, or a name in full."""
    work: Work = Work.RESTART
    replica: int | None = Field(default=None, ge=1)
    timeout_s: float | None = Field(default=None, ge=0)


class Account(BaseModel):
    """Where the work on one tier is, or what came of it."""

    model_config = ConfigDict(frozen=True)

    tier: str
    replica: str | None = None
    """The one that is worked on, by its name for people."""
    doing: str | None = None
    running: int = 0
    """Requests that are waited for."""
    done: bool | None = None
    """Whether all was done; null while it lasts."""
    problem: str | None = None
    """Why it was not."""
    states: list[str] = []
    """Of the tier's replicas, once it is over."""


@asynccontextmanager
async def listening_for_operators(config: Config, drains: Drains) -> AsyncIterator[None]:
    """Take their requests within the block; a server that cannot says so and serves without.

    One that starts no engine has none of its own to end: `assay drain` is for whoever runs them.
    """
    if not config.tiers_started:
        yield
        return
    with ExitStack() as stack:
        runner = web.AppRunner(
            _app(config, drains), handler_cancellation=True, access_log=None, shutdown_timeout=1
        )
        await runner.setup()
        try:
            await web.SockSite(runner, stack.enter_context(_own_socket(_folder(config)))).start()
        except NoControl as error:
            log.warning("%s `assay drain` does not reach this server.", error)
        try:
            yield
        finally:
            await drains.close()
            await runner.cleanup()


async def ask_to_drain(config: Config, wanted: DrainWanted) -> AsyncGenerator[Account, None]:
    """Ask the server that runs from the config's home; who stops listening gives the work up.

    Raises:
        NoServer: there is none, or it was gone before the work was over.
    """
    folder = _folder(config)
    nobody = NoServer(
        f"No server that runs from {config.home} answers: it may be starting still, or have been started with "
        "another config or ASSAY_HOME, or by another user."
    )
    with ExitStack() as stack:
        try:
            path = stack.enter_context(_short(folder))
        except OSError as error:
            raise nobody from error
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path), timeout=timeout) as session:
            try:
                async with session.post("http://operator/drain", data=wanted.model_dump_json()) as answer:
                    if answer.status != 200:
                        raise NoServer(await answer.text())
                    async for line in answer.content:
                        yield Account.model_validate_json(line)
            except aiohttp.ClientConnectorError as error:
                raise nobody from error
            except (aiohttp.ClientError, ValidationError) as error:
                raise NoServer(
                    f"The server that runs from {config.home} ended before the work was done."
                ) from error


def _app(config: Config, drains: Drains) -> web.Application:
    async def drain(request: web.Request) -> web.StreamResponse:
        try:
            wanted = DrainWanted.model_validate_json(await request.read())
            tiers = choose_tiers(config, [wanted.tier])
        except (ValidationError, AssayError) as error:
            return web.Response(status=400, text=str(error))
        reply = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        await reply.prepare(request)
        for tier in tiers:
            async with aclosing(_accounts(drains, tier.name, wanted)) as accounts:
                async for account in accounts:
                    await reply.write(account.model_dump_json().encode() + b"\n")
            if account.problem:
                break
        await reply.write_eof()
        return reply

    app = web.Application()
    app.router.add_post("/drain", drain)
    return app


async def _accounts(drains: Drains, tier: str, wanted: DrainWanted) -> AsyncGenerator[Account, None]:
    """Of the work on one tier; whoever stops asking for them gives it up."""
    try:
        drain = drains.begin(tier, wanted.work, wanted.replica, wanted.timeout_s)
    except AssayError as error:
        yield Account(tier=tier, done=False, problem=str(error))
        return
    try:
        async for account in _while_it_lasts(drain):
            yield account
    finally:
        drain.give_up()  # which changes nothing once it is over
    problem = drain.task.exception() if not drain.task.cancelled() else AssayError("The server is stopping.")
    states = [drain.pool.service.shown(replica).value for replica in drain.pool.replicas]
    yield Account(tier=tier, done=problem is None, problem=str(problem) if problem else None, states=states)


async def _while_it_lasts(drain: Drain) -> AsyncGenerator[Account, None]:
    said, silent_s = drain.at, 0.0
    while not drain.task.done():
        await asyncio.wait({drain.task}, timeout=LOOK_S)
        silent_s += LOOK_S
        if (at := drain.at) is not None and (at != said or silent_s >= STALLED_S):
            said, silent_s = at, 0.0
            yield Account(tier=drain.pool.tier.name, replica=at.replica, doing=at.doing, running=at.running)


def _folder(config: Config) -> Path:
    return config.home / "control"


@contextmanager
def _short(folder: Path) -> Iterator[str]:
    """The path of the folder's socket, however long the folder's is: a socket's may have 107 bytes."""
    opened = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}/{NAME}"
    finally:
        os.close(opened)


@contextmanager
def _own_socket(folder: Path) -> Iterator[socket.socket]:
    """The socket in the folder, bound within the block; one that a killed server has left is replaced.

    Raises:
        NoControl: another server of the same home has its own there, or there can be none.
    """
    taken = NoControl(f"Another server runs from {folder.parent}, and operators reach that one.")
    with alone(folder, taken, NoControl), _short(folder) as path, socket.socket(socket.AF_UNIX) as own:
        (folder / NAME).unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            own.bind(path)
        except OSError as error:
            raise NoControl(f"{folder} takes no socket ({error.strerror}).") from error
        finally:
            os.umask(before)
        try:
            yield own
        finally:
            (folder / NAME).unlink(missing_ok=True)
