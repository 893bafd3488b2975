"""What the gateway reads of a request's body, and the little it changes in it.

One parse; every field that is not here is the engine's to judge, and keeps its bytes.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Annotated, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from server.errors import BodyRefused, FieldNotAllowed, FieldRefused, Refusal
from server.schema import check_schema

MOST_CHOICES = 128
"""Answers to one request, as many as OpenAI gives; each takes a place in the engine."""

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_Forbidden = Raw | UnsetType
NULL = Raw(b"null")
_MOST = (1 << 31) - 1
Count = Annotated[int, Meta(ge=0, le=_MOST)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 32)]


class Call(msgspec.Struct):
    """What every path has: who is asked, and switches of the engine that no caller may touch."""

    model: str
    precision: str | UnsetType | None = UNSET
    """Assay's own field: the precision that the caller insists on."""
    cache_salt: str | UnsetType | None = UNSET

    # What could harm others: the order of requests, what plugins and connectors of the engine do, the names that
    # requests go by inside it, and templates, which are programs. Absent or null, or the request is refused.
    priority: _Forbidden = UNSET
    request_id: _Forbidden = UNSET
    session_id: _Forbidden = UNSET
    vllm_xargs: _Forbidden = UNSET
    kv_transfer_params: _Forbidden = UNSET
    ec_transfer_params: _Forbidden = UNSET
    mm_processor_kwargs: _Forbidden = UNSET
    media_io_kwargs: _Forbidden = UNSET
    mm_payload: _Forbidden = UNSET
    return_mm_kwargs: _Forbidden = UNSET
    chat_template: _Forbidden = UNSET
    prompt_embeds: _Forbidden = UNSET
    routed_experts_prompt_start: _Forbidden = UNSET

    @property
    def streams(self) -> bool:
        """Whether the answer comes as events."""
        return False

    @property
    def asks_usage(self) -> bool:
        """Whether the caller of a stream wants to be told what it took."""
        return True

    @property
    def choices(self) -> int:
        """How many answers are asked for, each a place in the engine."""
        return 1

    @property
    def beginning(self) -> Iterable[str]:
        """How the prompt begins, piece by piece: what is the same through all of a conversation."""
        return ()

    @property
    def form(self) -> str | None:
        """The field that says what form the answer is to have, if one does."""
        return None

    @property
    def output_tokens(self) -> int | None:
        """The longest each of them may become, if the caller says."""
        return None

    @property
    def output_field(self) -> str:
        """Where the caller says so."""
        return "max_tokens"

    def check(self) -> None:
        """Hold the fields against what no engine is asked.

        Raises:
            FieldNotAllowed: a switch that is not the caller's.
            FieldRefused: more choices than one request may have.
        """
        for name in FORBIDDEN:
            given = getattr(self, name)
            if given is not UNSET and bytes(given) != b"null":
                raise FieldNotAllowed(name)
        if not 1 <= self.choices <= MOST_CHOICES:
            raise FieldRefused("n", f"n must be from 1 to {MOST_CHOICES}, counted over all prompts")

    def for_engine(self, body: bytes, caller: str, request_id: str) -> bytes:
        """The body as the engine gets it: the same bytes, unless a field has to change.

        Raises:
            BodyRefused: a field's name is no text.
        """
        changes = self.changes(caller, request_id)
        return edited(body, changes) if changes else body

    def briefly(self, body: bytes) -> bytes | None:
        """The body that asks for the least of the same, whole; None where a stream says itself what is refused."""
        return None

    def changes(self, caller: str, request_id: str) -> dict[str, object]:
        """The fields that the engine gets otherwise, or, where UNSET, does not get."""
        changed: dict[str, object] = {}
        if self.precision is not UNSET:
            changed["precision"] = UNSET
        if isinstance(self.cache_salt, str) and self.cache_salt:
            # Whoever knows another's salt could find out what is in that one's part of the cache.
            changed["cache_salt"] = hashlib.sha256(f"{caller}\0{self.cache_salt}".encode()).hexdigest()
        if self.streams and not self.asks_usage:
            # Always asked for, since metrics and limits count it; the caller does not get to see it.
            changed["stream_options"] = {"include_usage": True, "continuous_usage_stats": False}
        return changed


FORBIDDEN: tuple[str, ...] = tuple(
    name for name in Call.__struct_fields__ if name not in ("model", "precision", "cache_salt")
)
"""Fields of vLLM's that callers may not set."""


FORMS = ("structured_outputs", "response_format", "text", "tools")
"""Fields that hold an answer to a form."""


class Generation(Call):
    """What the three paths share that generate text."""

    stream: bool | None = False

    # Only for their types and bounds: outside of these vLLM 0.32 answers with a 500, or works for minutes.
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: str | list[str] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_MOST)] | None = None
    stop_token_ids: list[TokenId] | None = None
    logit_bias: dict[Annotated[str, Meta(pattern=r"^[0-9]{1,10}$")], float] | None = None
    structured_outputs: Raw = NULL

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def form(self) -> str | None:
        fields = (name for name in FORMS if name in self.__struct_fields__)
        return next((name for name in fields if getattr(self, name) not in (None, NULL)), None)

    def check(self) -> None:
        super().check()
        check_schema("structured_outputs", self.structured_outputs)


C = TypeVar("C", bound="Call")


def read_call(body: bytes, kind: type[C]) -> C:
    """What the gateway needs of a body.

    Raises:
        BodyRefused: not JSON in UTF-8, or not an object.
        FieldRefused: a field that the gateway needs is missing or of another type.
    """
    try:
        body.decode()  # what is skipped below is not looked at, and engines answer it with a 500
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from None
    except _UNREADABLE as error:
        raise BodyRefused(f"The request body cannot be read: {error}.") from None


_PLACE = re.compile(r"(.*?)(?: - at (?:`key` in )?`\$\.?(.*)`)?")
_MISSING = re.compile(r"Object missing required field `(.*)`")


def _refused(sentence: str) -> Refusal:
    """msgspec's sentence, with the field it is about as OpenAI names it."""
    found = _PLACE.fullmatch(sentence)
    assert found is not None
    what, place = found[1], found[2] or ""
    if missing := _MISSING.fullmatch(what):
        what, place = "it is missing", f"{place}.{missing[1]}".lstrip(".")
    if not place:
        return BodyRefused(f"The request body must be a JSON object with a `model`: {what}.")
    return FieldRefused(re.split(r"[.\[]", place, maxsplit=1)[0], f"{place}: {what}")


def edited(body: bytes, changes: dict[str, object]) -> bytes:
    """The body with these fields set, or dropped where UNSET; every other field keeps its bytes.

    Raises:
        BodyRefused: a field's name is no text.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, Raw])
    except _UNREADABLE as error:
        raise BodyRefused(f"The request body cannot be read: {error}.") from None
    for name, value in changes.items():
        if value is UNSET:
            fields.pop(name, None)
        elif isinstance(value, dict) and bytes(fields.get(name, b"null")) != b"null":
            fields[name] = Raw(edited(bytes(fields[name]), value))
        else:
            fields[name] = Raw(msgspec.json.encode(value))
    return msgspec.json.encode(fields)
