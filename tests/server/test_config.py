"""One YAML file → Config; everything wrong with it is one sentence."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from server.config import Config
from server.config_file import load_config
from server.model_config import TierConfig
from server.tracing.settings import TracingConfig
from tiers.conformance.budget import Budget
from tiers.errors import ConfigError
from tiers.tier import TierKind

ROOT = Path(__file__).parents[2]


def load(folder: Path, text: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(path)


def test_the_embedded_config_is_the_default_written_out() -> None:
    written, default = load_config(ROOT / "deploy" / "embedded.yaml"), Config()
    assert [tier.name for tier in written.tiers] == [tier.name for tier in default.tiers]
    assert [tier.recipe for tier in written.tiers] == [tier.recipe for tier in default.tiers]
    assert written.model_dump(exclude={"models"}) == default.model_dump(exclude={"models"})


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_in_deploy_is_valid(path: Path) -> None:
    assert load_config(path).tiers


def test_llama_is_configured_not_coded(tmp_path: Path) -> None:
    config = load_config(ROOT / "deploy" / "llama-3.1-8b.yaml")
    reference = config.tiers[0]
    assert reference.source.kind == "hub"
    assert reference.source.id == "meta-llama/Llama-3.1-8B-Instruct"
    assert [tier.name for tier in config.tiers] == [
        "Llama-3.1-8B-Instruct-Reference",
        "Llama-3.1-8B-Instruct-Turbo",
        "Llama-3.1-8B-Instruct-Lite",
    ]
    assert reference.names == ("Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct-Reference")


def models_of(annotation: object) -> Iterator[type[BaseModel]]:
    """The models that a field's type is made of, and those of their fields, with all that they inherit from."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from (each for each in annotation.__mro__ if issubclass(each, BaseModel) and each is not BaseModel)
        for field in annotation.model_fields.values():
            yield from models_of(field.annotation)
    for part in get_args(annotation):
        yield from models_of(part)


MODELS = frozenset(models_of(Config))


def test_every_field_of_a_config_says_what_it_does() -> None:
    assert {Config, TierConfig, TracingConfig, Budget} <= MODELS
    fields = {f"{model.__name__}.{name}": field for model in MODELS for name, field in model.model_fields.items()}
    assert [name for name, field in fields.items() if not field.description] == []


def test_the_guide_names_the_modules_that_say_what_every_field_is() -> None:
    guide = (ROOT / "deploy" / "README.md").read_text()
    introduction = guide[: guide.index("|")]
    where = {model.__module__.replace(".", "/") + ".py" for model in MODELS}
    assert set(re.findall(r"`((?:server|tiers)/[a-z_/]+\.py)`", introduction)) == where


def test_only_the_configured_tiers_exist(tmp_path: Path) -> None:
    config = load(tmp_path, "models: [{name: M, source: ./m, tiers: {Lite: {}}}]")
    assert [tier.kind for tier in config.tiers] == [TierKind.LITE]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("port: eighty", "port: Input should be a valid integer"),
        ("prot: 80", "prot: Extra inputs are not permitted"),
        ("port: 70000", "less than or equal to 65535"),
        ("models: []", "models: "),
        ("models: [{name: M}]", r"models\.0\.source: Field required"),
        ("models: [{name: M, source: nonsense}]", "neither a hub id"),
        ("models: [{name: M, source: package:other}]", "the only package"),
        ("models: [{name: M, source: ./m, tiers: {Best: {}}}]", "Best"),
        ("models: [{name: M, source: ./m, tiers: {Lite: {recipe: q4}}}]", "There is no recipe 'q4'"),
        ("models: [{name: M, source: ./m, tiers: {Turbo: {recipe: w4a16-gptq}}}]", "Turbo promises fp8"),
        ("models: [{name: M, source: ./m, tiers: {Lite: {gpu_memory: 2}}}]", "gpu_memory"),
        ("models: [{name: M, source: ./m}, {name: M, source: ./n}]", "given to two tiers"),
        ("models: {", "is not valid YAML in line 1"),
        ("[1, 2]", "must hold fields"),
    ],
)
def test_a_bad_value_is_one_sentence_with_file_and_field(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refusal:
        load(tmp_path, text)
    assert "config.yaml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no config file"):
        load_config(tmp_path / "none.yaml")


def _with(folder: Path, tier: str) -> Config:
    return load(
        folder, f"models: [{{name: m, source: /tmp/m, tiers: {{Reference: {{gpus: [0]}}, Lite: {tier}}}}}]"
    )


def test_a_tier_elsewhere_takes_nothing_here(tmp_path: Path) -> None:
    config = _with(tmp_path, "{launch: url, urls: ['http://lite:8100/', 'https://10.0.0.1:443']}")
    assert [tier.kind for tier in config.tiers_started] == [TierKind.REFERENCE]
    lite = config.tiers[1]
    assert config.settings_of(lite).urls == ("http://lite:8100", "https://10.0.0.1:443")
    assert config.all_here().tiers_started == config.all_here().tiers


@pytest.mark.parametrize(
    ("tier", "sentence"),
    [
        ("{launch: url}", "needs urls"),
        ("{urls: ['http://lite:8100']}", "urls are for launch: url"),
        ("{launch: url, urls: ['lite:8100']}", "no http or https URL with a host"),
        ("{launch: url, urls: ['http://:8100']}", "no http or https URL with a host"),
        ("{launch: url, urls: ['http://lite']}", "has no port"),
        ("{launch: url, urls: ['http://lite:99999']}", "is no URL"),
        ("{launch: url, urls: ['http://lite:8100/v1']}", "more than a host and a port"),
        ("{launch: url, urls: ['http://me:secret@lite:8100']}", "more than a host and a port"),
        ("{launch: url, urls: ['http://lite:8100', 'http://lite:8100']}", "given twice"),
        ("{launch: url, urls: ['http://lite:8100'], idle: sleep}", "idle: sleep is for engines that this server"),
        ("{launch: somehow}", "launch"),
    ],
)
def test_where_an_engine_is_must_make_sense(tmp_path: Path, tier: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        _with(tmp_path, tier)
