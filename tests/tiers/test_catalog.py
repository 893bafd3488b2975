"""The catalog's figures are the published ones, and a checkpoint that bears a member's name must be it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tiers.catalog import CATALOG, Member, ModelShape, RopeScaling, checked_shape, find_member
from tiers.errors import ConfigError, SourceError
from tiers.source import EMBEDDED_PACKAGE, Source

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
OLD_ROPE = {"rope_theta": 500000.0, "rope_scaling": SCALING}
"""As Meta published it."""
NEW_ROPE = {"rope_parameters": {"rope_theta": 500000.0, **SCALING}}
"""As transformers 5 writes it."""


def config(member: Member, rope: dict[str, Any]) -> dict[str, Any]:
    """A member's config.json as it is published: without head_dim."""
    sizes = member.shape.model_dump(exclude={"rope", "head_dim"})
    return {"architectures": ["LlamaForCausalLM"], **sizes, **rope}


def write(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def hub(name: str) -> Source:
    return Source(kind="hub", id=name)


@pytest.mark.parametrize(
    ("size", "billions", "gigabytes", "kv_kib"),
    [("8B", 8.03, 16.06, 128), ("70B", 70.55, 141.1, 320), ("405B", 405.85, 811.7, 504)],
)
@pytest.mark.parametrize("variant", ["", "-Instruct"])
def test_figures_are_the_published_ones(
    size: str, billions: float, gigabytes: float, kv_kib: int, variant: str
) -> None:
    shape = find_member(f"Llama-3.1-{size}{variant}").shape
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert shape.parameters * 2 / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert shape.kv_bytes_per_token == kv_kib * 1024
    assert shape.max_position_embeddings == 131072
    assert shape.rope.theta == 500000.0
    assert shape.rope.scaling == RopeScaling.model_validate(SCALING)


@pytest.mark.parametrize("member", CATALOG, ids=lambda member: member.name)
def test_every_shape_adds_up_to_the_published_size(member: Member) -> None:
    assert member.shape.parameters * 2 == member.published_bytes


@pytest.mark.parametrize("rope", [OLD_ROPE, NEW_ROPE], ids=["published", "transformers-5"])
@pytest.mark.parametrize("member", CATALOG[:6], ids=lambda member: member.name)
def test_a_members_own_config_passes_in_both_spellings(
    tmp_path: Path, member: Member, rope: dict[str, Any]
) -> None:
    folder = write(tmp_path, config(member, rope))
    assert checked_shape(folder, "anything", hub(member.ids[0])) == member.shape


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_key_value_heads": 16}, r"num_key_value_heads is 16 and the catalog has 8"),
        ({"vocab_size": 128000}, r"vocab_size is 128000 and the catalog has 128256"),
        ({"rope_theta": 10000.0}, r"rope\.theta is 10000\.0 and the catalog has 500000\.0"),
        ({"rope_scaling": None}, r"rope\.scaling is None and the catalog has .*llama3"),
        ({"rope_scaling": SCALING | {"factor": 32.0}}, r"rope\.scaling\.factor is 32\.0 and the catalog has 8\.0"),
    ],
)
@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("mine", hub("meta-llama/Llama-3.1-405B")),
        ("mine", hub("meta-llama/Meta-Llama-3.1-405B")),
        ("Llama-3.1-405B", Source(kind="folder", id="/weights")),
    ],
    ids=["hub", "former-hub-id", "name"],
)
def test_a_checkpoint_that_only_bears_the_name_is_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str, model: str, source: Source
) -> None:
    folder = write(tmp_path, config(find_member("Llama-3.1-405B"), OLD_ROPE) | change)
    with pytest.raises(SourceError, match=f"does not describe Llama-3.1-405B: {sentence}"):
        checked_shape(folder, model, source)


def test_any_other_llama_is_taken_as_its_config_says(tmp_path: Path) -> None:
    fields = config(find_member("Llama-3.1-8B"), {"rope_scaling": {"type": "linear", "factor": 2.0}})
    shape = checked_shape(write(tmp_path, fields | {"vocab_size": 32000}), "mine", hub("me/other"))
    assert shape.vocab_size == 32000
    assert shape.rope.theta == 10000.0
    assert shape.rope.scaling == RopeScaling(rope_type="linear", factor=2.0)


def test_an_old_config_leaves_what_it_does_not_name_to_llamas_defaults(tmp_path: Path) -> None:
    fields = config(find_member("Llama-3.1-8B"), {})
    for name in ("num_key_value_heads", "tie_word_embeddings"):
        del fields[name]
    shape = ModelShape.read(write(tmp_path, fields))
    assert (shape.num_key_value_heads, shape.head_dim, shape.tie_word_embeddings) == (32, 128, False)
    assert shape.rope.scaling is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_what_is_no_llama_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json"):
        ModelShape.read(tmp_path)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_attention_heads"])
def test_a_config_without_a_size_is_refused_with_its_name(tmp_path: Path, field: str) -> None:
    fields = config(find_member("Llama-3.1-8B"), OLD_ROPE)
    del fields[field]
    with pytest.raises(SourceError, match=field):
        ModelShape.read(write(tmp_path, fields))


def test_the_embedded_model_is_known_by_its_package() -> None:
    from tiers.catalog import member_of

    found = member_of("mine", Source(kind="package", id=EMBEDDED_PACKAGE))
    assert found is not None
    assert found.licence.startswith("Apache")


def test_an_unknown_model_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Llama-3\.1-405B-Instruct"):
        find_member("Llama-4")
