"""What may be called a reference, and what may not."""

import json
from pathlib import Path

import pytest

from tests.tiers.test_placement import CONFIG
from tiers.errors import SourceError
from tiers.reference import write_reference
from tiers.source import Source


def save(path: Path, **types: str) -> None:
    """Tensors of one element of these types, by name."""
    bits = {"F8_E4M3": 8, "BF16": 16, "F16": 16, "F32": 32}
    header, end = {}, 0
    for name, kind in types.items():
        begin, end = end, end + bits[kind] // 8
        header[name] = {"dtype": kind, "shape": [1], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with a model, as far as names and formats go."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save(folder / "model.safetensors", w="BF16")
    return folder


def lay_down(weights: Path) -> tuple[Path, str]:
    target = weights.parent / "bf16"
    target.mkdir()
    origin = write_reference(Source.parse(str(weights)), target, say=lambda text: None)
    return target, origin.provenance


def test_weights_are_linked_and_everything_else_is_copied(weights: Path) -> None:
    target, provenance = lay_down(weights)
    assert (target / "model.safetensors").is_symlink()
    assert not (target / "config.json").is_symlink()
    assert provenance == f"Weights as found in the local folder {weights}."


def test_weights_in_a_hub_cache_are_linked_too(weights: Path) -> None:
    blob = weights.parent / "0123abcd"
    (weights / "model.safetensors").rename(blob)
    (weights / "model.safetensors").symlink_to(blob)
    target, _ = lay_down(weights)
    assert (target / "model.safetensors").is_symlink()


def test_a_conversion_is_said(weights: Path) -> None:
    save(weights / "model.safetensors", w="F32", v="F16")
    assert lay_down(weights)[1].endswith("Stored as F16 and F32, computed in BF16.")


def test_quantized_weights_are_no_reference(weights: Path) -> None:
    (weights / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(SourceError, match="is quantized"):
        lay_down(weights)


def test_fp8_weights_that_do_not_say_so_are_no_reference_either(weights: Path) -> None:
    save(weights / "model.safetensors", w="F8_E4M3")
    with pytest.raises(SourceError, match="holds weights in F8_E4M3"):
        lay_down(weights)


def test_a_missing_shard_is_named(weights: Path) -> None:
    index = {"weight_map": {"w": "model.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="lacks model-00002-of-00002"):
        lay_down(weights)


def test_other_formats_are_not_loaded(weights: Path) -> None:
    (weights / "model.safetensors").rename(weights / "pytorch_model.bin")
    with pytest.raises(SourceError, match="holds no safetensors"):
        lay_down(weights)


def test_another_architecture_is_refused(weights: Path) -> None:
    (weights / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["MistralForCausalLM"]}))
    with pytest.raises(SourceError, match="MistralForCausalLM"):
        lay_down(weights)
