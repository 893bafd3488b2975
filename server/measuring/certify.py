"""`assay certify`: from tiers to certificates, each measured on its own running engine.

Knows the order of things: who answers, who is walked along whose answers, what is judged and written down.
"""

import asyncio
import importlib.metadata
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from server.config import Config
from server.measuring.measure import AT_ONCE, compute_in_fp32, make_pack, score, worst_tokens
from server.measuring.running import Running, engines_to_measure
from server.preparation import backend_of
from server.progress import Steps
from tiers.catalog import ModelShape
from tiers.conformance.budget import Budget, judge, overall
from tiers.conformance.certificate import Certificate, Conformance, Hardware, Versions
from tiers.conformance.certificate import Pack as PackNamed
from tiers.conformance.extent import Asked, Extent
from tiers.conformance.findings import Findings, NoiseFloor, Verdict
from tiers.conformance.pack import PACK_NAME, Origin, Pack, PackError
from tiers.conformance.report import Measured
from tiers.conformance.room import check_room
from tiers.conformance.scores import PHASES, Phase, Scores
from tiers.conformance.statistics import noise_floor, phase_findings
from tiers.hardware import device_class
from tiers.ram import free_ram
from tiers.tier import Tier, TierKind

FEWER_AT_ONCE = AT_ONCE // 3
"""For the noise floor: other neighbours in the same steps than the pack was made with."""

ByPhase = dict[Phase, Scores]


Keep = Callable[[Measured], object]


async def certify(
    config: Config, wanted: Sequence[Tier], asked: Asked, steps: Steps, keep: Keep = lambda measured: None
) -> list[Measured]:
    """Measure and judge the wanted tiers; the reference of each model is measured beside them.

    Args:
        config: says where their engines and packs are.
        wanted: the tiers.
        asked: how much is measured.
        steps: shown while it runs.
        keep: given each tier's as soon as there is nothing more to be asked of it: what was measured is not lost
            when another tier cannot be.

    Raises:
        AssayError: a tier cannot be started or measured.
    """
    async with engines_to_measure(config, wanted, steps) as engines:
        measured = []
        for model in dict.fromkeys(tier.model for tier in wanted):
            kinds = [tier.kind for tier in wanted if tier.model == model]
            certifier = _Certifier(config, [each for each in engines if each.tier.model == model], asked, steps)
            measured += await certifier.certify(kinds, keep)
        return measured


class _Certifier:
    """One model's tiers."""

    def __init__(self, config: Config, engines: Sequence[Running], asked: Asked, steps: Steps) -> None:
        self._config = config
        self._engines = {engine.tier.kind: engine for engine in engines}
        self._shape = ModelShape.read(self._reference.tier.checkpoint)
        contexts = [engine.tier.context_length or self._shape.max_position_embeddings for engine in engines]
        self._extent = Extent.of(asked, min(contexts))
        self._steps = steps
        self._pack: Pack | None = None
        self._truth: Pack | None = None
        self._noise: dict[str, ByPhase] = {}
        """By what was other than when the reference answered."""
        self._scores: dict[TierKind, ByPhase] = {}
        self._seconds: dict[TierKind, float] = {}

    async def certify(self, kinds: Sequence[TierKind], keep: Keep) -> list[Measured]:
        """All of them; of those whose verdict is settled no more is asked."""
        concluded: dict[TierKind, Measured] = {}
        for prompts_so_far in self._extent.stages:
            undecided = [kind for kind in kinds if kind not in concluded or _is_open(concluded[kind])]
            if not undecided:
                break
            new = await self._begin(undecided, prompts_so_far)
            # The Reference last: Transformers takes the longest, and more memory than anything else here.
            for kind in sorted(undecided, key=lambda kind: kind is TierKind.REFERENCE):
                await self._measure(kind, new)
                concluded[kind] = await self._conclude(kind)
                if prompts_so_far == self._extent.stages[-1] or not _is_open(concluded[kind]):
                    keep(concluded[kind])
        return [concluded[kind] for kind in kinds]

    @property
    def _reference(self) -> Running:
        return self._engines[TierKind.REFERENCE]

    @property
    def _checkpoint(self) -> Path:
        return self._reference.tier.checkpoint

    async def _begin(self, kinds: Sequence[TierKind], prompts_so_far: int) -> range:
        """What tiers are measured by, the reference's answers and its noise floor; the places of new answers."""
        before = len(self._pack.answers) if self._pack else 0
        self._pack = pack = await self._answered(prompts_so_far, self._pack)
        new = range(before, len(pack.answers))
        if TierKind.REFERENCE in kinds and not (self._truth_folder(pack) / PACK_NAME).exists():
            # Now, and not after an hour of measuring.
            check_room(self._reference.tier.model, self._shape, pack.answers[before:], free_ram())
        await self._measure_noise(pack, new)
        return new

    async def _measure(self, kind: TierKind, new: range) -> None:
        """What one tier needs further."""
        against = self._pack
        assert against is not None
        if kind is TierKind.REFERENCE:
            self._truth = against = await self._computed_in_fp32(against, self._truth)
        began = time.monotonic()
        scores = await self._walk(self._engines[kind], against, new, self._engines[kind].tier.name)
        self._scores[kind] = _joined(self._scores.get(kind), scores)
        self._seconds[kind] = self._seconds.get(kind, 0) + time.monotonic() - began

    async def _answered(self, prompts_so_far: int, earlier: Pack | None) -> Pack:
        """The reference's answers, from before if there are any."""
        asked, passages = self._extent.prompts[:prompts_so_far], self._extent.passages[:prompts_so_far]
        manifest = self._reference.manifest
        name = f"{manifest.model.replace('/', '--')}-{manifest.short_digest}-{self._extent.mark(prompts_so_far)}"
        folder = self._config.packs / name
        with self._steps.step(f"The reference answers {prompts_so_far} prompts") as step:
            if earlier is None:  # else what was measured already is of its answers
                try:
                    pack = Pack.read(folder)
                except PackError as missing:
                    step.detail(str(missing))
                else:
                    # Another engine's would put that engine's differences into the noise floor.
                    if pack.has_hidden and pack.engine == self._reference.verified.fingerprint:
                        return pack
            return await make_pack(
                self._reference.engine,
                self._reference.tier.name,
                self._checkpoint,
                asked,
                passages,
                folder,
                tokens=self._extent.tokens,
                twice=self._extent.twice,
                fingerprint=self._reference.verified.fingerprint,
                say=step.detail,
                earlier=earlier,
            )

    async def _computed_in_fp32(self, pack: Pack, earlier: Pack | None) -> Pack:
        """The same answers as Transformers computes them."""
        folder = self._truth_folder(pack)
        with self._steps.step("Transformers computes them in FP32") as step:
            try:
                return Pack.read(folder)
            except PackError:
                await compute_in_fp32(pack, self._checkpoint, folder, earlier, step.detail)
            return Pack.read(folder)

    def _truth_folder(self, pack: Pack) -> Path:
        # Sampled answers differ each time the reference gives them, and so does the pack's digest.
        return pack.folder.with_name(f"{pack.folder.name}-fp32-{pack.digest[:12]}")

    async def _measure_noise(self, pack: Pack, new: range) -> None:
        """The reference along its own answers, each prompt's under one of the conditions."""
        others = ["other neighbours"] + ["restarted"] * self._reference.may_restart
        # A cache holds whole blocks, of up to 128 tokens: the longest prompts have some. Passages have no prompt.
        answers = [pack.answers[number] for number in new]
        lengths = {answer.prompt_id: len(answer.prompt) for answer in answers if not answer.is_written}
        longest = sorted(lengths, key=lambda each: -lengths[each])
        cached = {*longest[: len(lengths) // (len(others) + 1)]}
        rest = [each for each in dict.fromkeys(answer.prompt_id for answer in answers) if each not in cached]
        prompts_of = {name: {*rest[place :: len(others)]} for place, name in enumerate(others)}
        for condition, mine in {"prefix cache": cached, **prompts_of}.items():
            numbers = [number for number in new if pack.answers[number].prompt_id in mine]
            if condition == "restarted":
                with self._steps.step(f"Restarting {self._reference.tier.name}"):
                    self._engines[TierKind.REFERENCE] = await self._reference.restarted()
            scores = await self._walk(
                self._reference,
                pack,
                numbers,
                f"noise floor, {condition}",
                at_once=FEWER_AT_ONCE if condition == "other neighbours" else AT_ONCE,
                cached=condition == "prefix cache",
            )
            self._noise[condition] = _joined(self._noise.get(condition), scores)

    async def _walk(
        self,
        running: Running,
        pack: Pack,
        numbers: Collection[int],
        name: str,
        *,
        at_once: int = AT_ONCE,
        cached: bool = False,
    ) -> ByPhase:
        pack.check(running.manifest)
        scores = {}
        with self._steps.step(f"Walking {name}") as step:
            for phase in PHASES:
                scores[phase] = await score(
                    running.engine,
                    pack,
                    self._checkpoint,
                    phase,
                    say=step.detail,
                    at_once=at_once,
                    only=numbers,
                    cached=cached,
                )
        return scores

    async def _conclude(self, kind: TierKind) -> Measured:
        running, scores = self._engines[kind], self._scores[kind]
        pack = self._truth if kind is TierKind.REFERENCE else self._pack
        assert pack is not None
        budget = self._config.budget_of(running.tier)
        with self._steps.step(f"Judging {running.tier.name}") as step:
            findings = await asyncio.to_thread(self._found, pack, scores, budget, self._seconds[kind])
            step.detail("the ten worst tokens")
            worst = await worst_tokens(running.engine, running.tier.name, pack, scores)
        findings = findings.model_copy(update={"worst": worst})
        certificate = Certificate.of(running.manifest, self._conformance(running, pack, budget, findings))
        noise = {phase: Scores.joined([each[phase] for each in self._noise.values()]) for phase in PHASES}
        return Measured(
            certificate,
            {phase: pack.of_answers(scores[phase]) for phase in PHASES},
            {phase: pack.of_answers(noise[phase]) for phase in PHASES},
        )

    def _found(self, pack: Pack, scores: Mapping[Phase, Scores], budget: Budget, seconds: float) -> Findings:
        confidence = self._extent.confidence
        asked = pack.prompts_asked
        phases = {
            phase: phase_findings(
                pack.of_answers(scores[phase]),
                pack.of_corpus(scores[phase]),
                [each.kind for each in asked],
                [each.language for each in asked],
                self._floor(pack, phase),
                confidence,
            )
            for phase in PHASES
        }
        judgements = [each for phase in PHASES for each in judge(phases[phase], phase, budget)]
        return Findings(
            exact=True,
            phases=phases,
            judgements=judgements,
            verdict=overall(judgements),
            confidence=confidence,
            seconds=seconds,
        )

    def _floor(self, pack: Pack, phase: Phase) -> NoiseFloor:
        everything = Scores.joined([each[phase] for each in self._noise.values()])
        answers = {name: pack.of_answers(each[phase]) for name, each in self._noise.items()}
        return noise_floor(answers, pack.of_corpus(everything), self._extent.confidence)

    def _conformance(self, running: Running, pack: Pack, budget: Budget, findings: Findings) -> Conformance:
        tier, verified, origin = running.tier, running.verified, Origin.of(running.manifest)
        return Conformance(
            tier=tier.name,
            kind=tier.kind,
            model=tier.model,
            verified=verified,
            hardware=Hardware(
                device=verified.device,
                device_class=running.device_class or device_class(verified.device),
                backend=backend_of(self._config),
            ),
            versions=Versions(
                assay=importlib.metadata.version("assay"),
                vllm=running.version,
                torch=importlib.metadata.version("torch"),
            ),
            pack=PackNamed.of(pack),
            tokenizer=origin.tokenizer,
            chat_template=origin.template,
            budget=dict.fromkeys(PHASES, budget.limits),
            findings=findings,
            issued=datetime.now(UTC),
            method="probe",
        )


def _is_open(measured: Measured) -> bool:
    return measured.certificate.verdict is Verdict.INCONCLUSIVE


def _joined(earlier: ByPhase | None, further: ByPhase) -> ByPhase:
    return {phase: Scores.joined([earlier[phase], each]) if earlier else each for phase, each in further.items()}
