"""What `assay engine` passes on of its engine's log."""

import os
import threading
import time
from pathlib import Path

import pytest

from server.commands import engine


def test_a_log_that_is_cut_off_is_still_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(engine, "FOLLOW_S", 0.01)
    log, over, shown = tmp_path / "engine.log", threading.Event(), b""
    following = threading.Thread(target=engine._follow, args=(log, 0, over), daemon=True)
    with log.open("ab", buffering=0) as written:
        following.start()
        for line in (b"what was there before it was cut off\n", b"and after\n"):
            os.truncate(log, 0)
            time.sleep(0.05)
            written.write(line)
            until = time.monotonic() + 5
            while line not in shown and time.monotonic() < until:
                time.sleep(0.01)
                shown += capfdbinary.readouterr().out
            assert line in shown
    over.set()
    following.join()
