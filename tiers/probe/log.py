"""Keeps callers' words out of an engine's log, and whatever would steer a terminal; loaded inside the engine.

vLLM 0.32 logs some requests that it refuses with a traceback, and the words of such an exception repeat what the
caller sent: stop words, parts of a schema, line breaks included.
"""

import logging
import re
import traceback
from collections.abc import Iterator
from typing import Any

_STEERING = re.compile(r"[^\n\t\x20-\x7e\xa0-\u2027\u202a-\U0010ffff]")
_HANDLES_REQUESTS = re.compile(r"/(vllm/entrypoints|vllm/v1/structured_output|xgrammar)/")
"""Code whose exceptions may quote a request. Those of the rest, as of a GPU without memory, are worth reading."""


class CleanRecord(logging.LogRecord):
    """A line of a log without control characters."""

    def getMessage(self) -> str:  # noqa: N802
        return _clean(super().getMessage())


def keep_log_clean() -> None:
    """From now on, in this process, whatever logger and handler it is."""
    make = logging.getLogRecordFactory()  # vLLM's, which notes the process's name

    def make_clean(*args: Any, **fields: Any) -> logging.LogRecord:
        record = make(*args, **fields)
        record.__class__ = CleanRecord
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = _clean("".join(_told(record.exc_info[1])).rstrip("\n"))  # formatters then make none
        return record

    logging.setLogRecordFactory(make_clean)


def _clean(text: str) -> str:
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def _told(error: BaseException) -> Iterator[str]:
    """The traceback as Python would tell it, what led to this first."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) and before not in chain:
        chain.append(before)
    frames = [traceback.extract_tb(each.__traceback__) for each in chain]
    is_callers = any(_HANDLES_REQUESTS.search(frame.filename) for each in frames for frame in each)
    for each, its_frames in zip(reversed(chain), reversed(frames), strict=True):
        yield "Traceback (most recent call last):\n"
        yield from its_frames.format()
        name = f"{type(each).__module__}.{type(each).__qualname__}"
        yield f"{name}, whose words may be a caller's\n" if is_callers else f"{name}: {each}\n"
