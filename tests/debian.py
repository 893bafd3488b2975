"""A small Debian made of packages that this machine has: what images are built on where none can be fetched."""

import re
import shutil
import subprocess
from pathlib import Path

PACKAGES = (
    "apt",
    "bash",
    "ca-certificates",
    "coreutils",
    "findutils",
    "grep",
    "libnuma1",
    "python3-venv",
    "sed",
    "tini",
)
"""As in a slim image of Python, and what deploy/image/packages.sh asks for, so that it needs no network."""
MERGED = ("bin", "lib", "lib64", "sbin")
"""Folders that Debian 12 has as links into /usr, while its packages still name them."""
MADE_BY_SCRIPTS = ("etc/passwd", "etc/group", "etc/ssl/certs", "etc/nsswitch.conf")
"""What no package lists, for its installation makes it."""


def lay_down(folder: Path, packages: tuple[str, ...] = PACKAGES) -> None:
    """Copy the packages, and all that they depend on, into an empty folder."""
    names = sorted(_with_dependencies(packages))
    for name in MERGED:
        (folder / "usr" / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "sys", "tmp", "run", "root", "var/lib/dpkg/info"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "tmp").chmod(0o1777)
    listed = {line for line in _output("dpkg", "--listfiles", *names) if line.startswith("/")}
    there = sorted(line for line in listed - {f"/{name}" for name in (*MERGED, ".")} if Path(line).exists())
    archive = subprocess.run(
        ["tar", "--create", "--no-recursion", "--directory=/", "--files-from=-"],
        input="\n".join(line.removeprefix("/") for line in there).encode(),
        capture_output=True,
        check=True,
    ).stdout
    subprocess.run(
        ["tar", "--extract", "--keep-directory-symlink", f"--directory={folder}"], input=archive, check=True
    )
    for name in MADE_BY_SCRIPTS:
        if (source := Path("/", name)).is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)  # links followed
        else:
            shutil.copy(source, folder / name)
    known = Path("/var/lib/dpkg/status").read_text().split("\n\n")
    kept = [
        entry for entry in known if (package := re.match(r"Package: (\S+)", entry)) and package[1] in set(names)
    ]
    (folder / "var/lib/dpkg/status").write_text("\n\n".join(kept) + "\n")
    subprocess.run(["ldconfig", "-r", folder], check=True)


def _with_dependencies(packages: tuple[str, ...]) -> set[str]:
    """The names of packages, of those that every Debian has, and of all that they depend on and that is here."""
    shown = _output("dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status} ${Essential}\\n")
    installed = {name: essential for name, status, essential in map(str.split, shown) if status == "installed"}
    always = [name for name, essential in installed.items() if essential == "yes"]
    options = [
        f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    ]
    needed = _output("apt-cache", "depends", "--recurse", "--installed", *options, *packages, *always)
    return {name for name in needed if name in installed}


def _output(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
