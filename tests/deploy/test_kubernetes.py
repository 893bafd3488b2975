"""deploy/kubernetes, as `kubectl kustomize` renders it: valid, confined, connected, and patient."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import typer.main
import yaml
from referencing import Registry, Resource

from server.cli import app
from server.config import Config
from server.config_file import load_config
from server.engine_key import VARIABLE
from server.launch.gathering import Gathering, spills_over
from server.launch.local import LocalLaunch
from server.launch.over_nodes import OverNodes
from server.metrics import Metrics
from server.one_engine import OneEngine
from tests.deploy.cluster import (
    KUBERNETES,
    NAMESPACE,
    OVERLAYS,
    SCHEMAS,
    Cluster,
    Object,
    Party,
    Pod,
    at,
    may_reach,
    parts,
    pods_of,
    schema,
    selects,
    size_of,
    unique,
)
from tiers.errors import PlacementError
from tiers.hardware import Machine, find_card
from tiers.memory import weights_of
from tiers.placement import together
from tiers.plan import shape_of
from tiers.tier import Tier, TierKind

BUILT_IN = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.37.0-local-strict"
"""Kubernetes' own schemas, in which a field that it does not know is an error."""
CARDS = {"NVIDIA-H100-80GB-HBM3": "H100"}
"""By the label that NVIDIA's GPU feature discovery gives a node."""
SLOWEST_VOLUME = 0.5e9
"""Bytes a second; what is slower needs longer probes."""
COMPILING_S = 300
"""With empty caches, as every new pod has them; nothing is compiled on CPUs."""
VERIFYING_S = 120
"""For what an engine computes to be read back, and for its first answers: it is well after these only."""
TEARDOWN_S = 30
"""For vLLM to end after its last request, and give the GPU back."""


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cluster(overlay: str) -> Cluster:
    return Cluster.of(overlay)


@pytest.fixture
def config(cluster: Cluster, tmp_path: Path) -> Config:
    path = tmp_path / "assay.yaml"
    path.write_text(cluster.config())
    return load_config(path)


def validate(each: Object) -> None:
    """Hold it against Kubernetes' own schema."""
    group, _, version = each["apiVersion"].rpartition("/")
    kind = "-".join([each["kind"].lower(), *([group.partition(".")[0]] if group else []), version])
    validator(kind).validate(each)


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """As `kubernetes_validate.validate` makes one, which reads all definitions again for every object."""
    own = Resource.from_contents(contents(kind))
    return jsonschema.Draft202012Validator(own.contents, registry=own @ definitions())


@cache
def definitions() -> Registry[Any]:
    return Resource.from_contents(contents("_definitions")) @ Registry()


def contents(name: str) -> Object:
    found: Object = json.loads((BUILT_IN / f"{name}.json").read_text())
    return found


def gpus_of(pod: Pod) -> int:
    requested, limit = (pod.main["resources"][each].get("nvidia.com/gpu", 0) for each in ("requests", "limits"))
    assert requested == limit, "Kubernetes takes no other"
    return int(limit)


def pre_stop_s(pod: Pod) -> int:
    return int(pod.main["lifecycle"]["preStop"]["sleep"]["seconds"])


def window_s(probe: Object) -> int:
    """How long a probe may fail before anything is done."""
    return int(probe["periodSeconds"] * probe["failureThreshold"])


def is_leader(pod: Pod) -> bool:
    """Whether it answers: of an engine over several nodes one pod does."""
    return pod.labels.get("assay/role") != "worker"


def weights_bytes(tier: Tier) -> float:
    shape = shape_of(tier)
    return weights_of(shape, tier.recipe).total if shape else 0.3e9  # the embedded model, at most


# What is rendered


def test_every_size_has_what_the_guide_speaks_of() -> None:
    assert set(OVERLAYS) == {"8b", "70b", "405b", "demo-cpu"}
    assert {part.partition("/")[2] for part in parts() if part.startswith("overlays/")} == {
        *OVERLAYS,
        *(f"{size}/{job}" for size in OVERLAYS for job in ("build", "certify")),
        *(f"{size}/keda" for size in OVERLAYS if size != "demo-cpu"),
        "405b/leader-worker-set",
    }


def test_all_of_it_is_valid_to_kubernetes_or_to_the_schema_of_its_definition() -> None:
    for each in unique():
        if (ours := schema(each["kind"])) is not None:
            jsonschema.validate(each, ours)
        else:
            validate(each)
        if each["kind"] not in ("Deployment", "Job"):
            for pod in pods_of(each):  # which the schema of a custom resource leaves to Kubernetes
                metadata = {"labels": pod.labels}
                validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec})


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("ScaledObject", "spec.triggers.0.metadata"),
        ("LeaderWorkerSet", "spec.leaderWorkerTemplate"),
        ("ServiceMonitor", "spec.endpoints.0"),
    ],
)
def test_a_misspelt_field_of_a_custom_resource_is_found(kind: str, path: str) -> None:
    good = next(each for each in unique() if each["kind"] == kind)
    bad = json.loads(json.dumps(good))
    inner = bad
    for name in path.split("."):
        inner = inner[int(name) if name.isdigit() else name]
    inner["misspelt"] = "1"
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.validate(bad, schema(kind))


def test_each_schema_is_one_and_of_a_kind_that_is_used() -> None:
    for path in SCHEMAS.glob("*.json"):
        jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))
    custom = {each["kind"].lower() for each in unique() if "." in each["apiVersion"].partition("/")[0]}
    ours = {path.stem for path in SCHEMAS.glob("*.json")}
    assert ours <= custom


def test_nothing_is_in_a_syntax_that_only_a_newer_kustomize_reads() -> None:
    newer = {"components", "patches", "labels", "replacements", "namePrefixes", "helmCharts"}
    for path in KUBERNETES.rglob("kustomization.yaml"):
        fields = set(re.findall(r"^(\w+):", path.read_text(), flags=re.MULTILINE))
        assert not fields & newer, path
        resources = re.search(r"^resources:\n((?:  - .*\n)+)", path.read_text(), flags=re.MULTILINE)
        for name in re.findall(r"- (\S+)", resources[1]) if resources else ():
            assert (path.parent / name).is_file(), f"{path}: kustomize 2.0 reads folders by `bases:`"


def test_no_image_is_of_anybodys_registry() -> None:
    images = {each["image"] for one in unique() for pod in pods_of(one) for each in pod.containers}
    assert images == {"assay:cuda", "assay:cpu", "assay-quantize:cuda", "assay-quantize:cpu", "redis:7.4"}


# Who is confined


def test_every_container_is_what_restricted_pod_security_asks(cluster: Cluster) -> None:
    labels = cluster.get("Namespace", NAMESPACE)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in cluster.pods():
        spec = pod.spec
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
        assert all((volume.keys() - {"name"}) <= allowed for volume in spec["volumes"])
        for container in pod.containers:
            own = container["securityContext"]
            assert own == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, pod.owner
            assert not any("hostPort" in port for port in container.get("ports", ()))
            assert container["resources"]["limits"].keys() >= {"memory"}


def test_what_must_be_written_to_can_be_and_what_is_shared_only_by_jobs(cluster: Cluster) -> None:
    writers = {("assay-checkpoints", "build"), ("assay-certificates", "certify")}
    for pod in cluster.pods():
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in pod.main["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == volumes.keys(), pod.owner
        assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
        if pod.component != "limits":
            home = pod.environment()["HOME"]
            assert "emptyDir" in volumes[mounts[home]["name"]]
        for mount in mounts.values():
            claim = volumes[mount["name"]].get("persistentVolumeClaim", {}).get("claimName")
            if claim and (claim, pod.component) not in writers:
                assert mount["readOnly"] is True, (pod.owner, claim)
        if pod.component == "engine":
            shared = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
            assert shared["medium"] == "Memory"
            assert size_of(shared["sizeLimit"]) < size_of(pod.main["resources"]["limits"]["memory"])


def pods_by_component(cluster: Cluster) -> dict[str, Party]:
    return {pod.component: Party(pod.labels) for pod in cluster.pods() if is_leader(pod)}


def test_only_the_gateway_and_who_measures_reach_an_engine(cluster: Cluster) -> None:
    policies, here = cluster.all("NetworkPolicy"), pods_by_component(cluster)
    engines = [Party(pod.labels) for pods in cluster.engines().values() for pod in pods if is_leader(pod)]
    prometheus = Party({"app.kubernetes.io/name": "prometheus"}, "monitoring")
    for engine in engines:
        assert may_reach(policies, here["gateway"], engine, 8100)
        assert may_reach(policies, here["certify"], engine, 8100)
        assert may_reach(policies, prometheus, engine, 8100)
        others = [
            here["build"],
            *([here["limits"]] if "limits" in here else []),
            Party({"app": "anything"}),
            Party({"app": "anything"}, "default"),
            Party({"app": "anything"}, "monitoring"),
            Party({}, "ingress-nginx"),
            Party(dict(here["gateway"].labels), "default"),
            *engines,
        ]
        assert [other for other in others if may_reach(policies, other, engine, 8100)] == []
        assert not may_reach(policies, here["gateway"], engine, 6379)


def test_callers_come_through_the_ingress_and_nobody_else_does(cluster: Cluster) -> None:
    policies, here = cluster.all("NetworkPolicy"), pods_by_component(cluster)
    assert may_reach(policies, Party({}, "ingress-nginx"), here["gateway"], 8000)
    assert may_reach(
        policies, Party({"app.kubernetes.io/name": "prometheus"}, "monitoring"), here["gateway"], 8000
    )
    assert not may_reach(policies, Party({}, "default"), here["gateway"], 8000)
    assert not may_reach(policies, Party({}), here["gateway"], 8000)
    assert not may_reach(policies, Party(namespace=None, address="192.0.2.7"), here["gateway"], 8000)


def test_everybody_finds_names_and_only_the_build_leaves_the_cluster(cluster: Cluster) -> None:
    policies = cluster.all("NetworkPolicy")
    dns = Party({"k8s-app": "kube-dns"}, "kube-system")
    hub = Party(namespace=None, address="203.0.113.7")
    inside = [Party(namespace=None, address=each) for each in ("10.96.0.1", "169.254.169.254", "192.168.1.1")]
    for pod in cluster.pods():
        own = Party(pod.labels)
        assert may_reach(policies, own, dns, 53, "UDP")
        assert may_reach(policies, own, hub, 443) == (pod.component == "build"), pod.owner
        assert not may_reach(policies, own, hub, 80)
        assert not any(may_reach(policies, own, each, 443) for each in inside)


def test_who_has_spans_of_a_trace_reaches_the_collector_and_nobody_else_does(cluster: Cluster) -> None:
    policies = cluster.all("NetworkPolicy")
    collector = Party({"app": "collector"}, "monitoring")
    for pod in cluster.pods():
        own, traced = Party(pod.labels), pod.component in ("gateway", "engine")
        assert may_reach(policies, own, collector, 4318) == traced, pod.owner
        assert not may_reach(policies, own, Party({"app": "collector"}, "default"), 4318)
        assert not may_reach(policies, own, collector, 9090)


def test_limits_are_the_gateways_alone() -> None:
    cluster = Cluster.of("8b")
    policies, here = cluster.all("NetworkPolicy"), pods_by_component(cluster)
    reach = {name for name, party in here.items() if may_reach(policies, party, here["limits"], 6379)}
    assert reach == {"gateway"}


def test_the_two_pods_of_an_engine_over_nodes_reach_each_other_and_not_as_callers() -> None:
    cluster = Cluster.of("405b")
    policies = cluster.all("NetworkPolicy")
    leader, worker = (Party(pod.labels) for pod in cluster.engines()["reference"])
    turbo = Party(cluster.engines()["turbo"][0].labels)
    for port in (6379, 8099, 8101, 44444):
        assert may_reach(policies, leader, worker, port)
        assert may_reach(policies, worker, leader, port)
        assert not may_reach(policies, turbo, leader, port)
        assert not may_reach(policies, leader, turbo, port)
    assert not may_reach(policies, worker, leader, 8100)


# Who finds whom


def test_every_selector_takes_its_own_pods_and_no_others(cluster: Cluster) -> None:
    pods = cluster.pods()
    for each in cluster.all("Deployment"):
        own = {id(pod.labels) for pod in pods if selects(each["spec"]["selector"], pod.labels)}
        (template,) = pods_of(each)
        matching = [pod.owner for pod in pods if id(pod.labels) in own]
        assert matching == [template.owner]
    for each in [*cluster.all("PodDisruptionBudget")]:
        taken = {pod.owner for pod in pods if selects(each["spec"]["selector"], pod.labels)}
        assert len(taken) == 1, each["metadata"]["name"]
    budgets = cluster.all("PodDisruptionBudget")
    for pod in pods:
        if pod.component in ("gateway", "engine") and is_leader(pod):
            assert any(selects(each["spec"]["selector"], pod.labels) for each in budgets), pod.owner


def test_every_service_has_pods_that_listen_on_its_port(cluster: Cluster) -> None:
    for each in cluster.all("Service"):
        pods = [pod for pod in cluster.pods() if selects({"matchLabels": each["spec"]["selector"]}, pod.labels)]
        assert len(pods) == 1, each["metadata"]["name"]
        listening = {port["name"]: port["containerPort"] for port in pods[0].main["ports"]}
        for port in each["spec"]["ports"]:
            assert listening[port["targetPort"]] == port["port"]
        # A name that is one address would hide from the gateway how many engines there are.
        assert (each["spec"].get("clusterIP") == "None") == (pods[0].component == "engine")


def test_what_scales_or_watches_something_names_what_is_there(cluster: Cluster) -> None:
    for each in [*cluster.all("HorizontalPodAutoscaler"), *cluster.all("ScaledObject")]:
        target = each["spec"]["scaleTargetRef"]
        found = cluster.get(target["kind"], target["name"])
        assert found["apiVersion"] == target["apiVersion"]
        assert "replicas" not in found["spec"], "an apply would set back what was scaled"
    for each in cluster.all("ServiceMonitor"):
        services = [
            one for one in cluster.all("Service") if selects(each["spec"]["selector"], one["metadata"]["labels"])
        ]
        assert services
        for endpoint in each["spec"]["endpoints"]:
            for one in services:
                assert endpoint["port"] in {port["name"] for port in one["spec"]["ports"]}
    credentials = cluster.get("ServiceMonitor", "assay-engine")["spec"]["endpoints"][0]["authorization"]
    assert credentials["credentials"] == {"name": "assay-engine-key", "key": "key"}


def test_every_volume_is_of_something_that_is_there_or_that_the_guide_has_one_make(cluster: Cluster) -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in cluster.objects}
    secrets = set()
    for pod in cluster.pods():
        for volume in pod.spec["volumes"]:
            if source := volume.get("configMap"):
                assert ("ConfigMap", source["name"]) in there, pod.owner
                assert re.search(r"-[a-z0-9]{10}$", source["name"]), "a changed config would be no new rollout"
            if source := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", source["claimName"]) in there, pod.owner
            if source := volume.get("secret"):
                secrets.add(source["secretName"])
    assert secrets == {"assay-engine-key", "assay-api-keys"}


# What the config says, and what is there for it


def test_the_config_is_one_that_assay_reads_and_keeps_to_where_things_are_mounted(
    config: Config, cluster: Cluster
) -> None:
    written = yaml.safe_load(cluster.config())
    gateway = next(pod for pod in cluster.pods() if pod.component == "gateway")
    secrets = {
        mount["mountPath"]: volume["secret"]["secretName"]
        for mount in gateway.main["volumeMounts"]
        for volume in gateway.spec["volumes"]
        if volume["name"] == mount["name"] and "secret" in volume
    }
    assert secrets[str(Path(written["engine_key"]).parent)] == "assay-engine-key"
    assert secrets[str(Path(written["keys"]).parent)] == "assay-api-keys"
    mounted = {mount["mountPath"] for mount in gateway.main["volumeMounts"]}
    assert {str(config.home), str(config.checkpoints), str(config.certificates)} <= mounted
    assert (config.host, config.port) == ("0.0.0.0", gateway.main["ports"][0]["containerPort"])
    (model,) = written["models"]
    for name, tier in model["tiers"].items():
        assert tier["launch"] == "url"
        (url,) = tier["urls"]
        service = cluster.get("Service", url.removeprefix("http://").removesuffix(":8100"))
        labels = cluster.engines()[name.lower()][0].labels
        assert selects({"matchLabels": service["spec"]["selector"]}, labels)


def test_several_gateways_count_limits_together(cluster: Cluster, overlay: str) -> None:
    several = bool(cluster.all("HorizontalPodAutoscaler"))
    assert several == (overlay != "demo-cpu")
    limits = yaml.safe_load(cluster.config()).get("limits")
    if several:
        service = cluster.get("Service", "assay-limits")
        assert limits == f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}/0"
    else:
        assert limits is None


def test_every_container_is_started_with_what_the_command_takes(cluster: Cluster) -> None:
    command = typer.main.get_command(app)
    assert hasattr(command, "commands")
    for pod in cluster.pods():
        if pod.component == "limits" or not is_leader(pod):
            continue
        words = pod.arguments()
        if pod.main.get("command"):
            words = re.search(r"exec assay (.*)", words[0])[1].split()  # type: ignore[index]
        name, *rest = words
        context = command.commands[name].make_context(name, rest)
        assert str(context.params["config"]) == "/etc/assay/assay.yaml"
        if pod.component == "engine":
            assert context.params["tier"].lower() == pod.labels["assay/tier"]
            assert (context.params["host"], context.params["port"]) == ("0.0.0.0", 8100)
            assert context.params["build"] is False, "its checkpoints are mounted to be read"


@pytest.mark.parametrize("overlay", [size for size in OVERLAYS if size != "demo-cpu"], indirect=False)
def test_every_engine_fits_on_the_cards_of_its_pod(overlay: str, tmp_path: Path) -> None:
    cluster = Cluster.of(overlay)
    for tier in tiers_of(cluster, tmp_path):
        pods = cluster.engines()[tier.kind.lower()]
        (label,) = {pod.spec["nodeSelector"]["nvidia.com/gpu.product"] for pod in pods}
        card, count = find_card(CARDS[label]), gpus_of(pods[0])
        assert len(pods) * count == len(tier.resources.gpus) == len(pods) * gpus_of(pods[-1])
        if len(pods) == 1:
            assert together((tier,), Machine.of(card, count)).problems == ()


def test_the_leader_of_two_pods_starts_an_engine_over_the_cards_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "a-secret")
    cluster = Cluster.of("405b")
    leader, worker = cluster.engines()["reference"]
    (written,) = (tier for tier in tiers_of(cluster, tmp_path) if tier.kind is TierKind.REFERENCE)
    tier = OneEngine(load_config(tmp_path / "assay.yaml"), written, "127.0.0.1", 8100).tier
    nodes = tuple(
        Machine.of(find_card(CARDS[pod.spec["nodeSelector"]["nvidia.com/gpu.product"]]), gpus_of(pod))
        for pod in (leader, worker)
    )
    assert spills_over(tier, nodes[0])
    over = OverNodes("10.0.0.7:6379", "10.0.0.7", gpus=gpus_of(leader))
    plan = Gathering(nodes, over).plan(tier)
    assert (plan.gpus, plan.tensor_parallel, plan.pipeline_parallel) == (16, 8, 2)
    command = LocalLaunch("cuda", host="0.0.0.0", port=8100, over=over).command(plan.tier)
    assert "--distributed-executor-backend=ray" in command.arguments
    # What the pod would say of its own address would be laid over by this; the worker's process is Ray's.
    assert command.environment["VLLM_HOST_IP"] == over.node
    names = [each["name"] for pod in (leader, worker) for each in pod.main["env"]]
    assert names.count("VLLM_HOST_IP") == 1
    assert "VLLM_HOST_IP" in worker.environment()
    with pytest.raises(PlacementError, match="add nodes"):
        Gathering(nodes[:1], over).plan(tier)


def tiers_of(cluster: Cluster, folder: Path) -> tuple[Tier, ...]:
    path = folder / "assay.yaml"
    path.write_text(cluster.config())
    return load_config(path).tiers


def test_an_engine_on_a_cpu_has_the_memory_it_is_planned_to_take(tmp_path: Path) -> None:
    cluster = Cluster.of("demo-cpu")
    for tier in tiers_of(cluster, tmp_path):
        (pod,) = cluster.engines()[tier.kind.lower()]
        limit = size_of(pod.main["resources"]["limits"]["memory"])
        plan = together((tier,), Machine("cpu", ram=int(limit)))
        assert plan.problems == ()
        assert gpus_of(pod) == 0


def test_volumes_hold_every_checkpoint_and_the_build_its_reference(config: Config, cluster: Cluster) -> None:
    tiers = {tier.name: tier for each in config.tiers for tier in (each.reference, each)}.values()
    volume = size_of(
        at(cluster.get("PersistentVolumeClaim", "assay-checkpoints"), "spec.resources.requests.storage")
    )
    assert sum(weights_bytes(tier) for tier in tiers) * 1.5 < volume
    build = next(pod for pod in cluster.pods() if pod.component == "build")
    assert weights_bytes(config.tiers[0].reference) * 1.2 < size_of(build.main["resources"]["requests"]["memory"])


# How long things may take


def test_a_pod_that_goes_has_time_for_what_it_answers(config: Config, cluster: Cluster) -> None:
    answering = [pod for pod in cluster.pods() if pod.component in ("gateway", "engine") and is_leader(pod)]
    assert len(answering) == 1 + len(config.tiers)
    for pod in answering:
        needed = pre_stop_s(pod) + config.drain_grace_s + config.drain_timeout_s + TEARDOWN_S
        assert pod.spec["terminationGracePeriodSeconds"] >= needed, pod.owner


def test_a_worker_stays_as_long_as_its_leader_may() -> None:
    leader, worker = Cluster.of("405b").engines()["reference"]
    assert worker.spec["terminationGracePeriodSeconds"] == leader.spec["terminationGracePeriodSeconds"]
    (_, _, waits) = worker.main["lifecycle"]["preStop"]["exec"]["command"]
    assert "$LWS_LEADER_ADDRESS" in waits


def test_an_engine_may_load_for_as_long_as_it_takes(config: Config, cluster: Cluster) -> None:
    for tier in config.tiers:
        pod = cluster.engines()[tier.kind.lower()][0]
        digests = weights_bytes(tier) / SLOWEST_VOLUME
        # A second pod is waited for, and it is read for its digests; what start_timeout_s bounds comes after.
        joins = config.ray.room_timeout_s if len(cluster.engines()[tier.kind.lower()]) > 1 else 0
        takes = joins + digests + config.start_timeout_s + VERIFYING_S
        assert window_s(pod.main["startupProbe"]) > takes, pod.owner
        assert config.start_timeout_s > digests + COMPILING_S, pod.owner


def test_no_probe_needs_a_key_and_none_kills_what_is_busy(cluster: Cluster) -> None:
    paths = {"gateway": {"/readyz?some=true", "/healthz"}, "engine": {"/health"}}
    for pod in cluster.pods():
        if pod.component not in paths or not is_leader(pod):
            continue
        probes = [pod.main[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
        assert {probe["httpGet"]["path"] for probe in probes} == paths[pod.component]
        assert all(probe["httpGet"]["port"] in {port["name"] for port in pod.main["ports"]} for probe in probes)
        liveness = probes[2]
        assert liveness["httpGet"]["path"] in ("/health", "/healthz"), "a tier that is down is no reason"
        assert window_s(liveness) >= 60
        assert liveness["timeoutSeconds"] >= 10


def test_a_rollout_is_not_called_failed_while_a_probe_has_patience(cluster: Cluster) -> None:
    for each in cluster.all("Deployment"):
        (pod,) = pods_of(each)
        if pod.component == "limits":
            continue
        leaves = pod.spec["terminationGracePeriodSeconds"]
        assert each["spec"]["progressDeadlineSeconds"] > window_s(pod.main["startupProbe"]) + leaves, pod.owner


def test_a_rollout_takes_no_gateway_away_before_another_is_there_and_no_gpu_twice(cluster: Cluster) -> None:
    for each in cluster.all("Deployment"):
        (pod,) = pods_of(each)
        if pod.component == "gateway":
            assert each["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
            # A rollout waits for it, and so does a lost pod's successor, which a tier that is down must not stop.
            assert pod.main["startupProbe"]["httpGet"]["path"] == "/readyz?some=true"
            assert pod.main["readinessProbe"]["httpGet"]["path"] == "/healthz"
        if pod.component == "engine":
            assert each["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_tier_is_served_once_it_is_certified_where_it_is_for_callers(config: Config, overlay: str) -> None:
    assert config.gate == ("warn" if overlay == "demo-cpu" else "enforce")
    assert config.certify == "off", "a gateway has nothing to measure with"


def test_a_verdict_is_asked_for_once(cluster: Cluster) -> None:
    job = cluster.get("Job", "assay-certify")
    assert job["spec"]["backoffLimit"] == 0


# What is scaled by


def test_engines_are_scaled_by_series_that_exist_under_labels_that_they_have(overlay: str, tmp_path: Path) -> None:
    cluster = Cluster.of(overlay)
    tiers = {tier.kind.lower(): tier for tier in tiers_of(cluster, tmp_path)}
    known = {family.name for family in Metrics().registry.collect()}
    scaled = cluster.all("ScaledObject")
    assert len(scaled) == (0 if overlay == "demo-cpu" else len(tiers))
    for each in scaled:
        tier = tiers[each["metadata"]["name"].removeprefix("assay-engine-")]
        asked, waiting = (trigger["metadata"] for trigger in each["spec"]["triggers"])
        assert set(re.findall(r"assay_\w+", asked["query"])) == {
            "assay_requests_running",
            "assay_requests_waiting",
        }
        assert set(re.findall(r"assay_\w+", asked["query"])) <= known
        ours = f'{{namespace="{NAMESPACE}",tier="{tier.name}"}}'
        assert re.findall(r"\{.*?\}", asked["query"]) == [ours, ours]
        most = tier.resources.max_num_seqs
        assert most is not None
        # The first of an engine's served names; tests/engines holds vLLM to it.
        ours = f'{{namespace="{NAMESPACE}",model_name="{tier.names[0]}"}}'
        running = f"(vllm:num_requests_running{ours} < bool {most})"
        assert waiting["query"] == f"sum(vllm:num_requests_waiting{ours} * {running})"
        assert 0 < int(waiting["threshold"]) < int(asked["threshold"]) < most
    for each in cluster.all("HorizontalPodAutoscaler"):
        metrics = [metric["pods"]["metric"]["name"] for metric in each["spec"]["metrics"] if "pods" in metric]
        assert metrics == ["assay_requests_running"]
        assert set(metrics) <= known
