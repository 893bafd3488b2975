"""What every tier is asked when it is measured: one file a kind in tiers/conformance/prompts.

A file is a list of prompts. A message is named by who speaks: ``system``, ``user``, ``assistant``, ``call`` (the
assistant calls a function) or ``tool`` (what the function returned). Functions stand in ``tools.yaml``; a prompt
names those it offers. Long texts stand in ``documents/``, are shared by several prompts, and get each prompt's
needles, which is what its question is about.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from tiers.errors import PromptsError

Kind = Literal[
    "chat", "knowledge", "reasoning", "code", "long_context", "multi_turn", "tool_use", "structured_output"
]
Language = Literal["en", "de", "fr", "it", "pt", "hi", "es", "th"]
"""As BCP 47 writes them: those that Llama 3.1 names as its own."""
KINDS: tuple[Kind, ...] = get_args(Kind)
LANGUAGES: tuple[Language, ...] = get_args(Language)

FOLDER = Path(__file__).with_name("prompts")
SHORTEST_CONTEXT = 2048
"""Tokens, of the embedded model. A prompt fits it with a hundred left, if its document is by itself."""
AROUND_DOCUMENT = 800
"""Tokens left for what stands around a longer document, and for the answer."""
BYTES_PER_TOKEN = 3
"""Of a longer document, in Llama 3.1's vocabulary: less than the documents have, 3.3 (Italian) to 5.5 (Thai)."""

# libyaml's reads the prompts in a tenth of the time, and is not in every build of PyYAML.
_Loader: type[yaml.CSafeLoader | yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NEEDED = {"tool_use": "tools", "structured_output": "json_schema", "long_context": "document"}
_PLACE = "{document}"


@dataclass(frozen=True)
class Prompt:
    """A chat that waits for the assistant."""

    id: str
    """It stays with the prompt, so that measurements of different days can be compared prompt by prompt."""
    kind: Kind
    language: Language
    messages: tuple[dict[str, Any], ...]
    """In OpenAI's chat format, ``arguments`` of a call as text."""
    tools: tuple[dict[str, Any], ...] = ()
    """In OpenAI's function format."""
    schema: dict[str, Any] | None = None
    """What a structured answer is held to."""
    quick: bool = False
    """Whether it belongs to the few that stand for all when there is little time."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Form = TypeVar("_Form")
_Text = Annotated[str, Field(min_length=1)]
_JsonObject = dict[str, JsonValue]


class _Call(_Strict):
    name: _Text
    arguments: _JsonObject


class _Turn(_Strict):
    """One message; who speaks is the name of the one field that is set."""

    system: _Text = ""
    user: _Text = ""
    assistant: _Text = ""
    call: _Call | None = None
    tool: _Text = ""

    @model_validator(mode="after")
    def _one_speaks(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("one of system, user, assistant, call and tool is a message")
        return self

    @property
    def speaker(self) -> str:
        return next(iter(self.model_fields_set))


class _Needle(_Strict):
    at: float = Field(gt=0, le=1)
    text: _Text


class _Written(_Strict):
    """A prompt as its file has it."""

    id: str = Field(pattern=r"^[a-z0-9_-]+$")
    language: Language
    messages: list[_Turn] = Field(min_length=1)
    tools: list[str] = []
    json_schema: _JsonObject | None = Field(default=None, alias="schema")
    quick: bool = False
    document: str | None = None
    needles: list[_Needle] = []


class _Function(_Strict):
    description: _Text
    parameters: _JsonObject


@cache
def load_prompts(
    quick: bool = False, context_length: int | None = None, folder: Path = FOLDER
) -> tuple[Prompt, ...]:
    """All prompts, kind by kind in the order of `KINDS`.

    Args:
        quick: only the few that stand for all: every kind and every language, mostly short.
        context_length: how many tokens of Llama 3.1's a prompt and its answer may take. Documents are followed by
            others, first of their own language, until they come near it. Left out, each is by itself and fits
            `SHORTEST_CONTEXT` in the embedded model's vocabulary.
        folder: where the files are.

    Raises:
        PromptsError: a file, a field or a name is not what it should be, or the context is too short.
    """
    if context_length is not None and context_length < SHORTEST_CONTEXT:
        raise PromptsError(
            f"A context of {context_length} tokens is too short for the longest prompts; "
            f"give {SHORTEST_CONTEXT} or more."
        )
    if strange := {path.stem for path in folder.glob("*.yaml")} - {*KINDS, "tools"}:
        raise PromptsError(f"{folder}: there is no kind {min(strange)!r}; the kinds are {', '.join(KINDS)}.")
    functions = _read(folder / "tools.yaml", TypeAdapter(dict[str, _Function]))
    library = _Library(folder / "documents", context_length)
    prompts: dict[str, Prompt] = {}
    for kind in KINDS:
        path = folder / f"{kind}.yaml"
        for written in _read(path, TypeAdapter(list[_Written])):
            if written.id in prompts:
                other = prompts[written.id].kind
                raise PromptsError(f"{path}, prompt {written.id}: {other}.yaml has a prompt of this id already.")
            try:
                prompts[written.id] = _prompt(kind, written, functions, library)
            except ValueError as wrong:
                raise PromptsError(f"{path}, prompt {written.id}: {wrong}.") from None
    return tuple(each for each in prompts.values() if each.quick or not quick)


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256, in hexadecimal, of what the prompts ask; their order and who is quick do not count.

    Keys keep their order, since chat templates show a function's fields, and engines ask for a schema's, as they
    stand.
    """
    asked = [
        [each.id, each.kind, each.language, each.messages, each.tools, each.schema]
        for each in sorted(prompts, key=lambda each: each.id)
    ]
    canonical = json.dumps(asked, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read(path: Path, form: TypeAdapter[_Form]) -> _Form:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  # either is safe
        return form.validate_python(content)
    except (OSError, UnicodeError, yaml.YAMLError) as wrong:
        raise PromptsError(f"{path} cannot be read: {' '.join(str(wrong).split())}.") from None
    except ValidationError as wrong:
        first = wrong.errors()[0]
        where = list(first["loc"])
        if where and isinstance(content, list) and isinstance(content[int(where[0])], dict):
            number = int(where.pop(0))
            where.insert(0, f"prompt {content[number].get('id', f'number {number + 1}')}")
        raise PromptsError(f"{', '.join([str(path), *map(str, where)])}: {first['msg']}.") from None


def _prompt(kind: Kind, written: _Written, functions: dict[str, _Function], library: "_Library") -> Prompt:
    """Raises ValueError where the parts of a prompt do not fit together."""
    if (needed := _NEEDED.get(kind)) and not getattr(written, needed):
        raise ValueError(f"a prompt of {kind} needs {needed.removeprefix('json_')}")
    if strange := sorted({*written.tools} - {*functions}):
        raise ValueError(f"tools.yaml has no function {strange[0]!r}")
    _check_turns(kind, written)
    messages = tuple(_messages(written.messages))
    if written.document is not None:
        if not written.needles or sum(each["content"].count(_PLACE) for each in messages) != 1:
            raise ValueError(f"a document needs needles and one place, {_PLACE}, in the messages")
        text = library.text(written.document, written.needles)
        messages = tuple({**each, "content": each["content"].replace(_PLACE, text)} for each in messages)
    tools = tuple(
        {"type": "function", "function": {"name": name, **functions[name].model_dump()}} for name in written.tools
    )
    return Prompt(written.id, kind, written.language, messages, tools, written.json_schema, written.quick)


def _check_turns(kind: Kind, written: _Written) -> None:
    """Hold the turns against what chat templates take and engines are asked."""
    speakers = [turn.speaker for turn in written.messages]
    if speakers[-1] not in ("user", "tool"):
        raise ValueError("the last message is one that the assistant answers, of user or tool")
    if kind == "multi_turn" and speakers.count("user") < 2:
        raise ValueError("a prompt of multi_turn needs two messages of user or more")
    for before, now in pairwise([None, *speakers]):
        if (before == "call") != (now == "tool"):
            raise ValueError("a call is followed by what its tool returned, and nothing else is")
        if now == "system" and before is not None:
            raise ValueError("the message of system comes first")
    for turn in written.messages:
        if turn.call is not None and turn.call.name not in written.tools:
            raise ValueError(f"it calls {turn.call.name!r}, which is not among its tools")


def _messages(turns: Sequence[_Turn]) -> Iterator[dict[str, Any]]:
    calls = 0
    for turn in turns:
        if turn.call is not None:
            calls += 1
            arguments = json.dumps(turn.call.arguments, ensure_ascii=False)
            function = {"name": turn.call.name, "arguments": arguments}
            call = {"id": f"call_{calls}", "type": "function", "function": function}
            # Text and not null: the embedded model's chat template adds it to other text.
            yield {"role": "assistant", "content": "", "tool_calls": [call]}
        elif turn.speaker == "tool":
            yield {"role": "tool", "tool_call_id": f"call_{calls}", "content": turn.tool}
        else:
            yield {"role": turn.speaker, "content": getattr(turn, turn.speaker)}


class _Library:
    """The documents, of which a name's last part is the language."""

    def __init__(self, folder: Path, context_length: int | None) -> None:
        self._room = 0 if context_length is None else (context_length - AROUND_DOCUMENT) * BYTES_PER_TOKEN
        paths = sorted(folder.glob("*.txt"))
        self._texts = {path.stem: path.read_text(encoding="utf-8").strip() for path in paths}

    def text(self, name: str, needles: Sequence[_Needle]) -> str:
        """A document, others after it as there is room, and the needles as paragraphs of their own."""
        if name not in self._texts:
            raise ValueError(f"there is no document {name!r}; there are {', '.join(self._texts)}")
        paragraphs = [part for text in self._gathered(name) for part in text.split("\n\n")]
        whole = len(paragraphs)
        # From the end, so that those before stay where they are counted.
        for needle in sorted(needles, key=lambda each: each.at, reverse=True):
            paragraphs.insert(max(1, int(needle.at * whole + 0.5)), needle.text)
        return "\n\n".join(paragraphs)

    def _gathered(self, name: str) -> list[str]:
        """Its own language first, then the others, and only then again what was there already."""
        language = name.rpartition("-")[2]
        order = sorted(self._texts, key=lambda each: (each != name, not each.endswith(f"-{language}"), each))
        gathered, taken = [self._texts[name]], len(self._texts[name].encode())
        for other in cycle([*order[1:], name]):
            taken += len(self._texts[other].encode()) + 2
            if taken > self._room:
                return gathered
            gathered.append(self._texts[other])
        return gathered
