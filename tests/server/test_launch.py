"""A process tree lives no longer than whoever started it."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from server.launch.process import LocalProcess
from tests.server.conftest import Gateway

TREE = """
import subprocess, sys, time
children = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
print("up", *(child.pid for child in children), flush=True)
{end}
"""
WAITS = TREE.format(end="time.sleep(600)")
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITS
ENDS = TREE.format(end="sys.exit(3)")


async def start(script: str, folder: Path) -> tuple[LocalProcess, list[psutil.Process]]:
    """The script under a tether, and its two children."""
    process = await LocalProcess.start([sys.executable, "-c", script], {}, folder / "log")
    while not process.tail().startswith("up"):
        await asyncio.sleep(0.02)
    return process, [psutil.Process(int(pid)) for pid in process.tail().split()[1:] if psutil.pid_exists(int(pid))]


def none_remains(processes: list[psutil.Process], seconds: float = 5) -> bool:
    until = time.monotonic() + seconds
    while any(process.is_running() for process in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def lives(process: psutil.Process) -> bool:
    """Whether it does; one that only waits for its new parent to take note of its end does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_stopping_ends_the_whole_tree(tmp_path: Path) -> None:
    process, children = await start(WAITS, tmp_path)
    assert len(children) == 2
    await process.stop()
    assert none_remains(children, 0)
    await process.stop()


async def test_children_of_a_command_that_ended_are_ended(tmp_path: Path) -> None:
    process, children = await start(ENDS, tmp_path)
    assert await process.wait() == 3
    assert none_remains(children, 0)


async def test_a_killed_tether_leaves_nothing_once_stopped(tmp_path: Path) -> None:
    process, children = await start(WAITS, tmp_path)
    tree = psutil.Process(children[0].ppid())
    os.kill(tree.ppid(), signal.SIGKILL)
    await process.wait()
    await process.stop()
    assert not any(map(lives, [tree, *children]))


def test_the_tree_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        tether = subprocess.Popen(
            [sys.executable, "-m", "server.launch.tether", "0.1", sys.executable, "-c", STUBBORN],
            stdin=subprocess.PIPE,
            stdout=output,
        )
    while not log.read_text().startswith("up"):
        time.sleep(0.02)
    children = [psutil.Process(int(pid)) for pid in log.read_text().split()[1:]]
    assert tether.stdin is not None
    tether.stdin.close()  # what the kernel does to a killed starter's pipe
    assert tether.wait(10) == 128 + signal.SIGKILL
    assert none_remains(children, 0)


LEAVES_A_SOCKET = """
import os, pathlib, socket
folder = pathlib.Path(os.environ["VLLM_RPC_BASE_PATH"])
socket.socket(socket.AF_UNIX).bind(str(folder / "0c0ffee0-0000-4000-8000-000000000000"))
print(folder)
"""


async def test_sockets_of_an_engine_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM leaves some in the temporary folder each time it is ended."""
    temporary = Path(tempfile.mkdtemp())  # a socket's path is short, and pytest's folders are not
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(temporary))
    process = await LocalProcess.start([sys.executable, "-c", LEAVES_A_SOCKET], {}, tmp_path / "log")
    assert await process.wait() == 0, process.tail()
    assert Path(process.tail()).parent == temporary
    temporary.rmdir()  # it is empty


async def test_a_folder_too_deep_for_sockets_is_left_to_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(deep))
    process = await LocalProcess.start(
        [sys.executable, "-c", "import os; print(os.environ['VLLM_RPC_BASE_PATH'])"], {}, tmp_path / "log"
    )
    assert await process.wait() == 0
    assert process.tail() == str(deep)


MANY = WAITS.replace("range(2)", "range(40)")


@pytest.mark.parametrize("later", [0, 0.002, 0.005, 0.01])
async def test_stopping_a_tether_that_cleans_up_does_not_stop_it(tmp_path: Path, later: float) -> None:
    process, children = await start(MANY, tmp_path)
    os.kill(children[0].ppid(), signal.SIGKILL)
    await asyncio.sleep(later)
    await process.stop()
    assert none_remains(children, 0)


async def test_a_stop_that_is_cut_short_can_be_repeated(tmp_path: Path) -> None:
    process, children = await start(STUBBORN, tmp_path)
    stopping = asyncio.create_task(process.stop())
    await asyncio.sleep(0.05)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    os.kill(children[0].ppid(), signal.SIGKILL)
    await process.stop()
    assert none_remains(children, 0)


@pytest.mark.parametrize("whom", ["the command", "a child", "the tether", "all of it"])
async def test_a_tree_that_was_stopped_takes_no_sigterm_and_is_ended_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whom: str
) -> None:
    """As an engine that hangs: its API server, its core, a worker, or whatever SIGSTOP reached."""
    monkeypatch.setattr("server.launch.process.GRACE_S", 0.1)
    monkeypatch.setattr("server.launch.process.TETHER_GRACE_S", 0.1)
    process, children = await start(WAITS, tmp_path)
    command = psutil.Process(children[0].ppid())
    tether = psutil.Process(command.ppid())
    stopped = {"the command": [command], "a child": children[:1], "the tether": [tether]}
    for each in stopped.get(whom, [tether, command, *children]):
        each.send_signal(signal.SIGSTOP)
    await asyncio.wait_for(process.stop(), 5)
    assert not any(map(lives, [tether, command, *children]))


async def test_a_replica_whose_stop_is_cut_short_still_has_its_engine(gateway: Gateway, tmp_path: Path) -> None:
    """As when SIGTERM comes while a keeper is ending an engine: the stop that follows must end it."""
    process, children = await start(STUBBORN, tmp_path)
    gateway.replica.hold(process)
    stopping = asyncio.create_task(gateway.replica.stop())
    await asyncio.sleep(0.05)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    os.kill(children[0].ppid(), signal.SIGKILL)  # not to wait for the grace of one that ignores SIGTERM
    await gateway.replica.stop()
    assert none_remains(children, 0)


async def test_a_folder_named_like_ours_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("raise SystemExit('the wrong server')")
    monkeypatch.chdir(tmp_path)
    process = await LocalProcess.start([sys.executable, "-c", "print('right')"], {}, tmp_path / "log")
    assert await process.wait() == 0
    assert process.tail() == "right"


async def test_the_previous_log_is_kept(tmp_path: Path) -> None:
    for text in ("first", "second"):
        process = await LocalProcess.start([sys.executable, "-c", f"print('{text}')"], {}, tmp_path / "a.log")
        await process.wait()
    assert (tmp_path / "a.log").read_text().strip() == "second"
    assert (tmp_path / "a.previous.log").read_text().strip() == "first"


async def test_a_log_that_is_cut_off_while_it_is_written_begins_anew(tmp_path: Path) -> None:
    """As logrotate does it by copytruncate; otherwise a hole as large as what was there would be in front."""
    log, cut = tmp_path / "a.log", tmp_path / "cut"
    waits = f"while not os.path.exists({str(cut)!r}): time.sleep(0.01)"
    told = f"import os, time; print('first', flush=True)\n{waits}\nprint('second')"
    process = await LocalProcess.start([sys.executable, "-c", told], {}, log)
    async with asyncio.timeout(10):
        while not log.read_text():
            await asyncio.sleep(0.01)
    os.truncate(log, 0)
    cut.touch()
    await process.wait()
    assert log.read_bytes() == b"second\n"
