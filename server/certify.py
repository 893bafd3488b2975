"""`assay certify`: from tiers to certificates, each measured on its own running engine.

Knows the order of things: who answers, who is walked along whose answers, what is judged and written down.
"""

import asyncio
import importlib.metadata
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from server.certificates import Certificates
from server.config import Config, TierConfig
from server.fleet import Fleet
from server.measure import AT_ONCE, make_pack, score, worst_tokens
from server.pool import Pool
from server.progress import Step, Steps
from server.serve import backend_of, running_engines
from tiers.conformance.budget import Budget, judge, overall
from tiers.conformance.certificate import Certificate, Conformance, Hardware, Versions
from tiers.conformance.certificate import Pack as PackNamed
from tiers.conformance.findings import Findings, Metrics
from tiers.conformance.pack import Origin, Pack, PackError
from tiers.conformance.prompts import Prompt, digest, load_prompts
from tiers.conformance.report import Measured, render_report
from tiers.conformance.scores import PHASES, Phase, Scores
from tiers.conformance.signature import read_private_key
from tiers.conformance.signature import sign as sign_certificate
from tiers.conformance.statistics import measure, phase_findings
from tiers.errors import BuildError
from tiers.hardware import device_class
from tiers.tier import Tier, TierKind

OTHERS_AT_ONCE = 2 * AT_ONCE
"""For the noise floor: other neighbours in the same steps than the pack was made with."""


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    prompts: tuple[Prompt, ...]
    tokens: int
    """Of each answer, at most."""

    @classmethod
    def of(cls, *, quick: bool) -> "Extent":
        """The few prompts that stand for all, in minutes; or all of them."""
        return cls(load_prompts(quick=quick), 48 if quick else 128)

    @property
    def name(self) -> str:
        """For a folder: equal ones are of the same prompts and length."""
        return f"{digest(self.prompts)[:12]}-{len(self.prompts)}x{self.tokens}"


async def certify(config: Config, wanted: Sequence[Tier], extent: Extent, steps: Steps) -> list[Measured]:
    """Measure and judge the wanted tiers; the reference of each model runs beside them.

    Raises:
        AssayError: a tier cannot be started or measured.
    """
    async with running_engines(only(config, wanted), steps) as fleet:
        measured = []
        for model in dict.fromkeys(tier.model for tier in wanted):
            kinds = [tier.kind for tier in wanted if tier.model == model]
            certifier = _Certifier(config, fleet, model, extent, steps)
            measured += await certifier.certify(kinds)
        return measured


def write(measured: Sequence[Measured], tiers: Sequence[Tier], config: Config, sign: Path | None = None) -> Path:
    """Put each certificate where the gateway finds it, and a report of all of them beside; returns the report.

    Args:
        measured: in the order of ``tiers``.
        tiers: whose they are.
        config: says where.
        sign: a private key, to put a signed envelope beside each certificate.

    Raises:
        CertificateError: the key is none.
    """
    kept = Certificates(config.certificates)
    key = read_private_key(sign) if sign else None
    names = {tier.name: tier for tier in tiers}
    for each in measured:
        file = kept.save(names[each.certificate.predicate.tier], each.certificate)
        if key is not None:
            sign_certificate(each.certificate, key).write(file.with_suffix(".dsse.json"))
    report = config.certificates / "report.html"
    report.write_text(render_report(measured), encoding="utf-8")
    return report


def only(config: Config, wanted: Sequence[Tier]) -> Config:
    """With the wanted tiers and their references, and one engine each."""
    models = []
    for model in config.models:
        kinds = {tier.kind for tier in wanted if tier.model == model.name}
        if kinds:
            tiers = {
                kind: model.tiers.get(kind, TierConfig()).model_copy(update={"replicas": 1})
                for kind in TierKind
                if kind in kinds or kind is TierKind.REFERENCE
            }
            models.append(model.model_copy(update={"tiers": tiers}))
    return config.model_copy(update={"models": tuple(models)})


class _Certifier:
    """One model's tiers."""

    def __init__(self, config: Config, fleet: Fleet, model: str, extent: Extent, steps: Steps) -> None:
        self._config = config
        self._pools = {pool.tier.kind: pool for pool in fleet.pools if pool.tier.model == model}
        self._reference = self._pools[TierKind.REFERENCE]
        self._extent = extent
        self._steps = steps
        self._backend = backend_of(config)

    async def certify(self, kinds: Sequence[TierKind]) -> list[Measured]:
        """Everything that these tiers need, in its order."""
        pack = await self._pack()
        noise = await self._walk(self._reference, pack, "noise floor", OTHERS_AT_ONCE)
        measured = []
        for kind in kinds:
            pool = self._pools[kind]
            against = pack if kind is not TierKind.REFERENCE else await self._truth(pack)
            began = time.monotonic()
            scores = await self._walk(pool, against, pool.tier.name, AT_ONCE)
            seconds = time.monotonic() - began
            measured.append(await self._conclude(pool, against, scores, noise, seconds))
        return measured

    @property
    def _checkpoint(self) -> Path:
        return self._reference.tier.checkpoint

    async def _pack(self) -> Pack:
        """The reference's answers, from before if there are any."""
        manifest = self._reference.manifest
        folder = (
            self._config.packs / f"{manifest.model.replace('/', '--')}-{manifest.short_digest}-{self._extent.name}"
        )
        with self._steps.step("The reference answers") as step:
            try:
                return Pack.read(folder)
            except PackError as missing:
                step.detail(str(missing))
            verified = self._reference.verified
            return await make_pack(
                self._reference.replicas[0].engine,
                self._reference.tier.name,
                manifest,
                self._extent.prompts,
                folder,
                tokens=self._extent.tokens,
                fingerprint=verified.fingerprint if verified else "",
                say=step.detail,
            )

    async def _truth(self, pack: Pack) -> Pack:
        """The same answers as Transformers computes them in FP32."""
        folder = pack.folder.with_name(f"{pack.folder.name}-transformers")
        with self._steps.step("Transformers computes them in FP32") as step:
            try:
                return Pack.read(folder)
            except PackError:
                await _run_truth(pack.folder, self._checkpoint, folder, step)
            return Pack.read(folder)

    async def _walk(self, pool: Pool, pack: Pack, name: str, at_once: int) -> dict[Phase, Scores]:
        pack.check(pool.manifest)
        engine, scores = pool.replicas[0].engine, {}
        with self._steps.step(f"Walking {name}") as step:
            for phase in PHASES:
                scores[phase] = await score(
                    engine, pack, self._checkpoint, phase, say=step.detail, at_once=at_once
                )
        return scores

    async def _conclude(
        self,
        pool: Pool,
        pack: Pack,
        scores: Mapping[Phase, Scores],
        noise: Mapping[Phase, Scores],
        seconds: float,
    ) -> Measured:
        tier, verified = pool.tier, pool.verified
        assert verified is not None, "an engine that was not verified was not started"
        budget = self._config.budget_of(tier)
        asked = pack.prompts_asked
        kinds, languages = [each.kind for each in asked], [each.language for each in asked]
        counted = {phase: pack.by_prompt(scores[phase]) for phase in PHASES}
        noise = {phase: pack.by_prompt(noise[phase]) for phase in PHASES}
        with self._steps.step(f"Judging {tier.name}") as step:
            floor: dict[Phase, Metrics] = {}
            if tier.kind is not TierKind.REFERENCE:
                floor = {phase: await asyncio.to_thread(measure, noise[phase]) for phase in PHASES}
            phases = {
                phase: await asyncio.to_thread(phase_findings, counted[phase], kinds, languages, floor.get(phase))
                for phase in PHASES
            }
            judgements = [each for phase in PHASES for each in judge(phases[phase].overall, phase, budget)]
            step.detail("the ten worst tokens")
            worst = await worst_tokens(pool.replicas[0].engine, tier.name, pack, scores)
        findings = Findings(
            exact=True,
            phases=phases,
            judgements=judgements,
            verdict=overall(judgements),
            worst=worst,
            seconds=seconds,
        )
        certificate = Certificate.of(pool.manifest, self._conformance(pool, pack, budget, findings))
        return Measured(certificate, counted, noise if floor else {})

    def _conformance(self, pool: Pool, pack: Pack, budget: Budget, findings: Findings) -> Conformance:
        tier, manifest, verified = pool.tier, pool.manifest, pool.verified
        assert verified is not None
        origin = Origin.of(manifest)
        limits = budget.model_dump(exclude_none=True)
        return Conformance(
            tier=tier.name,
            kind=tier.kind,
            model=tier.model,
            verified=verified,
            hardware=Hardware(
                device=verified.device,
                device_class=device_class(verified.device),
                backend=self._backend,
            ),
            versions=Versions(
                assay=importlib.metadata.version("assay"),
                vllm=pool.engine_version or "",
                torch=importlib.metadata.version("torch"),
            ),
            pack=PackNamed(digest=pack.digest, prompt_set=pack.prompts, prompts=len(self._extent.prompts)),
            tokenizer=origin.tokenizer,
            chat_template=origin.template,
            budget=dict.fromkeys(PHASES, limits),
            findings=findings,
            issued=datetime.now(UTC),
            method="probe",
        )


async def _run_truth(pack: Path, checkpoint: Path, folder: Path, step: Step) -> None:
    """In a process of its own, for it needs PyTorch and as much memory as the weights in FP32."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tiers.conformance.truth",
        str(pack),
        str(checkpoint),
        str(folder),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        errors = asyncio.create_task(process.stderr.read())
        async for line in process.stdout:
            step.detail(line.decode(errors="replace").strip())
        if await process.wait():
            last = (await errors).decode(errors="replace").strip().splitlines() or ["it wrote nothing"]
            raise BuildError(f"Transformers could not compute the reference's answers: {last[-1][:300]}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
