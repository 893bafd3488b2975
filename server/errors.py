"""Everything the gateway refuses, each a class with one sentence; OpenAI's error envelope, made in one place."""

from typing import Any

import msgspec


class Refusal(Exception):
    """A request that gets an error instead of an answer."""

    status: int = 400
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the answer."""
        return {}


class BodyRefused(Refusal):
    """The body is not JSON, or lacks a field that routing needs."""


class BodyTooLarge(Refusal):
    """The body is over the configured limit; it was not read to its end."""

    status, code = 413, "request_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than {limit} bytes, the limit of this server.")


class KeyMissing(Refusal):
    """A key is needed, and the request has none; like every refusal of a key it does not repeat what was sent."""

    status, code = 401, "missing_api_key"

    def __init__(self) -> None:
        super().__init__("This server asks for an API key: send it as `authorization: Bearer sk-assay-…`.")

    @property
    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class KeyInvalid(Refusal):
    """The request's key is none of this server's, or no longer."""

    status, code = 401, "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("This API key is not known here; it may be mistyped, or have been removed.")

    @property
    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class MalformedRequest(Refusal):
    """What came is not HTTP, or not as this server reads it; where the next request begins is not known."""

    code = "malformed_request"


class HeadersTooLarge(Refusal):
    """The request's line and headers are over what is read of them."""

    status, code = 431, "headers_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request line and headers are larger than {limit} bytes, the limit of this server.")


class HeadTooSlow(Refusal):
    """The request's line and headers did not come in time."""

    status, code = 408, "request_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request line and headers did not all come within {limit_s:g} s.")


class TooManyConnections(Refusal):
    """The gateway has as many callers connected as it may have."""

    status, type, code = 503, "server_error", "too_many_connections"

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} connections are open, the limit of this server; try again in a moment.")

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": "1"}


class ModelNotFound(Refusal):
    """No tier answers to that name; no other tier ever answers in its place."""

    status, code, param = 404, "model_not_found", "model"

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"The model {name!r} does not exist here. The models are: {', '.join(known)}.")


class TierUnavailable(Refusal):
    """The tier is configured, but its engine is not ready."""

    status, type, code = 503, "server_error", "tier_unavailable"

    def __init__(self, tier: str, state: str, retry_after: int) -> None:
        super().__init__(f"{tier} cannot answer now, its engine is {state}; try again in {retry_after} s.")
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(self.retry_after)}


class TierNotVerified(Refusal):
    """The tier's engine was seen to compute something else than the tier declares; it is not served."""

    status, type, code = 503, "server_error", "tier_not_verified"

    def __init__(self, tier: str, disagreements: tuple[str, ...]) -> None:
        super().__init__(
            f"{tier} is not served, its engine does not compute what is declared: {disagreements[0]}."
        )


class PrecisionNotAvailable(Refusal):
    """The caller pinned a precision that the named tier does not have; no other tier ever answers in its place."""

    status, code, param = 400, "precision_not_available", "precision"

    def __init__(self, pinned: str, tier: str, precision: str, elsewhere: list[str]) -> None:
        hint = f" {' and '.join(elsewhere)} would." if elsewhere else " No tier of this model does."
        super().__init__(f"{tier} computes in {precision} and does not answer in {pinned!r}.{hint}")


class EngineFailed(Refusal):
    """The engine broke while it worked on this request, and is alive again or still."""

    status, type, code = 500, "server_error", "engine_failed"


class EngineRefused(Refusal):
    """The engine itself refuses the request; its own sentence is passed on in the envelope."""

    def __init__(self, status: int, message: str, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    @classmethod
    def read(cls, status: int, body: bytes) -> "EngineRefused":
        """What vLLM says of a request it does not take, in any of its shapes."""
        try:
            answer: Any = msgspec.json.decode(body)
        except msgspec.DecodeError:
            answer = {}
        error = answer.get("error", answer) if isinstance(answer, dict) else {}
        if not isinstance(error, dict):
            error = {"message": str(error)}
        message = error.get("message") or error.get("detail") or f"The engine refused the request ({status})."
        param = error.get("param")
        return cls(status, str(message), param if isinstance(param, str) else None)


def envelope(error: Refusal) -> bytes:
    """The error as OpenAI's clients read it: four fields, ``code`` a string or null."""
    fields = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})
