"""What a pod's shell lines call is in its image."""

import re
import runpy
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest

from tests.deploy.cluster import KUBERNETES, Cluster, Pod, unique

ROOT = KUBERNETES.parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEBIAN = {"sh", "sleep"}
"""Of the base itself."""
KEYWORDS = {"until", "while", "do", "exec"}
"""What a program may stand behind."""


def lines(pod: Pod) -> Iterator[str]:
    """What shells in a pod's containers are given to read."""
    for container in pod.containers:
        hooks = [hook.get("exec", {}) for hook in container.get("lifecycle", {}).values()]
        for each in (container, *hooks):
            words = [str(word) for word in (*each.get("command", ()), *each.get("args", ()))]
            if "sh" in words:
                yield words[-1]


def called(text: str) -> Iterator[str]:
    """The first word of each of a shell's commands."""
    plain = re.sub(r"\\\n|^\s*#.*$", " ", text, flags=re.MULTILINE)
    for command in re.split(r"[;\n]|&&|\|\|?", plain):
        words = command.split()
        while words and words[0] in KEYWORDS:
            words.pop(0)
        if words and words[0] != "done":
            yield words[0]


def programs_of_the_image() -> set[str]:
    """What its base, its Debian packages and its Python environment bring."""
    install = runpy.run_path(str(ROOT / "deploy/install.py"), run_name="install")
    image = install["environments"]("cuda", dev=False)[0].of_image()
    assert set(image.of_images) <= set(image.modules), "a build without it would not fail"
    extras = [wanted for extra in image.extras for wanted in PROJECT["optional-dependencies"][extra]]
    names = {re.match(r"[\w-]+", wanted)[0] for wanted in [*extras, *PROJECT["dependencies"]]}  # type: ignore[index]
    scripts = {
        each.name for each in entry_points(group="console_scripts") if each.dist and each.dist.name in names
    }
    packages = re.search(r'^packages="(.*)"', (ROOT / "deploy/image/packages.sh").read_text(), re.MULTILINE)
    return DEBIAN | scripts | set(PROJECT["scripts"]) | set(packages[1].split())  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a --b \\\n  c\nexec d", ["a", "d"]),
        ("# w; x\nuntil a b; do c 5; done\nd && e | f", ["a", "c", "d", "e", "f"]),
    ],
)
def test_a_shell_line_is_read_by_what_it_calls(text: str, expected: list[str]) -> None:
    assert list(called(text)) == expected


def test_whatever_a_pods_shell_calls_is_in_the_image() -> None:
    pods = Cluster(list(unique())).pods()
    found = {name for pod in pods for text in lines(pod) for name in called(text)}
    assert {"ray", "assay", "sleep"} <= found, "or nothing is read"
    assert found <= programs_of_the_image()
    commands = {pod.main["command"][0] for pod in pods if "command" in pod.main}
    assert commands <= programs_of_the_image()
