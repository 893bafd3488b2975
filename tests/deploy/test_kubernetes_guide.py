"""The guide to Kubernetes is true: what its commands apply, make and name is there."""

import base64
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from typer.testing import CliRunner

from server.cli import app
from tests.deploy.cluster import (
    KUBERNETES,
    NAMESPACE,
    OVERLAYS,
    Cluster,
    kustomize,
    parts,
    pods_of,
    rendered,
    schema,
    unique,
)
from tests.programs import program

GUIDE = KUBERNETES.parent / "README.md"


def test_the_rules_are_those_of_prometheus() -> None:
    spec = importlib.util.spec_from_file_location("prometheus_rule", KUBERNETES / "prometheus_rule.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    alert = {"alert": "A", "expr": "up == 0", "for": "5m", "labels": {"severity": "page"}}
    groups = [{"name": "a", "interval": "30s", "rules": [alert, {"record": "a:b", "expr": "sum(up)"}]}]
    made = yaml.safe_load(script.wrapped("rules.yml", yaml.safe_dump({"groups": groups})))
    jsonschema.validate(made, schema("PrometheusRule"))
    assert made["spec"] == {"groups": groups}
    again = "run deploy/kubernetes/prometheus_rule.py and list what it writes in kustomization.yaml beside it"
    for source, (target, _) in script.FILES.items():
        whole = script.wrapped(source, (script.SOURCES / source).read_text())
        assert (script.TARGETS / target).read_text() == whole, again
    applied = {
        each["metadata"]["name"] for each in rendered("prometheus-operator") if each["kind"] == made["kind"]
    }
    assert applied == {name for _, name in script.FILES.values()}, again
    assert {path.name for path in script.SOURCES.glob("*.yml")} == {*script.FILES, "prometheus.yml"}


def guide() -> list[str]:
    """The commands of its part on Kubernetes; those of an overlay of one's own in one piece."""
    part = GUIDE.read_text().partition("\n## Kubernetes\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", part, flags=re.MULTILINE | re.DOTALL)
    commands, text = [], "".join(blocks)
    while text:
        end = text.index("\nEND\n") + 5 if text.startswith("cat ") else text.index("\n") + 1
        commands.append(text[:end].strip())
        text = text[end:]
    return commands


KNOWN = (
    *(
        "kubectl apply -k ",
        "kubectl apply -f ",
        "kubectl -n assay create secret ",
        "deploy/kubernetes/ended.sh assay-",
        "openssl rand ",
        "mkdir ",
        "cat ",
    ),
    *("ASSAY_HOME=keys .venv/bin/assay keys add ", "kind load ", "python deploy/kubernetes/prometheus_rule.py"),
    *(
        f"kubectl -n assay {verb} "
        for verb in ("wait", "rollout", "logs", "delete", "scale", "port-forward", "get")
    ),
)


def test_every_command_of_the_guide_is_of_a_kind_that_is_tested_here() -> None:
    assert [command for command in guide() if not command.startswith(KNOWN)] == []


def test_the_guide_applies_what_is_rendered() -> None:
    applied = [command.split()[-1] for command in guide() if command.startswith("kubectl apply")]
    assert len(applied) > 5
    for path in applied:
        relative = Path(path).relative_to("deploy/kubernetes")
        assert str(relative) in parts() or (KUBERNETES / relative).is_file(), path


def test_the_guide_speaks_of_objects_that_are_there() -> None:
    there = {
        f"{each['kind'].lower()}/{each['metadata']['name']}"
        for size in OVERLAYS
        for each in Cluster.of(size).objects
    }
    found = []
    elsewhere = re.findall(r"^kubectl .*$", GUIDE.read_text(), flags=re.MULTILINE)
    for command in [*guide(), *elsewhere]:
        words = command.split()
        if words[:3] != ["kubectl", "-n", NAMESPACE] or words[3] in ("create", "logs"):
            continue
        found += [word for word in words if re.fullmatch(r"[a-z]+/assay-[a-z-]+", word)]
        if words[4] in ("job", "deployment", "leaderworkerset"):
            found += [f"{words[4]}/{word}" for word in words[5:] if not word.startswith("--")]
    assert len(found) > 6
    assert set(found) <= there


def test_the_guide_certifies_once_every_engine_is_there_and_waits_for_jobs_that_are() -> None:
    commands = guide()
    cluster = Cluster.of("8b")
    (certified,) = (at for at, command in enumerate(commands) if command.endswith("overlays/8b/certify"))
    before = commands[commands.index("kubectl apply -k deploy/kubernetes/overlays/8b") : certified]
    status = f"kubectl -n {NAMESPACE} rollout status "
    assert {each.removeprefix(status) for each in before if each.startswith(status)} == {
        f"deployment/assay-engine-{tier}" for tier in cluster.engines()
    }
    waited = [command.split()[1] for command in commands if "ended.sh" in command]
    assert waited == [job["metadata"]["name"] for job in cluster.all("Job")]


def test_the_guides_secrets_are_those_that_pods_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (make_key,) = (command for command in guide() if command.startswith("openssl rand "))
    subprocess.run(["sh", "-ec", make_key], check=True)
    add = next(command for command in guide() if "assay keys add" in command)
    home, _, *words = add.split()
    done = CliRunner().invoke(app, words, env={"ASSAY_HOME": home.removeprefix("ASSAY_HOME=")})
    assert done.exit_code == 0, done.output
    made: dict[str, dict[str, str]] = {}
    for command in guide():
        if " create secret " in command:
            asked = shlex.split(command.replace('"$HF_TOKEN"', "hf_token"))
            dry = [program("kubectl"), *asked[1:], "--dry-run=client", "--output=json"]
            secret = json.loads(subprocess.run(dry, capture_output=True, check=True).stdout)
            made[secret["metadata"]["name"]] = secret["data"]
    assert {name: set(data) for name, data in made.items()} == {
        "assay-engine-key": {"key"},
        "assay-api-keys": {"keys.json"},
        "assay-hub": {"token"},
    }
    key = base64.b64decode(made["assay-engine-key"]["key"]).decode()
    assert len(key) == 64
    assert key == key.strip(), "Prometheus' operator puts it into a header as it is"
    for each in unique():
        for pod in pods_of(each):
            mounted = {volume["secret"]["secretName"] for volume in pod.spec["volumes"] if "secret" in volume}
            refs = [one["valueFrom"].get("secretKeyRef") for one in pod.main.get("env", ()) if "valueFrom" in one]
            assert mounted | {ref["name"] for ref in refs if ref} <= made.keys()
            assert all(ref["key"] in made[ref["name"]] for ref in refs if ref)
    for size in OVERLAYS:
        written = yaml.safe_load(Cluster.of(size).config())
        assert Path(written["engine_key"]).name in made["assay-engine-key"]
        assert Path(written["keys"]).name in made["assay-api-keys"]


def written(overlay: str, folder: Path) -> tuple[Path, list[str]]:
    """Where the guide has one write an overlay of one's own, and its lines."""
    (heredoc,) = (command for command in guide() if command.startswith(f"cat > {overlay}/"))
    head, *lines, _ = heredoc.splitlines()
    return folder / head.split()[2], lines


@pytest.mark.program
def test_the_guides_own_overlay_replaces_the_images(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "deploy" / "kubernetes")
    target, lines = written("site", tmp_path)
    for part in ("overlays/8b", "overlays/8b/build", "overlays/405b/leader-worker-set"):
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n".join(lines).replace("overlays/8b", part))
        replaced = {each for each in re.findall(r"image: (\S+)", kustomize(target.parent)) if "redis" not in each}
        assert replaced
        assert all(re.fullmatch(r"registry\.example/assay(-quantize)?:0\.1\.0-cuda", each) for each in replaced)


def test_the_guides_second_copy_is_scaled_by_what_is_asked_of_itself(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "deploy" / "kubernetes")
    target, lines = written("next", tmp_path)
    target.parent.mkdir()
    target.write_text("\n".join(lines))
    made = list(yaml.safe_load_all(kustomize(target.parent)))
    assert {each["metadata"].get("namespace", each["metadata"]["name"]) for each in made} == {"assay-next"}
    queries = [
        trigger["metadata"]["query"]
        for each in made
        if each["kind"] == "ScaledObject"
        for trigger in each["spec"]["triggers"]
    ]
    assert len(queries) == 6
    for query in queries:
        assert set(re.findall(r"namespace=\"(.*?)\"", query)) == {"assay-next"}
