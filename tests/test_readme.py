"""The READMEs are true: each of their commands is run by a test, and what they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
KERNELS = (ROOT / "kernels" / "README.md").read_text()
DEPLOY = (ROOT / "deploy" / "README.md").read_text()

CERTIFIED = "tests/engines/conftest.py::certified"
RUN_BY = {
    "make serve": "tests/engines/conftest.py::assay",
    "make test": ".ci/run::make test",
    "make bench-recipes": "tests/engines/test_2_metadata.py::test_a_recipe_is_measured",
    "make bench-gateway": "tests/engines/test_5_bench.py::test_the_bench_of_gateways_measures_ours",
    "make bench-throughput": "tests/engines/test_5_bench.py::test_a_bench_of_an_engine_measures_both_ways",
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


GUIDED = "tests/deploy/test_kubernetes_guide.py::test_the_guide"
OBJECTS, SECRETS = f"{GUIDED}_speaks_of_objects_that_are_there", f"{GUIDED}s_secrets_are_those_that_pods_mount"
SITE, RULES = (
    f"{GUIDED}s_own_overlay_replaces_the_images",
    "tests/deploy/test_prometheus.py::test_promtool_accepts",
)
SECOND = f"{GUIDED}s_second_copy_is_scaled_by_what_is_asked_of_itself"
IMAGE = "tests/engines/test_5_image.py::test_buildah_builds_the_image_from_the_dockerfile"
LINTED = "tests/deploy/test_image.py::test_hadolint_has_nothing_to_say"
COMPOSED = "tests/deploy/test_compose.py::test_it_is_what_the_compose_specification_allows"
UNITS = "tests/deploy/test_systemd.py::test_they_run_as_the_user_of_the_images"
ENGINE, GATEWAY = "tests/engines/test_7_halves.py::first", "tests/engines/test_7_halves.py::gateway"
STRANGERS = "tests/engines/test_7_halves.py::test_an_engine_tells_strangers"
DRAINED = "tests/engines/test_4_stop.py::test_drain_under_load"
STOPPED = "tests/server/engines/test_drains.py::test_what_is_stopped_answers_whom_it_accepted"
DEPLOYED_BY = {
    ".venv/bin/assay plan --config deploy/llama-3.1-70b-4xh100.yaml": (
        "tests/deploy/test_configs.py::test_a_config_fits_its_hardware"
    ),
    "docker build --target cpu": IMAGE,
    "docker build --target": LINTED,
    "docker run": IMAGE,
    "docker stop": IMAGE,
    "deploy/compose/secrets.sh": "tests/deploy/test_compose.py::test_secrets_are_made_once",
    'PIP_EXTRA_INDEX_URL="$TORCH_CPU_INDEX" docker compose': COMPOSED,
    "docker compose": COMPOSED,
    "install -D": UNITS,
    "install -m": UNITS,
    "systemd-sysusers": UNITS,
    "systemctl": UNITS,
    "runuser": UNITS,
    "systemd-analyze verify": "tests/deploy/test_systemd.py::test_systemd_takes_them_without_a_word",
    "assay engine Lite --config config.yaml --host 0.0.0.0 --print": (
        "tests/server/test_cli.py::test_what_starts_an_engine_is_printed_without_its_key"
    ),
    "assay engine Lite": ENGINE,
    "assay gateway": GATEWAY,
    "curl http://lite:8100/health": STRANGERS,
    'curl -H "authorization': STRANGERS,
    "mkdir -p site": SITE,
    "cat > site": SITE,
    "mkdir -p next": SECOND,
    "cat > next": SECOND,
    "deploy/kubernetes/ended.sh": "tests/deploy/test_kubernetes_jobs.py::test_who_waits_for_a_job_that_fails",
    "kubectl apply": f"{GUIDED}_applies_what_is_rendered",
    "openssl rand": SECRETS,
    "kubectl -n assay create secret": SECRETS,
    "ASSAY_HOME=keys .venv/bin/assay keys add": SECRETS,
    "kubectl -n assay": OBJECTS,
    "kind load": OBJECTS,
    "python deploy/kubernetes/prometheus_rule.py": (
        "tests/deploy/test_kubernetes_guide.py::test_the_rules_are_those_of_prometheus"
    ),
    "ray start": "tests/engines/test_8_ray.py::test_a_lost_node_costs_no_request",
    "assay plan Llama-3.1-405B-Instruct --gpu H100": "tests/server/test_cli.py::test_a_plan_over_two_nodes_fits",
    "redis-server": "tests/server/redis_server.py::redis_server",
    "make bench-routing": "tests/engines/test_5_bench.py::test_the_bench_of_routing_measures_both_choices",
    "assay drain Lite --replica": "tests/server/engines/test_drains.py::test_one_of_two_can_be_stopped",
    "assay drain Lite --": STOPPED,
    "assay drain": DRAINED,
    "promtool check rules": RULES,
    "promtool test rules": "tests/deploy/test_prometheus.py::test_every_alert_fires_when_it_should",
    "curl http://127.0.0.1:8000/v1/chat/completions -H": (
        "tests/engines/test_1_tracing.py::test_an_engines_span_continues_that_of_the_gateway"
    ),
    "ASSAY_LOG_FORMAT=json assay serve": "tests/server/test_logs.py::test_all_that_a_server_writes_is_json",
}
"""Those of the guide for operators: what runs each, or its equivalent without a cluster or a Docker engine."""


def commands(text: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    without_files = re.sub(
        r"^(cat > [^\n]*) <<'END'\n.*?^END$", r"\1", "".join(blocks), flags=re.MULTILINE | re.DOTALL
    )
    lines = without_files.replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("command", "run_by"),
    [
        *((command, RUN_BY) for command in commands(README + KERNELS)),
        *((command, DEPLOYED_BY) for command in commands(DEPLOY)),
    ],
)
def test_every_command_is_run_by_a_test(command: str, run_by: dict[str, str]) -> None:
    found = [start for start in run_by if begins(command, start)]
    assert found, "nothing runs it"
    path, name = run_by[max(found, key=len)].split("::")
    text = (ROOT / path).read_text()
    assert re.search(rf"^\s*(?:async )?def {name}" if path.endswith(".py") else rf"^{name}$", text, re.MULTILINE)


def begins(command: str, start: str) -> bool:
    """Whether it does, with whole words: `make bench-limits` is no `make bench`."""
    return re.match(re.escape(start) + (r"(?![\w-])" if start[-1].isalnum() else ""), command) is not None


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "kernels/README.md", "deploy/README.md"])
def test_the_files_it_names_exist(path: str) -> None:
    for name in re.findall(r"`((?:deploy|kernels|server|tiers|tests)/[\w./-]+)`", (ROOT / path).read_text()):
        assert (ROOT / name).exists(), name


def test_no_figure_is_missing() -> None:
    assert re.findall(r"\b[A-Z]+_(?:TABLE|FIGURE)\b", README) == []
