"""The Compose file is what the specification allows, what it names is there, and little of it is open."""

import json
import os
import re
import runpy
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from server.config import Config
from server.config_file import load_config
from tests.deploy.cluster import Cluster, unique
from tiers.tier import TierKind

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "compose"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {
    name: service for name, service in SERVICES.items() if service["image"].startswith("${ASSAY_IMAGE:-assay}")
}
BUILT = {name: service for name, service in SERVICES.items() if "build" in service}
ENGINES = ("reference", "turbo", "lite")
JOBS = ("checkpoints",)
GUIDE = (ROOT / "deploy" / "README.md").read_text()
HEALTHCHECK = ROOT / "deploy" / "image" / "healthcheck.py"


def without_variables(value: str) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def running(profile: str) -> dict[str, dict[str, Any]]:
    """What starts under a profile."""
    return {name: each for name, each in SERVICES.items() if profile in each.get("profiles", [profile])}


def seconds(duration: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([smh])", duration).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60, "h": 3600}[unit]


def test_it_is_what_the_compose_specification_allows() -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    wrong = COMPOSE | {"services": {"gateway": {"image": "assay", "restarts": "always"}}}
    assert list(validator.iter_errors(wrong)), "it would take anything"


def test_every_image_that_is_not_ours_is_pinned() -> None:
    images = {each["image"] for name, each in SERVICES.items() if name not in OURS}
    assert images
    assert all(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image) for image in images)


def test_each_of_our_images_is_built_once() -> None:
    """`docker compose build` builds all services at once, and the second to name its result finds that taken."""
    images = [each["image"] for each in BUILT.values()]
    assert sorted(images) == sorted({each["image"] for each in OURS.values()})
    # Whoever builds what a profile runs, and no more, has all of it.
    for profile in ("cpu", "gpu"):
        assert {each["image"] for name, each in running(profile).items() if name in OURS} <= {
            each["image"] for name, each in running(profile).items() if name in BUILT
        }


@pytest.mark.parametrize("name", BUILT)
def test_ours_are_targets_of_the_dockerfile_under_their_names(name: str) -> None:
    build, image = OURS[name]["build"], without_variables(OURS[name]["image"])
    assert (FOLDER / build["context"]).resolve() == ROOT
    name, _, backend = build["target"].rpartition("-")
    assert image == f"{'-'.join(['assay', *name.split()])}:{backend}"
    assert f" AS {build['target']}\n" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_can_write_to_its_volumes_only_and_has_no_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"], "where the sockets of an engine's processes are"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert name in OURS or re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"]), "nobody is root"


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_published_is_on_loopback(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", ()))


@pytest.mark.parametrize("name", [name for name in SERVICES if name not in JOBS])
def test_what_runs_is_started_again_and_looked_after(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    # The gateway's is the image's own.
    assert "healthcheck" in service or service["command"][0] == "gateway"


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_starts_before_what_it_needs_is_well(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        expected = "service_completed_successfully" if other in JOBS else "service_healthy"
        assert how == {"condition": expected}
        assert set(SERVICES[other].get("profiles", ())) <= set(SERVICES[name].get("profiles", ()))


def test_engines_on_one_card_start_one_after_the_other_and_the_gateway_after_all() -> None:
    order = [next(iter(SERVICES[name]["depends_on"])) for name in ENGINES]
    assert order == ["checkpoints", *ENGINES[:-1]]
    assert set(SERVICES["gateway"]["depends_on"]) == set(ENGINES)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_has_the_gpu_and_room_for_its_processes_and_only_who_must_reaches_it(name: str) -> None:
    engine = SERVICES[name]
    (device,) = engine["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
    assert engine["shm_size"] == "2gb"
    assert engine["networks"] == ["engines"]
    assert "ports" not in engine
    assert COMPOSE["networks"]["engines"] == {"internal": True}
    others = {other for other, each in SERVICES.items() if "engines" in each["networks"]}
    assert others == {*ENGINES, "gateway", "prometheus"}
    assert engine["command"][:2] == ["engine", name.capitalize()]


def test_the_cpu_profile_asks_for_no_gpu() -> None:
    assert "nvidia" not in json.dumps(running("cpu"))
    assert "demo" in running("cpu")


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_prometheus_finds_the_gateway_by_one_name_in_both_profiles(profile: str) -> None:
    answering = [
        name
        for name, each in running(profile).items()
        if "outside" in each["networks"]
        and (
            name == "gateway"
            or (isinstance(each["networks"], dict) and "gateway" in each["networks"]["outside"].get("aliases", ()))
        )
    ]
    assert len(answering) == 1
    assert {"prometheus", "grafana"} <= set(running(profile))


def test_prometheus_shows_engines_the_key_that_it_was_given() -> None:
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    asked = {each["authorization"]["credentials_file"] for each in scraped if "authorization" in each}
    assert asked == {f"/run/secrets/{secret}" for secret in SERVICES["prometheus"]["secrets"]}
    names = {name for each in scraped for one in each["dns_sd_configs"] for name in one["names"]}
    assert names == {"gateway", *ENGINES}


def config_of(name: str) -> Config:
    """What a service reads."""
    (mounted,) = SERVICES[name]["configs"]
    assert mounted["target"] == "/etc/assay/assay.yaml"
    return load_config(FOLDER / COMPOSE["configs"][mounted["source"]]["file"])


def drains_for(config: Config) -> float:
    """How long a server may take to end, by what it says itself."""
    return config.drain_grace_s + config.drain_timeout_s + 20


@pytest.mark.parametrize("name", [name for name in OURS if name not in JOBS])
def test_requests_may_finish_before_a_container_is_killed(name: str) -> None:
    assert seconds(OURS[name]["stop_grace_period"]) >= drains_for(config_of(name))


def test_the_guides_container_may_finish_its_requests_too() -> None:
    (waits,) = re.findall(r"--stop-timeout (\d+)", GUIDE)
    assert int(waits) >= drains_for(Config())


def test_the_guides_containers_with_engines_have_room_for_what_their_processes_share() -> None:
    """vLLM's message queues on CPUs: ten pieces of 16 MiB one way, and ten of 24 MiB back."""
    started = re.findall(r"^docker run .* assay\S*:\S+ (?:serve|engine)\b.*", GUIDE, flags=re.MULTILINE)
    assert started
    for line in started:
        (size,) = re.findall(r"--shm-size (\d+)g", line)
        assert int(size) << 30 > len(ENGINES) * (240 << 20), "three engines in one container"


def test_the_guides_images_are_those_that_compose_and_kubernetes_run() -> None:
    tagged = set(re.findall(r"^docker build .*--tag (\S+)", GUIDE, flags=re.MULTILINE))
    ours = {without_variables(each["image"]) for each in OURS.values()}
    run = set(re.findall(r"^docker run .* (assay\S*:\S+) ", GUIDE, flags=re.MULTILINE))
    pods = {each["image"] for pod in Cluster(list(unique())).pods() for each in pod.containers}
    assert tagged == ours | {image for image in pods if image.startswith("assay")}
    assert run <= tagged


def test_what_the_file_says_at_its_head_is_in_the_guide_and_makes_a_key_before_it_starts() -> None:
    head = re.findall(r"^#   (\S.*?)(?: +#.*)?$", (FOLDER / "compose.yaml").read_text(), flags=re.MULTILINE)
    assert [line for line in head if line not in GUIDE.splitlines()] == []
    for profile, service in (("cpu", "demo"), ("gpu", "gateway")):
        added = next(at for at, line in enumerate(head) if line.endswith(f"{service} keys add alice"))
        started = next(at for at, line in enumerate(head) if f"--profile {profile} up" in line)
        assert 0 < added < started


def test_the_guides_commands_are_of_services_and_profiles_that_are_there() -> None:
    asked = re.findall(
        r"^(?:.* )?docker compose .*?(?:run --rm --no-deps|restart) (\S+)", GUIDE, flags=re.MULTILINE
    )
    assert {"demo", "gateway", "lite"} <= set(asked) <= set(SERVICES)
    assert set(re.findall(r"--profile (\w+)", GUIDE)) == {"cpu", "gpu"}


def test_nobody_is_promised_a_certificate_where_nobody_measures() -> None:
    """A gateway measures engines of its own only; others are measured by a command, which the guide names."""
    for name in ("gateway", "demo"):
        assert (config_of(name).certify == "off") == (SERVICES[name]["command"][0] == "gateway")
    assert "run --rm --no-deps gateway certify --config /etc/assay/assay.yaml\n" in GUIDE


def test_an_engine_may_load_as_long_as_its_config_gives_it() -> None:
    for name in ENGINES:
        assert seconds(SERVICES[name]["healthcheck"]["start_period"]) >= config_of(name).start_timeout_s


def test_the_gpu_config_is_that_of_one_80_gb_card_with_engines_elsewhere() -> None:
    (here,) = load_config(ROOT / "deploy" / "llama-3.1-8b.yaml").models
    config = config_of("gateway")
    (there,) = config.models
    assert list(there.tiers) == list(TierKind)
    elsewhere = {
        kind: tier.model_copy(update={"launch": "url", "urls": there.tiers[kind].urls})
        for kind, tier in here.tiers.items()
    }
    assert all(tier.gpus == (0,) for tier in here.tiers.values())
    assert there == here.model_copy(update={"tiers": elsewhere})
    assert {kind.value.lower(): tier.urls for kind, tier in there.tiers.items()} == {
        name: (f"http://{name}:8100",) for name in ENGINES
    }
    assert str(config.engine_key) == "/run/secrets/engine_key"


def test_the_cpu_config_is_the_embedded_models() -> None:
    here, there = load_config(ROOT / "deploy" / "embedded.yaml"), config_of("demo")
    assert there.models == here.models
    assert (there.host, there.port) == ("0.0.0.0", 8000)


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_from_here_is_here(name: str) -> None:
    sources = [mount.split(":")[0] for mount in SERVICES[name].get("volumes", ())]
    here = [FOLDER / source for source in sources if source.startswith(".")]
    assert all(folder.exists() for folder in here), here
    assert {source for source in sources if not source.startswith(".")} <= set(COMPOSE["volumes"])
    configs = [each["source"] for each in SERVICES[name].get("configs", ())]
    assert all((FOLDER / COMPOSE["configs"][each]["file"]).exists() for each in configs)


def made_in(folder: Path, hub: str = "") -> str:
    """What `secrets.sh` says that it has written."""
    environment = os.environ | {"HF_TOKEN": hub}
    command = [FOLDER / "secrets.sh", folder]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_secrets_are_made_once_and_nobody_else_gets_into_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    made = made_in(folder)
    names = {Path(each["file"]).name for each in COMPOSE["secrets"].values()}
    assert {Path(line).name for line in made.splitlines()} == names == {file.name for file in folder.iterdir()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    key = (folder / "engine_key").read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    assert key != (folder / "grafana_password").read_text()
    assert made_in(folder) == ""
    assert (folder / "engine_key").read_text() == key


def test_the_hubs_token_can_come_later_and_be_another(tmp_path: Path) -> None:
    folder, token = tmp_path, tmp_path / "hf_token"
    made_in(folder)
    assert token.read_text() == ""
    token.chmod(0o444)  # as it was made once
    assert made_in(folder, "hf_first") == f"{token}\n"
    assert token.read_text() == "hf_first"
    made_in(folder, "hf_second")
    assert made_in(folder) == "", "who does not say it keeps what is there"
    assert token.read_text() == "hf_second"
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, "its owner may edit it, and containers read it"


def test_secrets_are_kept_out_of_the_image_and_of_git() -> None:
    assert "deploy/compose/secrets" in (ROOT / ".dockerignore").read_text().splitlines()
    assert "deploy/compose/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    assert all(each.keys() == {"file"} for each in COMPOSE["secrets"].values())


class _Locked(BaseHTTPRequestHandler):
    """As an engine: well, and to one key only."""

    def do_GET(self) -> None:
        self.send_response(200 if self.headers.get("authorization") == "Bearer secret" else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def locked() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Locked) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/health"
        server.shutdown()


@pytest.fixture
def check() -> Callable[..., int]:
    """The image's health check, without a process of its own."""
    main: Callable[..., int] = runpy.run_path(str(HEALTHCHECK))["main"]
    return main


def test_the_health_check_shows_an_engine_its_key(
    check: Callable[..., int], locked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("secret\n")
    assert check(locked, str(tmp_path / "key")) == 0
    assert check(locked) == 1
    assert "401" in capsys.readouterr().err


def test_the_health_check_of_nobody_fails(check: Callable[..., int]) -> None:
    assert check("http://127.0.0.1:1/healthz") == 1
