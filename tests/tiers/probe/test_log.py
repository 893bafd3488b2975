"""What an engine writes to its log, whoever logs it: no words of callers, and nothing that steers a terminal."""

import logging
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest

from tiers.probe.log import keep_log_clean

CALLERS = "word\r\x1b[31mERROR forged\x85\u2028"


@pytest.fixture
def written() -> Iterator[StringIO]:
    """What has been written since, by a handler that knows nothing of any of this."""
    factory, output = logging.getLogRecordFactory(), StringIO()

    def name_process(*args: Any, **fields: Any) -> logging.LogRecord:
        record = factory(*args, **fields)
        record.vllm_process_name = "Worker"
        return record

    logging.setLogRecordFactory(name_process)  # as vLLM does
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter("%(vllm_process_name)s %(message)s"))
    logging.getLogger("vllm").addHandler(handler)
    keep_log_clean()
    yield output
    logging.setLogRecordFactory(factory)
    logging.getLogger("vllm").removeHandler(handler)


def fail_in(file: str) -> None:
    """An exception as that file's code would raise it, caused by another."""
    cause = "def fail(said):\n try:\n  raise KeyError(said)\n"
    text = f"{cause} except KeyError as error:\n  raise ValueError(said) from error"
    scope: dict[str, object] = {}
    exec(compile(text, file, "exec"), scope)
    scope["fail"](CALLERS)  # type: ignore[operator]


@pytest.mark.parametrize(
    "file", ["/x/vllm/entrypoints/openai/chat_completion/serving.py", "/x/xgrammar/grammar.py"]
)
def test_an_exception_that_a_request_caused_is_told_without_its_words(written: StringIO, file: str) -> None:
    try:
        fail_in(file)
    except ValueError:
        logging.getLogger("vllm.engine").exception("Error in stream.")
    told = written.getvalue()
    assert "forged" not in told
    assert told.startswith("Worker Error in stream.\nTraceback")
    assert told.index("builtins.KeyError") < told.index("builtins.ValueError")
    assert f'File "{file}", line 5, in fail' in told


def test_any_other_exception_says_what_is_wrong_and_steers_no_terminal(written: StringIO) -> None:
    try:
        fail_in("/x/vllm/v1/worker/gpu_worker.py")
    except ValueError:
        logging.getLogger("vllm.engine").exception("Error in step.")
    assert "builtins.ValueError: word\\r\\x1b[31mERROR forged\\x85\\u2028" in written.getvalue()


def test_a_message_steers_no_terminal(written: StringIO) -> None:
    logging.getLogger("vllm.engine").warning("found %s", CALLERS)
    assert written.getvalue() == "Worker found word\\r\\x1b[31mERROR forged\\x85\\u2028\n"
