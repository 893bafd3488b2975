"""What may be called a reference, and what may not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiers.test_placement import CONFIG
from tiers.errors import SourceError
from tiers.reference import write_reference
from tiers.source import Source


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with a model, as far as names and formats go."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"w": torch.zeros(2, 2, dtype=torch.bfloat16)}, folder / "model.safetensors")
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
    save_file({"w": torch.zeros(2, 2), "v": torch.zeros(2, dtype=torch.float16)}, weights / "model.safetensors")
    assert lay_down(weights)[1].endswith("Stored as F16 and F32, computed in BF16.")


def test_quantized_weights_are_no_reference(weights: Path) -> None:
    (weights / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(SourceError, match="is quantized"):
        lay_down(weights)


def test_fp8_weights_that_do_not_say_so_are_no_reference_either(weights: Path) -> None:
    save_file({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, weights / "model.safetensors")
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
