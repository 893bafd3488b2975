"""JSON schemas that callers send, for answers and tools: what no engine is asked to compile.

vLLM compiles a schema before it looks at it, for minutes if it is large, while all others with one wait; and it
answers a schema that refers to nothing but itself with a 500.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, Literal

import msgspec
from msgspec import Raw

from server.errors import FieldRefused

LARGEST_SCHEMA = 1 << 16
"""Bytes, of all schemas in a field. A list of values this long takes some seconds to compile on two cores."""
DEEPEST = 64
"""Of what vLLM decodes by recursion; it refuses deeper schemas itself."""

DEEPEST_WRAPPING = 5
"""Of objects around a schema, as in a structural tag in structured outputs."""

_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_WRAPPERS = ("format", "json_schema", "schema", "json", "structural_tag", "structures")
"""Where fields of vLLM's and OpenAI's keep schemas, some of them as text."""


class Function(msgspec.Struct):
    """What a model may call."""

    name: str
    parameters: Raw = Raw(b"null")


class ChatTool(msgspec.Struct):
    """A tool as chats name it."""

    type: Literal["function"]
    function: Function


def check_schemas(field: str, texts: Iterable[Raw]) -> None:
    """Hold several schemas in one field against what an engine can compile, each and together.

    Raises:
        FieldRefused: as `check_schema`.
    """
    left = LARGEST_SCHEMA
    for text in texts:
        if (left := left - len(bytes(text))) < 0:
            raise FieldRefused(field, f"{field} holds more than {LARGEST_SCHEMA} bytes of schemas")
        check_schema(field, text)


def check_schema(field: str, text: Raw) -> None:
    """Hold a schema, or what has some in it, against what an engine can compile.

    Raises:
        FieldRefused: it is too large, no object, or refers in a circle or out of itself.
    """
    given = bytes(text)
    if given == b"null":
        return
    if len(given) > LARGEST_SCHEMA:
        raise FieldRefused(field, f"{field} has {len(given)} bytes, and at most {LARGEST_SCHEMA} are taken")
    if not given.lstrip().startswith(b"{"):
        raise FieldRefused(field, f"{field} must be an object")
    check_depth(field, given.decode())
    if b"$ref" in given or b"\\" in given:
        for root in _roots(_decoded(field, given)):
            _check_references(field, root)


def check_depth(field: str, text: str) -> None:
    """Hold JSON against the depth that an engine survives.

    Raises:
        FieldRefused: it is nested more deeply, where brackets in texts count too.
    """
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    brackets = text.encode().translate(None, _OTHERS)
    if max(accumulate(map(_STEPS.__getitem__, brackets))) > DEEPEST:
        raise FieldRefused(field, f"{field} holds JSON that is nested more than {DEEPEST} deep")


def _decoded(field: str, text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FieldRefused(field, f"{field} cannot be read: {error}") from None


def _roots(value: Any, wrapped: int = DEEPEST_WRAPPING) -> Iterator[dict[str, Any]]:
    """Whatever may be the root that references count from: the document, and the schemas it wraps."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            return  # no JSON, which is the engine's to say
    if isinstance(value, list):
        for each in value:
            yield from _roots(each, wrapped)
    if isinstance(value, dict):
        yield value
        for wrapper in _WRAPPERS if wrapped else ():
            yield from _roots(value.get(wrapper), wrapped - 1)


def _check_references(field: str, root: dict[str, Any]) -> None:
    """Follow every reference to what is none; each is looked at once."""
    fine = set[str]()
    for start in _references(root):
        if not start.startswith("#"):
            # vLLM's grammar compiler passes over it, and writes it to its log as it is.
            raise FieldRefused(field, f"{field}: the reference {start[:100]!r} leads out of the schema")
        reference: object = start
        path = set[str]()
        while isinstance(reference, str) and reference not in fine:
            if reference in path:
                raise FieldRefused(field, f"{field}: the reference {reference[:100]!r} leads to itself")
            path.add(reference)
            target = _target(root, reference)
            reference = target.get("$ref") if isinstance(target, dict) else None
        fine |= path


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


def _target(root: Any, reference: str) -> Any:
    """What a JSON pointer within the document leads to; None if it leads nowhere, which is the engine's to say."""
    if not reference.startswith("#"):
        return None
    found = root
    for step in reference.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found
