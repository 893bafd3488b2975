"""Checkpoints whose weights lie where the engines run, and not here: a gateway needs to know what they are.

That is their manifest and config.json. Where a finished checkpoint lies in home, on a volume that engines and
gateways share, its own are taken, and they are the truth. Else a running engine gives them. They are kept
beside where the checkpoint would lie, in a folder of another name, so that nothing takes it for one, and so that
a gateway can start again while no engine answers.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from pydantic import ValidationError

from server.checkpoints import Checkpoints
from server.config import Config
from server.engines.engine import Engine
from server.engines.failures import EngineNotStarted
from server.engines.resolution import addresses_of
from server.measuring.measurable import POLL_S
from server.progress import Step, Steps
from tiers.errors import CheckpointError
from tiers.files import write_whole
from tiers.manifest import MANIFEST_NAME, Manifest
from tiers.probe.reading import CheckpointReading
from tiers.tier import Tier

log = logging.getLogger("assay.elsewhere")

SUFFIX = ".elsewhere"
"""Of the folder beside the checkpoint's own."""
CONFIG_NAME = "config.json"


class Elsewhere:
    """What is known here of the checkpoints of tiers that somebody else runs."""

    def __init__(self, config: Config, checkpoints: Checkpoints, steps: Steps, key: str) -> None:
        self._config = config
        self._checkpoints = checkpoints
        self._steps = steps
        self._key = key

    async def describe(self, tiers: Sequence[Tier]) -> dict[str, tuple[Tier, Manifest]]:
        """Of each, by name: the tier with the folder in which its description lies, and its manifest.

        Raises:
            CheckpointError: it is not what the config names, or cannot be kept.
            EngineNotStarted: none is known here, and no engine has said it in time.
        """
        found = await asyncio.gather(*(self._described(tier) for tier in tiers))
        return dict(zip([tier.name for tier in tiers], found, strict=True))

    async def _described(self, tier: Tier) -> tuple[Tier, Manifest]:
        with self._steps.step(f"Checkpoint {tier.name}") as step:
            if (tier.checkpoint / MANIFEST_NAME).exists():
                manifest = Manifest.read(tier.checkpoint)
                text = (tier.checkpoint / CONFIG_NAME).read_bytes().decode()
                _check_config(manifest, text, str(tier.checkpoint))
                self._checkpoints.check_as_configured(tier, manifest)
                return tier, manifest
            kept = replace(tier, checkpoint=tier.checkpoint.with_name(tier.checkpoint.name + SUFFIX))
            if (said := await self._ask(tier, step, wait=not (kept.checkpoint / MANIFEST_NAME).exists())) is None:
                log.warning(
                    "%s: no engine answers yet; its checkpoint is taken to be that of last time", tier.name
                )
            else:
                _keep(said, kept)
            manifest = Manifest.read(kept.checkpoint)
            self._checkpoints.check_as_configured(kept, manifest)
            return kept, manifest

    async def _ask(self, tier: Tier, step: Step, *, wait: bool) -> CheckpointReading | None:
        """What the first engine says that answers; None if none does and this is not to wait for one."""
        urls = self._config.settings_of(tier).urls
        until = time.monotonic() + self._config.start_timeout_s
        while True:
            for url in urls:
                step.detail(f"asking {url}")
                if (said := await self._asked(tier, url)) is not None:
                    return said
            if not wait:
                return None
            if time.monotonic() > until:
                raise EngineNotStarted(
                    f"{tier.name}: no engine has answered at {' or '.join(urls)} within "
                    f"{self._config.start_timeout_s:.0f} s (start_timeout_s), and its checkpoint is not known "
                    f"here: run `assay engine {tier.kind}` there."
                )
            step.detail(f"waiting for an engine at {' or '.join(urls)}")
            await asyncio.sleep(POLL_S)

    async def _asked(self, tier: Tier, url: str) -> CheckpointReading | None:
        try:
            addresses = await addresses_of(url)
        except OSError:
            return None
        for address in sorted(addresses):
            async with _engine(Engine(tier.name, url, self._key, None, address=address)) as engine:
                if await engine.version() is not None:
                    return await engine.checkpoint()
        return None


@asynccontextmanager
async def _engine(engine: Engine) -> AsyncIterator[Engine]:
    try:
        yield engine
    finally:
        await engine.stop()


def _keep(said: CheckpointReading, tier: Tier) -> None:
    """Put it in place of what was known before, whole.

    Raises:
        CheckpointError: it is no manifest of ours, or cannot be written.
    """
    try:
        manifest = Manifest.model_validate_json(said.manifest)
    except ValidationError as error:
        raise CheckpointError(
            f"{tier.name}: the manifest that its engine gives is not understood ({error.error_count()} fields are "
            "wrong): run the same version of Assay here and there."
        ) from error
    _check_config(manifest, said.config, "its engine")
    folder = tier.checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Several gateways may do so at once: each file is there whole at any time, the manifest last.
        for name, text in ((CONFIG_NAME, said.config), (MANIFEST_NAME, said.manifest)):
            write_whole(folder / name, text.encode())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}): set `home`.") from error


def _check_config(manifest: Manifest, config: str, whose: str) -> None:
    """Hold config.json against its digest in the manifest."""
    entry = manifest.files.get(CONFIG_NAME)
    if entry is None or hashlib.sha256(config.encode()).hexdigest() != entry.sha256:
        raise CheckpointError(f"The {CONFIG_NAME} of {whose} is not the one that its manifest speaks of.")
