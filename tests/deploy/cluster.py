"""What `kubectl kustomize` makes of deploy/kubernetes, and what a cluster would make of that."""

import hashlib
import ipaddress
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.programs import program

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"
NAMESPACE = "assay"
TEMPLATES = {
    "Deployment": ("spec.template",),
    "Job": ("spec.template",),
    "LeaderWorkerSet": ("spec.leaderWorkerTemplate.leaderTemplate", "spec.leaderWorkerTemplate.workerTemplate"),
}
"""Where the pods of each kind are described."""
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}

Object = dict[str, Any]


def parts() -> list[str]:
    """Every folder that a person applies: those that name the namespace."""
    found = (path.parent for path in KUBERNETES.rglob("kustomization.yaml") if "namespace:" in path.read_text())
    return sorted(str(path.relative_to(KUBERNETES)) for path in found)


OVERLAYS = [part.removeprefix("overlays/") for part in parts() if part.count("/") == 1]
"""The sizes of model: each is applied with the folders below it."""


@dataclass(frozen=True)
class Pod:
    """A pod as its template describes it."""

    owner: str
    labels: Mapping[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def main(self) -> Object:
        first: Object = self.spec["containers"][0]
        return first

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    def environment(self) -> dict[str, str]:
        """As the kubelet would set it, as far as that is known before."""
        return {
            each["name"]: each.get("value") or self._referred(each.get("valueFrom", {}))
            for each in self.main.get("env", ())
        }

    def _referred(self, source: Object) -> str:
        path = source.get("fieldRef", {}).get("fieldPath", "")
        return self.labels[path[len("metadata.labels['") : -len("']")]] if "labels[" in path else ""

    def arguments(self) -> list[str]:
        """Of its command, with variables replaced."""
        environment = self.environment()
        words = [str(word) for word in self.main.get("args", ())]
        for name, value in environment.items():
            words = [word.replace(f"$({name})", value) for word in words]
        return words


class Cluster:
    """All that one or more folders describe."""

    def __init__(self, objects: Sequence[Object]) -> None:
        self.objects = list(objects)

    @classmethod
    def of(cls, overlay: str) -> "Cluster":
        """An overlay with all that belongs to it, and what any overlay may have beside it."""
        mine = [part for part in parts() if f"{part}/".startswith(f"overlays/{overlay}/")]
        every: dict[tuple[str, str], Object] = {}
        for part in [*mine, "prometheus-operator"]:
            for each in rendered(part):
                key = each["kind"], each["metadata"]["name"]
                assert every.setdefault(key, each) == each, f"{part} has another {key}"
        return cls(list(every.values()))

    def all(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def get(self, kind: str, name: str) -> Object:
        return next(each for each in self.all(kind) if each["metadata"]["name"] == name)

    def pods(self) -> list[Pod]:
        return [pod for each in self.objects for pod in pods_of(each)]

    def engines(self) -> dict[str, list[Pod]]:
        """By the name of the tier, in lower case; an engine over several nodes has several pods."""
        found: dict[str, list[Pod]] = {}
        for pod in self.pods():
            if pod.component == "engine":
                found.setdefault(pod.labels["assay/tier"], []).append(pod)
        return found

    def config(self) -> str:
        """The assay.yaml that all pods read."""
        texts = {each["data"]["assay.yaml"] for each in self.all("ConfigMap")}
        assert len(texts) == 1
        return str(texts.pop())


def pods_of(each: Object) -> Iterator[Pod]:
    """The pods that an object makes."""
    for path in TEMPLATES.get(each["kind"], ()):
        template = at(each, path)
        yield Pod(f"{each['kind']}/{each['metadata']['name']}", template["metadata"]["labels"], template["spec"])


def at(each: Object, path: str) -> Any:
    """What an object has under a dotted path."""
    found: Any = each
    for name in path.split("."):
        found = found[name]
    return found


def size_of(quantity: str) -> float:
    """Bytes of a quantity of memory."""
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


@cache
def rendered(part: str) -> tuple[Object, ...]:
    """The objects of one folder, rendered once for all processes of a test run."""
    kubectl = program("kubectl")
    kept = _kept(kubectl) / f"{part.replace('/', '.')}.yaml"
    if not kept.exists():
        draft = kept.with_suffix(f".{os.getpid()}")
        draft.write_text(kustomize(KUBERNETES / part))
        draft.replace(kept)
    return tuple(yaml.load(part, yaml.CSafeLoader) for part in kept.read_text().split("\n---\n"))


def unique() -> Iterator[Object]:
    """Every object of every folder, once."""
    seen = set()
    for part in parts():
        for each in rendered(part):
            if (text := json.dumps(each, sort_keys=True)) not in seen:
                seen.add(text)
                yield each


def kustomize(folder: Path) -> str:
    """What `kubectl apply -k` would apply."""
    done = subprocess.run([program("kubectl"), "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def _kept(kubectl: str) -> Path:
    """A folder for these files and this kubectl."""
    digest = hashlib.sha256(f"{kubectl} {Path(kubectl).stat().st_mtime_ns}".encode())
    for path in sorted([*KUBERNETES.rglob("*.yaml"), *(KUBERNETES.parent / "grafana").rglob("*.*")]):
        digest.update(f"{path}\0".encode() + path.read_bytes())
    every = KUBERNETES.parents[1] / ".pytest_cache" / "kubernetes"
    folder = every / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for other in every.iterdir():
        if other != folder:  # of files that are no more
            shutil.rmtree(other, ignore_errors=True)
    return folder


@cache
def schema(kind: str) -> Object | None:
    """Ours of a custom resource; None of what Kubernetes has itself."""
    path = SCHEMAS / f"{kind.lower()}.json"
    if not path.exists():
        return None
    ours: Object = json.loads(path.read_text())
    return ours


def selects(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector, which is empty for all, takes who has these labels."""
    selector = selector or {}
    asked = selector.get("matchLabels", {})
    if any(labels.get(name) != value for name, value in asked.items()):
        return False
    for each in selector.get("matchExpressions", ()):
        assert each["operator"] == "In", each
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


@dataclass(frozen=True)
class Party:
    """Who sends or is sent packets: a pod here, one of another namespace, or an address outside."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = NAMESPACE
    address: str = "10.0.0.9"


def may_reach(
    policies: Sequence[Object], sender: Party, receiver: Party, port: int, protocol: str = "TCP"
) -> bool:
    """Whether network policies let a connection pass, both where it leaves and where it arrives."""
    return _passes(policies, sender, receiver, "Egress", port, protocol) and _passes(
        policies, receiver, sender, "Ingress", port, protocol
    )


def _passes(
    policies: Sequence[Object], own: Party, other: Party, direction: str, port: int, protocol: str
) -> bool:
    if own.namespace != NAMESPACE:
        return True  # whose policies are not ours
    mine = [
        each["spec"]
        for each in policies
        if direction in each["spec"]["policyTypes"] and selects(each["spec"]["podSelector"], own.labels)
    ]
    peers = "to" if direction == "Egress" else "from"
    rules = [rule for spec in mine for rule in spec.get(direction.lower(), ())]
    return not mine or any(
        any(_is_peer(peer, other) for peer in rule[peers])
        and any(_has_port(each, port, protocol) for each in rule["ports"])
        for rule in rules
    )


def _is_peer(peer: Object, party: Party) -> bool:
    if block := peer.get("ipBlock"):
        address = ipaddress.ip_address(party.address)
        inside = [ipaddress.ip_network(each) for each in block.get("except", ())]
        return address in ipaddress.ip_network(block["cidr"]) and not any(address in each for each in inside)
    if party.namespace is None:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": party.namespace}):
            return False
    elif party.namespace != NAMESPACE:
        return False
    return selects(peer.get("podSelector"), party.labels)


def _has_port(each: Object, port: int, protocol: str) -> bool:
    first, last = int(each["port"]), int(each.get("endPort") or each["port"])
    return bool(each["protocol"] == protocol) and first <= port <= last
