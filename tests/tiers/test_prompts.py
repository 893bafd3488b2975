"""What tiers are measured on: all kinds and languages, short enough, named by a digest that tells sets apart."""

import ast
import dataclasses
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from server.call import read_call
from server.text_call import ChatCall
from tiers.conformance.prompts import (
    AROUND_DOCUMENT,
    FOLDER,
    KINDS,
    LANGUAGES,
    SHORTEST_CONTEXT,
    Prompt,
    digest,
    load_prompts,
)
from tiers.errors import PromptsError

ROOT = Path(__file__).parents[2]
PROMPTS = load_prompts()
EMBEDDED = ROOT / ".assay" / "checkpoints" / "SmolLM2-135M-Instruct" / "bf16"
LLAMA_TEMPLATE = ROOT / "tests" / "tiny_llama.jinja"
LEFT_FOR_ANSWER = 100


def size(prompt: Prompt, count: Callable[[str], int]) -> int:
    """Of everything that is said in it."""
    return sum(count(message["content"]) for message in prompt.messages)


@cache
def compiled(template: Path) -> Template:
    """Once for all prompts: it takes longer than to render them."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template.read_text())


def rendered(template: Path, prompt: Prompt) -> str:
    """The prompt as an engine renders it, with arguments of calls as objects."""
    messages = json.loads(json.dumps(prompt.messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    text: str = compiled(template).render(
        messages=messages,
        tools=list(prompt.tools) or None,
        add_generation_prompt=True,
        bos_token="<|begin_of_text|>",
    )
    return text


def written() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every prompt as its file has it, with its kind."""
    for kind in KINDS:
        for prompt in parsed(FOLDER / f"{kind}.yaml"):
            yield kind, prompt


@cache
def parsed(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(path.read_text())
    return found


def needles() -> dict[str, list[dict[str, Any]]]:
    return {prompt["id"]: prompt["needles"] for _, prompt in written() if "document" in prompt}


# What there is


def test_there_are_enough_of_every_kind_and_language_and_half_are_english() -> None:
    assert len(PROMPTS) >= 200
    kinds, languages = Counter(each.kind for each in PROMPTS), Counter(each.language for each in PROMPTS)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) >= 25
    assert set(languages) == set(LANGUAGES)
    assert min(languages.values()) >= 10
    assert 0.4 < languages["en"] / len(PROMPTS) < 0.6


def test_every_kind_is_asked_in_every_language() -> None:
    assert {(each.kind, each.language) for each in PROMPTS} == {
        (kind, name) for kind in KINDS for name in LANGUAGES
    }


def test_the_quick_ones_are_few_and_cover_every_kind_and_language() -> None:
    quick = load_prompts(quick=True)
    assert quick == tuple(each for each in PROMPTS if each.quick)
    assert 20 <= len(quick) <= 28
    assert {each.kind for each in quick} == set(KINDS)
    assert {each.language for each in quick} == set(LANGUAGES)
    assert sum(size(each, len) for each in quick) < 12_000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("group-query-attention", "Explain group query attention"),
        ("flash-attention", "Explain flash attention"),
        ("twice-a-square-three-times-a-cube", "x is twice a square and three times a cube"),
    ],
)
def test_the_classics_are_asked_once(name: str, words: str) -> None:
    (classic,) = (each for each in PROMPTS if each.id == name)
    assert [each for each in PROMPTS if words in str(each.messages)] == [classic]


def test_ids_are_unique_and_say_what_they_are_of() -> None:
    assert len({each.id for each in PROMPTS}) == len(PROMPTS)
    numbered = [each for each in PROMPTS if re.search(r"-\d\d$", each.id)]
    assert len(numbered) == len(PROMPTS) - 3
    assert all(each.id.startswith(f"{each.kind}-{each.language}-") for each in numbered)


def test_no_prompt_is_asked_twice_or_was_calibrated_on() -> None:
    tree = ast.parse((ROOT / "tiers" / "calibration.py").read_text())  # which is not imported: it needs PyTorch
    (calibrated,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROMPTS"
    )
    asked = Counter(str(each.messages) for each in PROMPTS)
    assert asked.most_common(1)[0][1] == 1
    said = {message["content"] for each in PROMPTS for message in each.messages}
    assert len(calibrated) == 64
    assert not said & set(calibrated)


SCRIPTS = {"hi": r"[\u0900-\u097f]", "th": r"[\u0e00-\u0e7f]"}


def test_hindi_and_thai_are_in_their_scripts_and_nothing_else_is() -> None:
    for each in PROMPTS:
        last_asked = [message["content"] for message in each.messages if message["role"] == "user"][-1]
        scripts = {language for language, script in SCRIPTS.items() if re.search(script, last_asked)}
        assert scripts == {each.language} & {*SCRIPTS}, each.id


# What a prompt is


def test_the_gateway_takes_every_prompt() -> None:
    for each in PROMPTS:
        body: dict[str, Any] = {"model": "m", "messages": each.messages}
        if each.tools:
            body["tools"] = each.tools
        if each.schema:
            form = {"name": "answer", "schema": each.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        read_call(json.dumps(body).encode(), ChatCall).check()


def test_schemas_are_schemas_and_prompts_name_their_fields() -> None:
    structured = [each for each in PROMPTS if each.schema]
    assert [each for each in PROMPTS if each.kind == "structured_output"] == structured
    for each in structured:
        assert each.schema
        jsonschema_rs.meta.validate(each.schema)
        fields = each.schema.get("items", each.schema)["properties"]
        said = str(each.messages).lower()
        assert "json" in said, each.id
        unnamed = {name for name in fields if name.lower() not in said}
        assert not unnamed or each.id == "structured_output-en-05", each.id  # an invoice shows what its fields are


def test_calls_are_what_their_tools_take() -> None:
    for each in PROMPTS:
        parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in each.tools}
        assert bool(parameters) is (each.kind == "tool_use"), each.id
        for schema in parameters.values():
            jsonschema_rs.meta.validate(schema)
        calls = [call for message in each.messages for call in message.get("tool_calls", ())]
        answers = [message["tool_call_id"] for message in each.messages if message["role"] == "tool"]
        assert [call["id"] for call in calls] == answers, each.id
        for call in calls:
            schema = {**parameters[call["function"]["name"]], "additionalProperties": False}
            jsonschema_rs.validate(schema, json.loads(call["function"]["arguments"]))


def test_some_chats_have_a_tools_result_already() -> None:
    assert sum(each.messages[-1]["role"] == "tool" for each in PROMPTS) >= 8


# How long it is


def test_all_are_short_enough_for_the_embedded_model_by_their_bytes() -> None:
    """Its vocabulary has hardly a word of Hindi or Thai, and takes several tokens for one letter."""
    for each in PROMPTS:
        if each.language in SCRIPTS:
            assert size(each, len) <= 700, each.id
        else:
            assert size(each, lambda text: len(text.encode())) <= 6_500, each.id


@pytest.mark.skipif(not EMBEDDED.exists(), reason="the embedded model has no checkpoint yet")
def test_each_fits_the_embedded_models_context_with_room_to_answer() -> None:
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    texts = {each.id: rendered(EMBEDDED / "chat_template.jinja", each) for each in PROMPTS}
    lengths = {name: len(tokenizer.encode(text).ids) for name, text in texts.items()}
    assert max(lengths.values()) <= SHORTEST_CONTEXT - LEFT_FOR_ANSWER, max(
        lengths, key=lambda name: lengths[name]
    )
    long = [lengths[each.id] for each in PROMPTS if each.kind == "long_context" and each.language not in SCRIPTS]
    assert min(long) >= 1_200


def test_llamas_template_shows_all_of_every_prompt() -> None:
    for each in PROMPTS:
        text = rendered(LLAMA_TEMPLATE, each)
        for message in each.messages:
            quoted = json.dumps(message["content"], ensure_ascii=False)
            assert (quoted if message["role"] == "tool" else message["content"].strip()) in text, each.id
        assert all(f'"name": "{tool["function"]["name"]}"' in text for tool in each.tools), each.id
        turns = len(each.messages) + (each.messages[0]["role"] != "system")
        assert text.count("<|eot_id|>") == turns, each.id


@pytest.mark.parametrize("context_length", [None, 8_192, 32_768])
def test_needles_are_in_their_documents_once_and_where_they_are_said_to_be(context_length: int | None) -> None:
    prompts = {each.id: each for each in load_prompts(context_length=context_length)}
    documents = " ".join(path.read_text() for path in (FOLDER / "documents").glob("*.txt"))
    for name, planted in needles().items():
        (message,) = (each for each in prompts[name].messages if each["role"] == "user")
        paragraphs = message["content"].split("\n\n")
        for needle in planted:
            assert needle["text"] not in documents
            assert paragraphs.count(needle["text"]) == 1
            expected = needle["at"] * len(paragraphs)  # of which the question and the other needles are some
            assert paragraphs.index(needle["text"]) == pytest.approx(expected, abs=2.5)


@cache
def llama_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@cache
def paragraph_tokens(folder: Path, text: str) -> int:
    return len(llama_tokenizer(folder).encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("context_length", [SHORTEST_CONTEXT, 8_192, 16_384, 131_072])
def test_documents_are_followed_by_others_until_they_come_near_a_longer_context(context_length: int) -> None:
    folders = [
        *(ROOT / ".assay").glob("test-models/tiny-llama-*"),
        *(ROOT / ".assay").glob("checkpoints/Tiny*/bf16"),
    ]
    if not folders:
        pytest.skip("no Llama tokenizer has been made yet")
    some = [each for each in load_prompts(context_length=context_length) if each.id.endswith("01")]
    lengths = [
        # No token of Llama's goes beyond the end of a paragraph, and most paragraphs are in all of these.
        sum(paragraph_tokens(folders[0], part) for part in re.split(r"(?<=\n\n)", rendered(LLAMA_TEMPLATE, each)))
        for each in some
        if each.kind == "long_context"
    ]
    assert len(lengths) == len(LANGUAGES)
    assert max(lengths) <= context_length - LEFT_FOR_ANSWER
    if context_length > SHORTEST_CONTEXT:
        assert min(lengths) >= 0.45 * (context_length - AROUND_DOCUMENT)


def test_a_longer_context_changes_the_long_prompts_only_and_the_same_way_each_time() -> None:
    longer = load_prompts(context_length=8_192)
    assert longer == load_prompts.__wrapped__(context_length=8_192)
    changed = {each.id for each, before in zip(longer, PROMPTS, strict=True) if each != before}
    assert changed == set(needles())
    assert digest(longer) != digest(PROMPTS)


def test_a_context_too_short_is_refused() -> None:
    with pytest.raises(PromptsError, match="1000 tokens is too short"):
        load_prompts(context_length=1_000)


# The digest


def test_the_digest_is_the_sets_and_not_its_orders() -> None:
    shuffled = random.Random(3).sample(PROMPTS, len(PROMPTS))
    assert digest(shuffled) == digest(PROMPTS) == digest(load_prompts())
    assert re.fullmatch("[0-9a-f]{64}", digest(PROMPTS))
    assert digest([dataclasses.replace(each, quick=False) for each in PROMPTS]) == digest(PROMPTS)
    assert digest(load_prompts(quick=True)) != digest(PROMPTS)


FIELDS = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
SWAPPED = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}
BASE = Prompt("one", "chat", "en", ({"role": "user", "content": "Hi"},), schema=FIELDS)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "other"},
        {"kind": "code"},
        {"language": "de"},
        {"messages": ({"role": "user", "content": "Hi "},)},
        {"tools": ({"type": "function", "function": {"name": "f"}},)},
        {"schema": None},
        {"schema": SWAPPED},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_changes_with_a_prompt(change: dict[str, Any]) -> None:
    assert digest([BASE, PROMPTS[0]]) != digest([dataclasses.replace(BASE, **change), PROMPTS[0]])


# What is refused


TOOLS = "f: {description: Does it., parameters: {type: object}}"
ASK = "messages: [{user: Hi}]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind without a prompt, and one function."""
    for kind in KINDS:
        (tmp_path / f"{kind}.yaml").write_text("[]")
    (tmp_path / "tools.yaml").write_text(TOOLS)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "short-en.txt").write_text("Title\n\nText.\n")
    return tmp_path


def prompt_text(*fields: str) -> str:
    return "- {" + ", ".join(("id: x", "language: en", *fields)) + "}\n"


def test_a_set_can_be_as_small_as_one_prompt(folder: Path) -> None:
    (folder / "chat.yaml").write_text(prompt_text(ASK))
    assert load_prompts(folder=folder) == (Prompt("x", "chat", "en", ({"role": "user", "content": "Hi"},)),)


NEEDLES = "needles: [{at: 0.5, text: N}]"


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        ("chat", prompt_text(ASK) * 2, "prompt x: chat.yaml has a prompt of this id already"),
        ("haiku", prompt_text(ASK), "there is no kind 'haiku'; the kinds are chat, knowledge,"),
        ("chat", prompt_text(ASK).replace("en", "nl"), "prompt x, language: Input should be 'en', 'de',"),
        ("chat", "- {language: en, messages: [{user: Hi}]}", "prompt number 1, id: Field required"),
        ("chat", "- {id: x, language: en}", "prompt x, messages: Field required"),
        ("chat", prompt_text("messages: []"), "prompt x, messages: List should have at least 1"),
        ("chat", prompt_text(ASK, "qick: true"), "prompt x, qick: Extra inputs"),
        (
            "chat",
            prompt_text("messages: [{user: 5}]"),
            "prompt x, messages, 0, user: Input should be a valid string",
        ),
        (
            "chat",
            prompt_text("messages: [{system: Be., user: Hi}]"),
            "one of system, user, assistant, call and tool",
        ),
        ("chat", prompt_text("messages: [{user: Hi}, {assistant: Hi}]"), "x: the last message is one that"),
        ("chat", prompt_text("messages: [{user: Hi}, {system: Be.}, {user: Hi}]"), "of system comes first"),
        ("chat", "{", "chat.yaml cannot be read"),
        ("chat", "x: 1", "chat.yaml: Input should be a valid list"),
        ("chat", "- 1", "chat.yaml, 0: Input should be a valid dictionary"),
        ("multi_turn", prompt_text(ASK), "x: a prompt of multi_turn needs two messages of user"),
        ("tool_use", prompt_text(ASK), "x: a prompt of tool_use needs tools"),
        ("tool_use", prompt_text(ASK, "tools: [g]"), "x: tools.yaml has no function 'g'"),
        (
            "tool_use",
            prompt_text("tools: [f]", "messages: [{user: Hi}, {call: {name: g, arguments: {}}}, {tool: ok}]"),
            "x: it calls 'g', which is not among its tools",
        ),
        (
            "tool_use",
            prompt_text("tools: [f]", "messages: [{user: Hi}, {call: {name: f, arguments: {}}}, {user: Hm}]"),
            "x: a call is followed by what its tool returned",
        ),
        (
            "tool_use",
            prompt_text("tools: [f]", "messages: [{tool: ok}]"),
            "x: a call is followed by what its tool",
        ),
        (
            "structured_output",
            prompt_text(ASK, "schema: {const: 2025-05-01}"),
            "prompt x, schema, const: input was not a valid JSON value",
        ),
        ("structured_output", prompt_text(ASK), "x: a prompt of structured_output needs schema"),
        ("long_context", prompt_text(ASK), "x: a prompt of long_context needs document"),
        (
            "long_context",
            prompt_text(ASK, "document: short-en", NEEDLES),
            "x: a document needs needles and one place",
        ),
        (
            "long_context",
            prompt_text("messages: [{user: '{document}'}]", "document: short-en"),
            "x: a document needs needles and one place",
        ),
        (
            "long_context",
            prompt_text("messages: [{user: '{document}'}]", "document: long-en", NEEDLES),
            "x: there is no document 'long-en'; there are short-en",
        ),
        (
            "long_context",
            prompt_text("messages: [{user: '{document}'}]", "needles: [{at: 2, text: N}]"),
            "prompt x, needles, 0, at: Input should be less than or equal to 1",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(folder: Path, kind: str, text: str, sentence: str) -> None:
    (folder / f"{kind}.yaml").write_text(text)
    with pytest.raises(PromptsError, match=re.escape(sentence)) as refused:
        load_prompts(folder=folder)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")


def test_a_missing_file_is_a_sentence(folder: Path) -> None:
    (folder / "code.yaml").unlink()
    with pytest.raises(PromptsError, match=r"code\.yaml cannot be read: .*No such file"):
        load_prompts(folder=folder)
