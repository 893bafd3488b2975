"""Asks whether any package that the gateway depends on, as installed, has a known vulnerability.

usage: .venv/bin/python deploy/audit.py [--if-reachable]

Exit code 0: none has. 1: one has, or was not looked at. 2: the advisories cannot be had from here; with
--if-reachable that is said and forgiven.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SERVICES = ("pypi", "osv")
"""Of pip-audit's, those to ask in turn until one answers."""
UNREACHABLE = 2
EXCEPTIONS: dict[str, str] = {}
"""Advisories that do not concern the gateway, by their id, each with the reason."""


def main() -> int:
    """Audit, and say what came of it in a line, or one for each finding."""
    parser = argparse.ArgumentParser(description="Known vulnerabilities in what the gateway depends on.")
    parser.add_argument("--if-reachable", action="store_true", help="pass if the advisories cannot be had")
    forgiven = parser.parse_args().if_reachable
    pins = sorted({f"{name}=={version}" for name, version in installed("assay")})
    for service in SERVICES:
        told, complaint = ask(service, pins)
        code, lines = judge(told, pins, complaint)
        if code != UNREACHABLE:
            break
    if code == UNREACHABLE and forgiven:
        code, lines = 0, [f"{lines[0]} Passed over, as --if-reachable says."]
    print(*lines, sep="\n")
    return code


def installed(project: str) -> Iterator[tuple[str, str]]:
    """What a project depends on, directly or not, with the versions in this environment."""
    waiting, seen = [Requirement(project)], set[tuple[str, frozenset[str]]]()
    while waiting:
        wanted = waiting.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(wanted.name)
        except PackageNotFoundError:
            continue  # for another platform or Python
        if wanted.name != project:
            yield key[0], found.version
        for each in map(Requirement, found.requires or ()):
            extras = wanted.extras or {""}
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(each)


def ask(service: str, pins: list[str]) -> tuple[list[dict[str, Any]], str]:
    """What pip-audit says of each, or nothing and the last thing that it complains of."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pins.txt"
        file.write_text("\n".join(pins))
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            f"--vulnerability-service={service}",
            f"--requirement={file}",
        ]
        command += ["--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(ran.stdout)["dependencies"], ""
    except ValueError:
        return [], ran.stderr.strip().rpartition("\n")[2][:200]


def judge(told: list[dict[str, Any]], pins: list[str], complaint: str = "") -> tuple[int, list[str]]:
    """The exit code for it, and what to print."""
    looked_at = [each for each in told if "vulns" in each]
    if not looked_at:
        why = complaint or next((each["skip_reason"] for each in told), "no answer")
        return UNREACHABLE, [f"audit: no advisories for any of {len(pins)} packages can be had from here ({why})."]
    lines = [
        f"audit: {each['name']} was not looked at: {each['skip_reason']}" for each in told if "vulns" not in each
    ]
    for each in looked_at:
        for found in each["vulns"]:
            if not EXCEPTIONS.keys() & {found["id"], *found["aliases"]}:
                mended = ", ".join(found["fix_versions"]) or "no version yet"
                lines.append(f"audit: {each['name']} {each['version']} has {found['id']}, mended in {mended}")
    if lines:
        return 1, lines
    known = f", {len(EXCEPTIONS)} advisories excepted (deploy/audit.py says why)" if EXCEPTIONS else ""
    return 0, [f"audit: none of {len(looked_at)} packages has a known vulnerability{known}."]


if __name__ == "__main__":
    sys.exit(main())
