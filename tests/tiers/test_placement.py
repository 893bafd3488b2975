"""What does not fit is refused before it is started, with what would."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import tiers.placement
from server.config import Config
from tiers.errors import PlacementError, SourceError
from tiers.placement import check_context, gpu_memory, place
from tiers.tier import Resources, Tier

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}


def three(folder: Path, *resources: Mapping[str, object]) -> tuple[Tier, ...]:
    each = resources or ({}, {}, {})
    return tuple(
        replace(tier, checkpoint=folder, resources=Resources.model_validate(own))
        for tier, own in zip(Config().tiers, each, strict=True)
    )


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers.placement, "gpu_memory", lambda: [24 << 30, 80 << 30])


def test_too_little_ram_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"3 engines need 30\d\d\.\d GiB"):
        place(three(tmp_path, *[{"kv_cache_gib": 1000}] * 3), "cpu")


def test_weights_that_have_moved_are_not_placements_to_find(tmp_path: Path) -> None:
    """The check of the checkpoint names what is missing; here it counts nothing."""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone" / "model.safetensors")
    assert place(three(tmp_path, *[{"kv_cache_gib": 0.01}] * 3), "cpu")


@pytest.mark.usefixtures("two_gpus")
def test_tiers_on_one_gpu_share_what_is_left(tmp_path: Path) -> None:
    placed = place(three(tmp_path, {"gpu_memory": 0.5}, {}, {}), "cuda")
    assert [tier.resources.gpu_memory for tier in placed] == [0.5, 0.2, 0.2]


@pytest.mark.usefixtures("two_gpus")
def test_a_tier_on_two_gpus_takes_the_smaller_share(tmp_path: Path) -> None:
    placed = place(three(tmp_path, {"gpus": [0, 1]}, {"gpus": [0]}, {"gpus": [0]}), "cuda")
    assert [tier.resources.gpu_memory for tier in placed] == [0.3, 0.3, 0.3]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("resources", "sentence"),
    [
        (({"gpus": [2]}, {}, {}), "GPU 2 of .*-Reference does not exist; this machine has 2"),
        (({"gpu_memory": 0.6}, {"gpu_memory": 0.5}, {"gpus": [1]}), r"GPU 0.*adds up to 1\.10"),
        (({"gpu_memory": 0.9}, {}, {"gpus": [1]}), "can have together"),
    ],
)
def test_what_does_not_fit_a_gpu_is_refused(
    tmp_path: Path, resources: tuple[dict[str, object], ...], sentence: str
) -> None:
    with pytest.raises(PlacementError, match=sentence):
        place(three(tmp_path, *resources), "cuda")


def test_a_context_beyond_the_model_or_its_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tier = three(tmp_path)[0]
    assert check_context(tier, "cpu") == 8192
    with pytest.raises(PlacementError, match="beyond the model's own 8192"):
        check_context(replace(tier, context_length=9000), "cpu")
    with pytest.raises(PlacementError, match="one request of 8192 tokens needs"):
        check_context(replace(tier, resources=Resources(kv_cache_gib=0.1)), "cpu")


@pytest.mark.usefixtures("two_gpus")
def test_weights_and_context_must_fit_into_the_share_of_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(16 << 30)  # sparse: the size of 8B parameters in BF16

    def on(*gpus: int) -> Tier:
        return replace(three(tmp_path)[0], resources=Resources(gpus=gpus, gpu_memory=0.7))

    assert check_context(on(1), "cuda") == 8192
    assert check_context(on(0, 1), "cuda") == 8192
    with pytest.raises(PlacementError, match=r"needs 18\.\d GiB .* its share is 16\.8 GiB"):
        check_context(on(0), "cuda")


@pytest.mark.parametrize(("given", "sizes"), [(None, [24, 80]), ("1", [80]), ("", []), ("7", [])])
def test_gpus_are_those_that_this_process_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, sizes: list[int]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("""#!/bin/sh
case "$*" in
  *--id=1*) echo 81920 ;;
  *--id=*) echo "No devices were found"; exit 6 ;;
  *) echo 24576; echo 81920 ;;
esac
""")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [size >> 30 for size in gpu_memory()] == sizes


@pytest.mark.parametrize("text", ["", "{", json.dumps(CONFIG | {"architectures": ["GPT2LMHeadModel"]}), "{}"])
def test_a_model_that_is_no_llama_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json"):
        check_context(three(tmp_path)[0], "cpu")
