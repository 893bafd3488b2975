"""The READMEs are true: each of their commands is run by a test, and what they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
KERNELS = (ROOT / "kernels" / "README.md").read_text()

CERTIFIED = "tests/engines/conftest.py::certified"
RUN_BY = {
    "make serve": "tests/engines/conftest.py::assay",
    "make test": ".ci/run::make test",
    "make bench-recipes": "tests/engines/test_2_metadata.py::test_a_recipe_is_measured",
    "make bench-gateway": "tests/engines/test_5_bench.py::test_the_bench_of_gateways_measures_ours",
    "make bench-throughput": "tests/engines/test_5_bench.py::test_a_bench_of_an_engine_measures_both_ways",
    "make bench-scoring": "tests/engines/test_5_bench.py::test_a_bench_of_an_engine_measures_both_ways",
    "make bench-divergence": (
        "tests/engines/test_5_bench.py::test_the_bench_of_divergence_measures_time_and_memory"
    ),
    "make bench": "tests/engines/test_2_metadata.py::test_the_bench_measures_three_tiers",
    "curl http://127.0.0.1:8000/v1/chat/completions": (
        "tests/engines/test_2_metadata.py::test_the_readmes_curl_runs"
    ),
    ".venv/bin/assay serve --config deploy/llama-3.1-8b.yaml": (
        "tests/engines/test_0_start.py::test_llama_without_the_hub_is_a_sentence"
    ),
    ".venv/bin/assay plan --config deploy/llama-3.1-8b.yaml --gpu H100 --count 1": (
        "tests/server/test_cli.py::test_a_plan_is_of_the_configs_tiers_together_and_can_be_json"
    ),
    ".venv/bin/assay plan Llama-3.1-405B-Instruct --gpu H100 --count 8": (
        "tests/server/test_cli.py::test_a_plan_that_does_not_fit_says_what_would_and_exits_with_1"
    ),
    ".venv/bin/assay plan Llama-3.1-70B-Instruct --gpu H100 --count 4": (
        "tests/server/test_cli.py::test_a_plan_shows_every_tier_of_a_model_that_is_not_here"
    ),
    ".venv/bin/assay build --config deploy/llama-3.1-8b.yaml": (
        "tests/engines/test_0_start.py::test_llama_without_the_hub_is_a_sentence"
    ),
    ".venv/bin/assay certify --quick": CERTIFIED,
    ".venv/bin/assay certify Turbo --quick --sign key.pem": CERTIFIED,
    ".venv/bin/assay certify --self-test": "tests/engines/test_5_self_test.py::trials",
    ".venv/bin/assay sensitivity": (
        "tests/engines/test_1_sensitivity.py::test_the_command_measures_and_goes_on_where_it_was"
    ),
    ".venv/bin/assay operators": (
        "tests/engines/test_1_operators.py::test_the_command_runs_them_in_a_process_of_their_own_and_exits_with_what"
    ),
    ".venv/bin/assay certificate keygen key.pem": CERTIFIED,
    ".venv/bin/assay certificate verify": (
        "tests/engines/test_2_certificate.py::test_a_signed_one_verifies_and_one_with_another_byte_does_not"
    ),
    ".venv/bin/assay verify": "tests/server/test_cli.py::test_verifying_reads_all_of_it_and_counts_the_files",
    ".venv/bin/assay build --list": "tests/server/test_cli.py::test_the_recipes_are_described",
    ".venv/bin/assay tiers": "tests/engines/test_2_metadata.py::test_the_tiers_command_shows_a_running_server",
    ".venv/bin/assay keys add alice --tier Lite --requests-per-minute 60": (
        "tests/server/test_cli.py::test_a_key_is_printed_alone_and_only_once"
    ),
    ".venv/bin/assay keys list": "tests/server/test_cli.py::test_a_key_is_printed_alone_and_only_once",
    ".venv/bin/assay keys remove alice": "tests/server/test_cli.py::test_a_removed_key_is_no_longer_listed",
    ".venv/bin/assay --install-completion": "tests/server/test_cli.py::test_completion_can_be_installed",
}
"""Each command, and what runs it."""


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README + KERNELS, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_run_by_a_test(command: str) -> None:
    start = max((start for start in RUN_BY if command.startswith(start)), key=len)
    path, name = RUN_BY[start].split("::")
    assert name in (ROOT / path).read_text()


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "kernels/README.md"])
def test_the_files_it_names_exist(path: str) -> None:
    for name in re.findall(r"`((?:deploy|kernels|server|tiers|tests)/[\w./-]+)`", (ROOT / path).read_text()):
        assert (ROOT / name).exists(), name


def test_no_figure_is_missing() -> None:
    assert re.findall(r"\b[A-Z]+_(?:TABLE|FIGURE)\b", README) == []
