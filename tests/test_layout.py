"""The house: what lies where, and that CONTRIBUTING.md tells the truth about it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "tiers", "kernels")
TOP_LEVEL = {
    *("pyproject.toml", "Dockerfile", "server", "tiers", "kernels", "deploy", "tests", "README.md"),
    *("Makefile", "LICENSE", "CONTRIBUTING.md"),
}


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_the_top_level_holds_nothing_else() -> None:
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found <= TOP_LEVEL


def test_the_table_in_contributing_names_every_module_and_no_other() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"^\| `((?:server|tiers|kernels)/[\w/]+\.py)`", text, flags=re.MULTILINE))
    assert named == {str(path.relative_to(ROOT)) for path in modules() if path.name != "__init__.py"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_is_described(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module does not say what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_no_module_outgrows_its_noun() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: lines for name, lines in long.items() if lines > 330} == {}
