"""The tiny Llama reads text as Llama 3.1 does: held against `llama-models`, Meta's own tokenizer and chat format.

Where the chat template of a published checkpoint and `llama-models`' own format differ, that is a test too.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_llama

TEXTS = {
    "English": "The quick brown fox can't jump; it'll rest. HTTP/2 isn't HTTP/1.1!",
    "German": "Die Straßenbahn fährt um 8:15 Uhr – größer, schöner, „besser“.",
    "French": "L'été dernier, où étiez-vous ? Ça va bien, merci beaucoup !",
    "Italian": "Perché no? È già mezzogiorno, e così sia: l'università è chiusa.",
    "Portuguese": "Não há razão; amanhã às três põe-se o sol em São Paulo.",
    "Hindi": "नमस्ते, आप कैसे हैं? यह एक परीक्षण वाक्य है।",
    "Spanish": "¿Cuándo llegará el niño? ¡Mañana, según el pingüino!",
    "Thai": "สวัสดีครับ วันนี้อากาศดีมาก ๑๒๓๔๕",
    "digits": "7 42 365 2024 12345 1234567890 3.14159 -273,15 1e-9 ⅷ²",
    "emoji": "👋🏽 👩‍👩‍👧 🇨🇭 ❤️ 🤖🤖",
    "spaces": "  a\t\tb \n\n\n  c   \r\n\td    ",
    "code": "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}\n",
    "specials": "<|begin_of_text|>a<|eot_id|> <|python_tag|><|finetune_right_pad_id|><|start_header_id|>",
    "nothing": "",
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    from llama_models.llama3.tokenizer import Tokenizer

    return Tokenizer.get_instance()


def dialogue(theirs: Any, messages: list[dict[str, str]]) -> list[int]:
    """What `llama-models` makes of it, ready for the model's answer."""
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat

    tokens: list[int] = ChatFormat(theirs).encode_dialog_prompt([RawMessage(**m) for m in messages]).tokens
    return tokens


def rendered(tokenizer: Any, messages: Sequence[Any], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return text


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_has_the_tokens_that_llama_gives_it(llama_tokenizer: Any, theirs: Any, kind: str) -> None:
    text = TEXTS[kind]
    expected = theirs.encode(text, bos=False, eos=False, allowed_special="all")
    assert llama_tokenizer.encode(text, add_special_tokens=False) == expected
    assert llama_tokenizer.encode(text) == [128_000, *expected], "one BOS, where special tokens are asked for"
    assert llama_tokenizer.decode(expected) == text


def test_so_has_any_mixture_of_scripts_digits_and_spaces(llama_tokenizer: Any, theirs: Any) -> None:
    draw = random.Random(3)
    further = "ßŁőΩжё漢字かな한글עברית\u00a0\u200b\u0301ﬁ½"
    letters = sorted({*further, *"".join(TEXTS.values())})
    for _ in range(500):
        text = "".join(draw.choices(letters, k=40))
        expected = theirs.encode(text, bos=False, eos=False)
        assert llama_tokenizer.encode(text, add_special_tokens=False) == expected, repr(text)


def test_numbers_are_cut_into_three_digits(llama_tokenizer: Any) -> None:
    tokens = llama_tokenizer.encode("1234567", add_special_tokens=False)
    assert [llama_tokenizer.decode([token]) for token in tokens] == ["123", "456", "7"]


def test_the_special_tokens_are_those_of_llama_3_1(llama_tokenizer: Any, theirs: Any) -> None:
    specials = tiny_llama.special_tokens()
    assert len(llama_tokenizer) == tiny_llama.CONFIG["vocab_size"] == theirs.n_words == 128_256
    assert llama_tokenizer.convert_tokens_to_ids(specials) == list(range(128_000, 128_256))
    assert specials[-1] == "<|reserved_special_token_247|>"
    for token in tiny_llama.NAMED_SPECIALS.values():
        assert llama_tokenizer.convert_tokens_to_ids(token) == theirs.special_tokens[token]
    assert llama_tokenizer.bos_token_id == theirs.bos_id
    assert llama_tokenizer.eos_token_id == theirs.eot_id
    assert sorted(tiny_llama.GENERATION_CONFIG["eos_token_id"]) == sorted(theirs.stop_tokens)


def test_llama_models_has_since_named_two_more(llama_tokenizer: Any, theirs: Any) -> None:
    """The published Llama 3.1 has 128005 and 128011 in reserve, and so all later reserved numbers differ."""
    for token, later in ((128_005, "<|step_id|>"), (128_011, "<|image|>")):
        assert theirs.special_tokens[later] == token
        assert "reserved" in llama_tokenizer.convert_ids_to_tokens(token)


HEADER = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "¿Qué hora es? 👋"},
    {"role": "assistant", "content": "It is 12:30."},
    {"role": "user", "content": "And in Zürich?\n\n  - there"},
]


@pytest.mark.parametrize("messages", [DIALOGUE[1:2], DIALOGUE[:2], DIALOGUE], ids=["user", "system", "dialogue"])
def test_a_dialogue_is_encoded_as_llama_does(
    llama_tokenizer: Any, theirs: Any, messages: list[dict[str, str]]
) -> None:
    """With one difference of convention: the template writes the date into a system turn that is always there."""
    has_system = messages[0]["role"] == "system"
    system = {"role": "system", "content": HEADER + (messages[0]["content"] if has_system else "")}
    expected = dialogue(theirs, [system, *messages[has_system:]])
    ours = llama_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours == expected
    assert ours.count(128_000) == 1
    assert dialogue(theirs, messages) != expected


def test_the_template_trims_what_llama_models_leaves(llama_tokenizer: Any, theirs: Any) -> None:
    spaced = [{"role": "system", "content": HEADER + "x"}, {"role": "user", "content": "  Hi \n"}]
    trimmed = [spaced[0], {"role": "user", "content": "Hi"}]
    ours = llama_tokenizer.apply_chat_template(
        [{"role": "system", "content": "x"}, spaced[1]], add_generation_prompt=True
    )["input_ids"]
    assert ours == dialogue(theirs, trimmed) != dialogue(theirs, spaced)


def test_special_tokens_in_a_callers_text_are_special_in_the_template_only(
    llama_tokenizer: Any, theirs: Any
) -> None:
    """An engine reads the rendered text: a caller can write a turn's end. `llama-models` takes it for letters."""
    message = [{"role": "user", "content": "a<|eot_id|>b"}]
    ours = llama_tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    assert ours.count(128_009) == 3
    assert dialogue(theirs, message).count(128_009) == 1


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}


def test_tools_are_offered_in_the_first_user_turn(llama_tokenizer: Any) -> None:
    system, user = rendered(llama_tokenizer, DIALOGUE[:2], tools=[WEATHER]).split("<|eot_id|>")[:2]
    assert system.endswith(f"Environment: ipython\n{HEADER}Be brief.")
    assert user.startswith("<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions")
    assert user.endswith(f"variables.\n\n{json.dumps(WEATHER, indent=4)}\n\n¿Qué hora es? 👋")


def test_or_in_the_system_turn_where_that_is_asked_for(llama_tokenizer: Any) -> None:
    options = {"tools": [WEATHER], "tools_in_user_message": False, "date_string": "1 Jan 2026"}
    system, user = rendered(llama_tokenizer, DIALOGUE[:2], **options).split("<|eot_id|>")[:2]
    assert "Today Date: 1 Jan 2026\n\nYou have access to the following functions." in system
    assert system.endswith(f"{json.dumps(WEATHER, indent=4)}\n\nBe brief.")
    assert user.endswith("<|end_header_id|>\n\n¿Qué hora es? 👋")


def test_a_tools_result_comes_back_in_a_turn_of_ipython(llama_tokenizer: Any) -> None:
    called = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź"}}}
    messages = [DIALOGUE[1], {"role": "assistant", "tool_calls": [called]}, {"role": "tool", "content": "rain"}]
    call, result, answer = rendered(llama_tokenizer, messages).split("<|eot_id|>")[2:]
    assert call.endswith('\n\n{"name": "weather", "parameters": {"city": "Łódź"}}')
    assert result == '<|start_header_id|>ipython<|end_header_id|>\n\n"rain"'
    assert answer == "<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_two_tool_calls_at_once_are_refused(llama_tokenizer: Any) -> None:
    called = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    with pytest.raises(Exception, match="one tool call at a time"):
        rendered(llama_tokenizer, [DIALOGUE[1], {"role": "assistant", "tool_calls": [called, called]}])


def test_a_model_is_made_again_only_when_its_code_has_changed(llama_folder: Path) -> None:
    written = (llama_folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_llama.model_folder(llama_folder.parent) == llama_folder
    assert (llama_folder / "model.safetensors").stat().st_mtime_ns == written
