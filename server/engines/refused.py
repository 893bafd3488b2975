"""What an engine says of a request that it does not take: vLLM 0.32's own words, as a refusal."""

import re
from typing import Any

import msgspec

from server.errors import LONGEST_QUOTE, Refusal, cut


class EngineRefused(Refusal):
    """The engine itself refuses the request; its own sentence is passed on in the envelope."""

    STATUSES = frozenset({400, 404, 422})
    """With which it does so. Any other that is no success is about the engine, and not about the request."""
    _TOO_LONG = re.compile(
        r"maximum context length is|cannot be greater than max_model_len|exceeds the max_model_len"
        r"|must be at least 1, got 0"
    )
    """How vLLM 0.32 says that prompt and answer are longer than the model's context; of none at all, which it also
    says so, it is not asked."""
    _INVALID = re.compile(r"'loc': '(?:body\.)?([^']*)', 'msg': (?P<quote>['\"])(?P<what>.*?)(?P=quote)")
    """A field in its list of what is invalid, which is Python's and repeats what the caller sent."""

    def __init__(self, status: int, message: str, param: str | None) -> None:
        if invalid := self._INVALID.search(message):
            message = f"{invalid[1]}: {invalid['what']}."
        super().__init__(cut(message))
        self.status = status
        self.param = param.removeprefix("body.")[:LONGEST_QUOTE] if param else None
        if self._TOO_LONG.search(message):
            self.code = "context_length_exceeded"

    @classmethod
    def read(cls, status: int | None, body: bytes) -> "EngineRefused":
        """What vLLM says of a request it does not take, in any of its shapes.

        Without a ``status``, as in a stream, it is the one that the error names.
        """
        try:
            answer: Any = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            answer = {}
        error = answer.get("error", answer) if isinstance(answer, dict) else {}
        if not isinstance(error, dict):
            error = {"message": str(error)}
        if status is None:
            status = error["code"] if isinstance(error.get("code"), int) else 500
        message = error.get("message") or error.get("detail") or f"The engine refused the request ({status})."
        param = error.get("param")
        return cls(status, str(message), param if isinstance(param, str) else None)
