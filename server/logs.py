"""How the log is written: a text for people, or a JSON object a line for programs; either names the request."""

import logging
import os
import sys
from contextvars import ContextVar
from types import TracebackType
from typing import IO, Literal, Protocol

LOG_FORMAT = "ASSAY_LOG_FORMAT"
"""In the environment: json, or text."""
LogFormat = Literal["text", "json"]

log = logging.getLogger("assay")


class NamedTrace(Protocol):
    """The trace that a request is told in, if it is."""

    @property
    def ids(self) -> tuple[str, str] | None:
        """Of the trace, and of the gateway's part in it."""


class Handled(Protocol):
    """What a line says of the request that is handled where it is written."""

    @property
    def request_id(self) -> str:
        """Its name."""

    @property
    def tier(self) -> str | None:
        """Once it is known."""

    @property
    def trace(self) -> NamedTrace:
        """Where it is told."""

    @property
    def is_over(self) -> bool:
        """Whether whoever writes works for it no more."""


CURRENT: ContextVar[Handled | None] = ContextVar("assay.request", default=None)
"""The request which is handled here; each has a task of its own."""


class OfRequest(logging.Filter):
    """Adds to a line what is known of the request that is handled where it is written."""

    def filter(self, record: logging.LogRecord) -> bool:
        request = CURRENT.get()
        if request is not None and not request.is_over:
            record.request_id = request.request_id
            if request.tier is not None:
                record.tier = request.tier
            if request.trace.ids is not None:
                record.trace_id, record.span_id = request.trace.ids
        return True


class TextFormatter(logging.Formatter):
    """A line for people: its time if asked for, and at its end the request, if its text does not name it."""

    def __init__(self, *, with_time: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s" if with_time else "%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        text, request_id = super().formatMessage(record), getattr(record, "request_id", None)
        return text if request_id is None or request_id in text else f"{text} [{request_id}]"


class JsonHandler(logging.StreamHandler[IO[str]]):
    """A JSON object a line: time, level, logger, message, exception, and whatever else is known."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        # msgspec's, which writes times as RFC 3339 has them.
        from pythonjsonlogger.core import RESERVED_ATTRS
        from pythonjsonlogger.msgspec import MsgspecFormatter

        self.setFormatter(
            MsgspecFormatter(
                ["levelname", "name", "message"],
                rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
                timestamp="time",
                reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
            )
        )


def format_asked_for() -> LogFormat:
    """What the environment says, before there is a config; whether it is a format, `load_config` says."""
    return "json" if os.environ.get(LOG_FORMAT) == "json" else "text"


def log_by(handler: logging.Handler) -> None:
    """Write the whole log by this handler: warnings, and of Assay's own what a program may want to know."""
    handler.addFilter(OfRequest())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    is_json = isinstance(handler, JsonHandler)
    log.setLevel(logging.INFO if is_json else logging.NOTSET)
    logging.captureWarnings(is_json)
    sys.excepthook = _log_exception if is_json else sys.__excepthook__


def writes_json() -> bool:
    """Whether it is for programs: then nothing else is to be written beside it."""
    return any(isinstance(handler, JsonHandler) for handler in logging.getLogger().handlers)


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("%s ended the program", kind.__name__, exc_info=(kind, error, trace))
