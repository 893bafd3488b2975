"""Makes sure that every tier has its checkpoint, whole and made as configured; builds what is missing."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager

from server.alone import alone
from server.config import Config
from server.launch.process import LocalProcess
from server.progress import Step, Steps
from tiers.catalog import ModelShape
from tiers.digests import DigestCache, sha256_of
from tiers.engine import gpu_environment
from tiers.errors import BuildError, CheckpointError
from tiers.manifest import MANIFEST_NAME, Manifest, OutdatedManifest
from tiers.memory import weights_of
from tiers.plan import shape_of
from tiers.ram import free_ram
from tiers.tier import Tier, TierKind

POLL_S = 1.0


class _Unwritable(CheckpointError):
    """The folder of checkpoints is only to be read."""


class Checkpoints:
    """The checkpoints under one ``home``."""

    def __init__(
        self,
        config: Config,
        steps: Steps,
        *,
        may_build: bool = True,
        trusting: bool = True,
        waits_s: float = 0,
    ) -> None:
        """What is prepared, and how.

        Args:
            config: says where.
            steps: shows what is done.
            may_build: whether what is missing is built.
            trusting: takes a digest for granted as long as its file is untouched.
            waits_s: how long for another assay that prepares checkpoints in the same folder.
        """
        self._waits_s = waits_s
        self._config = config
        self._steps = steps
        self._may_build = may_build
        known = DigestCache(config.checkpoints / ".digests.json")
        self._digest_of = known.sha256 if trusting else sha256_of

    async def prepare(self, tiers: Sequence[Tier], *, rebuild: bool = False) -> dict[str, Manifest]:
        """The verified manifest of each tier, by its name, after building those that are missing or outdated.

        Raises:
            CheckpointError: a finished checkpoint is damaged; it is not replaced unasked. Or one must be built,
                this may not build.
            BuildError: a checkpoint cannot be built.
            SourceError: the weights to build from cannot be had.
        """
        asked = {tier.name for tier in tiers}
        manifests: dict[str, Manifest] = {}
        async with self._alone():
            # A tier that is whole can be served without the reference it was once made from.
            for tier in _references_first(tiers) if self._may_build else tiers:
                reference = manifests.get(tier.reference.name)
                with self._steps.step(f"Checkpoint {tier.name}") as step:
                    manifests[tier.name] = await self._ready(
                        tier, reference, step, rebuild=rebuild and tier.name in asked
                    )
        return manifests

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Have the folder to ourselves; to read from one that cannot be written there is no need."""
        folder, until = self._config.checkpoints, time.monotonic() + self._waits_s
        with ExitStack() as held:
            while True:
                occupied = CheckpointError(f"Another assay is preparing checkpoints in {folder}: wait for it.")
                try:
                    held.enter_context(alone(folder, occupied, _Unwritable))
                except _Unwritable:
                    if self._may_build or not folder.is_dir():
                        raise
                except CheckpointError:
                    if time.monotonic() > until:
                        raise
                    await asyncio.sleep(POLL_S)
                    continue
                break
            yield

    def check_as_configured(self, tier: Tier, manifest: Manifest) -> None:
        """Whether a checkpoint that is not ours to build is the one that the config names.

        Raises:
            CheckpointError: it is another.
        """
        _check_recipe(tier, manifest)
        if not self._is_as_configured(tier, manifest, None):
            raise CheckpointError(
                f"{tier.name} is not served: checkpoint {manifest.short_digest}, which its engines run, was made "
                "from another source, or by another recipe, than this config names: give both the same config."
            )

    async def _ready(self, tier: Tier, reference: Manifest | None, step: Step, *, rebuild: bool) -> Manifest:
        """The tier's manifest, verified; built first if there is none, it is outdated, or ``rebuild`` asks."""
        if not rebuild and _is_finished(tier):
            manifest = self._read(tier)
            if manifest is not None and self._is_as_configured(tier, manifest, reference):
                await self.verify(tier, manifest, lambda name: step.detail(f"verifying {name}"))
                return manifest
            step.detail("the recipe or source has changed: building again")
        if not self._may_build:
            raise CheckpointError(
                f"There is no checkpoint for {tier.name} that fits the config in {tier.checkpoint}: "
                "run `assay build`."
            )
        await self._build(tier, step)
        return Manifest.read(tier.checkpoint)

    async def verify(
        self, tier: Tier, manifest: Manifest, on_file: Callable[[str], None] = lambda name: None
    ) -> None:
        """`Manifest.verify` in a thread that ends when this is cancelled: a stop need not wait for 800 GB.

        Raises:
            CheckpointError: names the tier, and the first file that is missing, extra, or not what it was.
        """
        over = threading.Event()

        def go_on(name: str) -> None:
            if over.is_set():
                raise CheckpointError("the verification was interrupted.")
            on_file(name)

        try:
            await asyncio.to_thread(manifest.verify, tier.checkpoint, go_on, self._digest_of)
        except CheckpointError as error:
            raise CheckpointError(f"{tier.name} is not served: {error}") from None
        finally:
            over.set()

    async def verify_again(self, tier: Tier, manifest: Manifest) -> None:
        """What was verified before may have changed since: a tier is what it says, its engine restarted or not.

        Raises:
            CheckpointError: another checkpoint lies there, or not all of it as it was.
        """
        if Manifest.read(tier.checkpoint).digest != manifest.digest:
            raise CheckpointError(
                f"{tier.name}: the checkpoint in {tier.checkpoint} was rebuilt while the server ran: "
                "restart the server to serve it."
            )
        await self.verify(tier, manifest)

    def _read(self, tier: Tier) -> Manifest | None:
        """The manifest of a finished checkpoint; None if it is too old to say what it must."""
        try:
            manifest = Manifest.read(tier.checkpoint)
        except OutdatedManifest:
            return None
        _check_recipe(tier, manifest)
        return manifest

    def _is_as_configured(self, tier: Tier, manifest: Manifest, reference: Manifest | None) -> bool:
        if manifest.source != tier.source:
            return False
        shape = ModelShape.read(tier.checkpoint)
        if manifest.precision != tier.recipe.precision_for(shape):
            return False
        if tier.kind is TierKind.REFERENCE:
            return True
        same_recipe = manifest.recipe_text == tier.recipe.text_for(shape)
        return same_recipe and (reference is None or manifest.reference == reference.digest)

    async def _build(self, tier: Tier, step: Step) -> None:
        """Run `tiers.build` in the quantization environment and pass on what it says."""
        from_reference = tier.kind is not TierKind.REFERENCE
        python = self._config.quantize_python.absolute()
        if not python.exists():
            raise BuildError(
                f"{tier.name} must be built and there is no quantization environment at {python}: "
                "run `make install`, or set quantize_python in the config."
            )
        _check_disk(tier)
        _check_memory(tier)
        request = {
            "model": tier.model,
            "recipe": tier.recipe.name,
            "source": tier.source.model_dump(),
            "target": str(tier.checkpoint),
            "reference": str(tier.reference.checkpoint) if from_reference else None,
        }
        process = await LocalProcess.start(
            [str(python), "-P", "-m", "tiers.build", json.dumps(request)],
            {"TOKENIZERS_PARALLELISM": "false"} | gpu_environment(tier),
            self._config.logs / f"build-{tier.slug}.log",
            pipe_output=True,
        )
        problem = None
        try:
            async for line in process.output:
                event = json.loads(line)
                step.detail(event["text"])
                if event["event"] == "error":
                    problem = event["text"]
            code = await process.wait()
        finally:
            await process.stop()
            if tier.source.kind != "hub" or from_reference:
                shutil.rmtree(tier.checkpoint.with_name(tier.checkpoint.name + ".partial"), ignore_errors=True)
        if problem:
            raise BuildError(problem)
        if code:
            raise BuildError(
                f"Building {tier.name} failed ({process.last_line()[:200]}); the whole output is in {process.log}."
            )


def _check_recipe(tier: Tier, manifest: Manifest) -> None:
    """A folder has its recipe's name: another recipe in it was put there by hand."""
    if manifest.recipe != tier.recipe.name or manifest.precision.name != tier.kind.precision:
        raise CheckpointError(
            f"{tier.name} is not served: {tier.checkpoint} holds a {manifest.recipe} checkpoint "
            f"({manifest.precision.name}) where {tier.recipe.name} belongs: put the right one back, or run "
            "`assay build --rebuild` for this tier."
        )


def _check_disk(tier: Tier) -> None:
    """Hold what will be written, as far as it is known before, against the room on the disk."""
    shape = shape_of(tier)
    if shape is None or (tier.kind is TierKind.REFERENCE and tier.source.kind == "folder"):
        return  # a folder's weights are linked to, not copied
    begun = tier.checkpoint.with_name(tier.checkpoint.name + ".partial")
    needed = weights_of(shape, tier.recipe).total
    if tier.source.kind == "hub" and tier.kind is TierKind.REFERENCE:  # a download goes on where it stopped
        needed -= sum(file.stat().st_size for file in begun.rglob("*") if file.is_file())
    tier.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(tier.checkpoint.parent).free
    if needed > free:
        raise BuildError(
            f"{tier.name} needs {needed / 1e9:.2f} GB and the disk that holds {tier.checkpoint.parent} has "
            f"{free / 1e9:.2f} GB free: make room, or set `home` in the config to another disk."
        )


def _check_memory(tier: Tier) -> None:
    """Hold the reference, which is in memory whole while it is quantized, against what is free."""
    shape = shape_of(tier)
    if shape is None or tier.kind is TierKind.REFERENCE:
        return
    needed, free = weights_of(shape, tier.reference.recipe).total, free_ram()
    if needed > free:
        raise BuildError(
            f"{tier.name} is quantized from {needed / 1e9:.1f} GB of BF16 weights, all of it in memory, and "
            f"{free / 1e9:.1f} GB are free: build it on a larger machine and copy the checkpoint here."
        )


def _references_first(tiers: Sequence[Tier]) -> list[Tier]:
    """The tiers, each after the reference it is made from, which is added where it is not served itself."""
    ordered: dict[str, Tier] = {}
    for tier in tiers:
        ordered.setdefault(tier.reference.name, tier.reference)
        ordered[tier.name] = tier
    return list(ordered.values())


def _is_finished(tier: Tier) -> bool:
    return (tier.checkpoint / MANIFEST_NAME).exists()
