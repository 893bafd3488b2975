"""What requests for text are refused with, each a class with one sentence, and OpenAI's error envelope.

The root of all refusals is here too. Those that one place alone raises are defined there: of a connection, of a
path, of a scrape, of limits that Redis counts, of an engine itself. Whichever it is, its envelope is made here.
"""

import msgspec

LONGEST_QUOTE = 100
_LONGEST_MESSAGE = 500


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


class RetryLater(Refusal):
    """A refusal of the moment: the same request may be answered later, and the answer says when."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(self.retry_after)}


class BodyRefused(Refusal):
    """The body is not a JSON object in UTF-8."""


class FieldRefused(Refusal):
    """A field of the body is missing, of another type, or out of bounds."""

    code = "invalid_value"

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{cut(problem)}.")
        self.param = param[:LONGEST_QUOTE]


class FormRefused(FieldRefused):
    """No answer can have the form that is asked for, as the engine found when it tried."""

    def __init__(self, param: str) -> None:
        super().__init__(
            param, f"{param}: the engine can give no answer of this form; the schema may contradict itself"
        )


class FieldNotAllowed(Refusal):
    """A switch of the engine that could harm other callers."""

    code = "unsupported_parameter"

    def __init__(self, param: str) -> None:
        super().__init__(f"{param} is a switch of the engine that callers may not set; leave it out.")
        self.param = param


class BodyTooLarge(Refusal):
    """The body is over the configured limit; it was not read to its end."""

    status, code = 413, "request_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than {limit} bytes, the limit of this server.")


class BodyTooSlow(Refusal):
    """The body had not come whole when its time was over."""

    status, code = 408, "body_timeout"

    def __init__(self) -> None:
        super().__init__("The request body did not come in time.")


class PromptTooLong(Refusal):
    """The prompt is over the tier's own limit, which may be less than the model's context."""

    code = "prompt_too_long"

    def __init__(self, tier: str, tokens: int, limit: int) -> None:
        super().__init__(f"The prompt has {tokens} tokens, and {tier} takes at most {limit} here.")


class OutputTooLong(Refusal):
    """The caller asks for a longer answer than the tier gives."""

    code = "max_tokens_exceeded"

    def __init__(self, tier: str, param: str, tokens: int, limit: int) -> None:
        super().__init__(f"{param} is {tokens}, and {tier} gives at most {limit} here.")
        self.param = param


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


class ModelNotFound(Refusal):
    """No tier answers to that name; no other tier ever answers in its place."""

    status, code, param = 404, "model_not_found", "model"

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"The model {quoted(name)} does not exist here. The models are: {', '.join(known)}.")


class TierUnavailable(RetryLater):
    """The tier is configured, but its engine is not ready."""

    status, type, code = 503, "server_error", "tier_unavailable"

    def __init__(self, tier: str, state: str, retry_after: int) -> None:
        sentence = f"{tier} cannot answer now, its engine is {state}; try again in {retry_after} s."
        super().__init__(sentence, retry_after)


class TierNotVerified(Refusal):
    """The tier's engine was seen to compute something else than the tier declares; it is not served."""

    status, type, code = 503, "server_error", "tier_not_verified"

    def __init__(self, tier: str, disagreements: tuple[str, ...]) -> None:
        super().__init__(
            f"{tier} is not served, its engine does not compute what is declared: {disagreements[0]}."
        )


class TierNotCertified(Refusal):
    """No certificate says that the tier, as it runs now, is within its budget, and this server asks for one."""

    status, type, code = 503, "server_error", "tier_not_certified"

    def __init__(self, tier: str, reasons: tuple[str, ...]) -> None:
        super().__init__(
            f"{tier} is not served before a certificate says it passes. {reasons[0]} `assay certify` makes one."
        )


class PrecisionNotAvailable(Refusal):
    """The caller pinned a precision that the named tier does not have; no other tier ever answers in its place."""

    status, code, param = 400, "precision_not_available", "precision"

    def __init__(self, pinned: str, tier: str, precision: str, elsewhere: list[str]) -> None:
        hint = f" {' and '.join(elsewhere)} would." if elsewhere else " No tier of this model does."
        super().__init__(f"{tier} computes in {precision} and does not answer in {quoted(pinned)}.{hint}")


class TierNotAllowed(Refusal):
    """The caller's key is for other tiers."""

    status, type, code, param = 403, "permission_error", "tier_not_allowed", "model"

    def __init__(self, key: str, tier: str) -> None:
        super().__init__(f"The key {key!r} is not for {tier}; GET /v1/models lists what it is for.")


class RateExceeded(RetryLater):
    """The key has used up a minute's requests or tokens."""

    status, code = 429, "rate_limit_exceeded"

    def __init__(self, what: str, limit: int, retry_after: int) -> None:
        super().__init__(f"This key has {limit} {what} a minute; try again in {retry_after} s.", retry_after)
        self.type = what
        self._standing = {"limit": str(limit), "remaining": "0", "reset": f"{retry_after}s"}

    @property
    def headers(self) -> dict[str, str]:
        standing = {f"x-ratelimit-{name}-{self.type}": value for name, value in self._standing.items()}
        return super().headers | standing


class TooManyAtOnce(RetryLater):
    """The key has as many requests under way as it may."""

    status, type, code = 429, "requests", "concurrency_limit_exceeded"

    def __init__(self, limit: int) -> None:
        super().__init__(f"This key may have {limit} requests at once; wait for one of them to end.", 1)


class QueueFull(RetryLater):
    """More requests wait for the tier than may."""

    status, type, code = 429, "requests", "queue_full"

    def __init__(self, tier: str, retry_after: int) -> None:
        super().__init__(f"Too many requests wait for {tier}; try again in {retry_after} s.", retry_after)


class FirstTokenLate(Refusal):
    """A stream had no first token when its time was over."""

    status, type, code = 504, "server_error", "first_token_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"No first token came within {limit_s:g} s.")


class NextTokenLate(Refusal):
    """A stream stood still for too long."""

    status, type, code = 504, "server_error", "token_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"No further token came for {limit_s:g} s.")


class RequestTooLong(Refusal):
    """The answer was not whole when its time was over."""

    status, type, code = 504, "server_error", "request_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The answer was not whole within {limit_s:g} s, the limit of this server.")


class EngineFailed(Refusal):
    """The engine broke while it worked on this request, and is alive again or still."""

    status, type, code = 500, "server_error", "engine_failed"


def cut(message: str) -> str:
    """A message, which may repeat what a caller sent, no longer than helps."""
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "…"


def quoted(text: str) -> str:
    """What a caller sent, as a message may repeat it: escaped, and not longer than helps."""
    return repr(text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "…")


def envelope(error: Refusal) -> bytes:
    """The error as OpenAI's clients read it: four fields, ``code`` a string or null."""
    fields = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def error_event(error: Refusal) -> bytes:
    """The error as an event of a stream that has begun."""
    return b"data: " + envelope(error) + b"\n\n"
