"""What `assay operators` asks and shows; its running is `tests/engines/test_0_operators.py`'s."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from server.commands.operators import check_memory, chosen_operators, operators_table
from server.config import Config
from tests.tiers.test_recipe import SMOL
from tiers.errors import OperatorsError
from tiers.operators import listing
from tiers.operators.findings import Finding


def finding(**fields: object) -> Finding:
    usual = {
        "operator": "rope", "outcome": "PASS", "kernel": "Rope", "widths": "Tiny", "shape": "2 heads",
        "precision": "BF16", "max_ulps": 0.5, "allowed_ulps": 1.0, "rms_ulps": 0.1, "allowed_rms_ulps": 0.3,
    }  # fmt: skip
    return Finding.model_validate(usual | fields)


def shown(*found: Finding) -> list[list[str]]:
    file = io.StringIO()
    Console(file=file, width=200).print(operators_table(found))
    return [line.split() for line in file.getvalue().splitlines()[1:]]


def test_a_row_is_the_case_nearest_to_its_bounds() -> None:
    near = finding(shape="nearest", rms_ulps=0.29)
    (row,) = shown(finding(), near, finding(max_ulps=0.9))
    assert row == ["rope", "Rope", "Tiny", "3", "nearest", "BF16", "0.5", "1", "0.29", "0.3", "PASS"]


def test_a_case_that_fails_is_shown_however_near_the_others_are() -> None:
    rows = shown(finding(max_ulps=1.0), finding(outcome="FAIL", shape="broken", max_ulps=float("inf")))
    assert [(row[4], row[6], row[-1]) for row in rows] == [("broken", "inf", "FAIL")]


def test_widths_and_kernels_have_rows_of_their_own_and_what_is_absent_has_none() -> None:
    found = (finding(), finding(widths="8B"), finding(widths="8B", kernel="Other"), finding(outcome="absent"))
    assert len(shown(*found)) == 3


def test_without_room_any_error_is_beyond_it() -> None:
    assert finding(max_ulps=0.0, allowed_ulps=0.0, rms_ulps=0.0, allowed_rms_ulps=0.0).nearness == 0
    assert finding(max_ulps=1e-9, allowed_ulps=0.0).nearness == float("inf")


def test_infinite_errors_survive_json() -> None:
    found = finding(max_ulps=float("inf"))
    assert Finding.model_validate_json(found.model_dump_json()) == found


def test_names_are_unique_and_every_error_is_planted_in_an_operator_of_the_list() -> None:
    names = listing.operator_names()
    plants = [plant.name for plant in listing.PLANTS]
    assert len(set(names)) == len(names)
    assert len(set(plants)) == len(plants)
    assert {plant.operator for plant in listing.PLANTS} <= set(names)
    unbroken = set(names) - {plant.operator for plant in listing.PLANTS}
    assert unbroken == {"linear-fp8-block"}, "an operator in which nothing was planted has not been seen to fail"


def test_each_operator_runs_once_and_with_a_planted_error_its_own_alone() -> None:
    assert chosen_operators([], None) == listing.operator_names()
    assert chosen_operators(["rope", "attention", "rope"], None) == ["rope", "attention"]
    assert chosen_operators([], "second-best") == ["greedy"]


def test_a_model_that_is_larger_than_what_is_free_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SMOL.model_dump(exclude={"rope"}) | {"architectures": ["LlamaForCausalLM"]}
    tier = replace(Config().reference_of(None), checkpoint=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("server.commands.operators.free_ram", lambda: 200_000_000)
    with pytest.raises(OperatorsError, match=r"from 0\.3 GB of weights.* 0\.2 GB are free: .*--model"):
        check_memory(tier)
    monkeypatch.setattr("server.commands.operators.free_ram", lambda: 300_000_000)
    check_memory(tier)
