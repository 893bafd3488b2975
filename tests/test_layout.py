"""The house: what lies where, and that CONTRIBUTING.md tells the truth about it."""

import ast
import gc
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "tiers", "kernels")
TOP_LEVEL = {
    *("pyproject.toml", "Dockerfile", "server", "tiers", "kernels", "deploy", "tests", "README.md"),
    *("Makefile", "LICENSE", "CONTRIBUTING.md"),
}

NOT_CALLED_BACK = {
    *("ABC", "BaseModel", "Enum", "Exception", "Generic", "NamedTuple", "Protocol", "StrEnum", "msgspec.Struct"),
}
"""Others' classes that call nothing of what ours add to them: only we can say what that is for."""


@cache
def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_the_top_level_holds_nothing_else() -> None:
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found <= TOP_LEVEL


def test_the_table_in_contributing_names_every_module_and_no_other() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"^\| `((?:server|tiers|kernels)/[\w/]+\.py)`", text, flags=re.MULTILINE))
    assert named == {str(path.relative_to(ROOT)) for path in modules() if path.name != "__init__.py"}


@cache
def parsed(path: Path) -> ast.Module:
    gc.disable()  # before 3.11.8 what a collection finalizes meanwhile may end the parser
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def public_methods(of: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in of.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node


@cache
def classes() -> dict[str, ast.ClassDef]:
    """Ours, by name."""
    return {
        node.name: node for path in modules() for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)
    }


@cache
def protocols() -> tuple[ast.ClassDef, ...]:
    """Those of ours."""
    return tuple(each for each in classes().values() if "Protocol" in map(ast.unparse, each.bases))


def names_in(of: ast.ClassDef) -> set[str]:
    return {each.name for each in public_methods(of)}


def described_above(of: ast.ClassDef, method: str) -> bool:
    """Whether a protocol that it keeps says what the method is for, or a class that it is made of.

    Others' classes say so elsewhere.
    """
    if of not in protocols() and any(method in names_in(one) <= names_in(of) for one in protocols()):
        return True
    for base in of.bases:
        name = ast.unparse(base).partition("[")[0]
        above = classes().get(name)
        if above is None and name not in NOT_CALLED_BACK:
            return True
        if above and (method in names_in(above) or described_above(above, method)):
            return True  # a method above is looked at there
    return False


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_is_described(path: Path) -> None:
    tree = parsed(path)
    assert ast.get_docstring(tree), "the module does not say what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            for each in public_methods(node):
                is_said = ast.get_docstring(each) or described_above(node, each.name)
                assert is_said, f"{node.name}.{each.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_no_module_outgrows_its_noun() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: lines for name, lines in long.items() if lines > 330} == {}
