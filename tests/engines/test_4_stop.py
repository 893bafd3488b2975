"""The end: what runs finishes, and nothing remains. The last file, for afterwards the server is gone."""

import signal
import socket
import threading
from typing import Any

import openai
import psutil
import pytest

from tests.engines.conftest import MODEL, Server

MESSAGES: Any = [{"role": "user", "content": "Count from one to one hundred in words."}]


@pytest.mark.timeout(240)
def test_sigterm_finishes_what_runs_and_leaves_nothing(assay: Server) -> None:
    assay.remember_processes()
    tokens, finish = 0, None
    stream = assay.client().chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    stopping = threading.Thread(target=assay.process.send_signal, args=(signal.SIGTERM,))
    stopping.start()
    for chunk in chunks:
        for choice in chunk.choices:
            tokens += 1
            finish = choice.finish_reason or finish
    stopping.join()
    assert finish == "length", "the answer that ran when SIGTERM came is whole"
    assert tokens >= 50
    assert assay.process.wait(60) == 0
    assert [process for process in assay.tree if process.is_running()] == []
    with pytest.raises(openai.APIConnectionError):
        assay.client().models.list()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(assay.url.rsplit(":", 1)[1])))


def test_no_process_of_the_server_remains_anywhere(assay: Server) -> None:
    config = str(assay.log.parent)
    remaining = [p for p in psutil.process_iter(["cmdline"]) if config in " ".join(p.info["cmdline"] or ())]
    assert remaining == []
