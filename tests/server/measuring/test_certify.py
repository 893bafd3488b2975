"""The order of a certification: what is measured against what, and until when."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from server.certificates import Certificates
from server.config import Config
from server.measuring import certify as module
from server.measuring.certify import certify
from server.measuring.written import Written
from server.progress import Steps
from tests.tiers.test_recipe import SMOL
from tests.tiers.test_verification import reading
from tiers.catalog import ModelShape
from tiers.conformance import statistics
from tiers.conformance.budget import Budget
from tiers.conformance.extent import Asked, Extent
from tiers.conformance.findings import Verdict
from tiers.conformance.pack import Answer, Origin, Pack, PackError
from tiers.conformance.prompts import Prompt
from tiers.conformance.report import Measured
from tiers.conformance.scores import Scores
from tiers.errors import BuildError, CertificateError, PlacementError
from tiers.tier import Tier, TierKind
from tiers.verification import verify_precision

TOKENS = 4


class FakePack(Pack):
    """Of answers that nobody gave."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt], passages: Sequence[Any]) -> None:
        self.folder, self.digest = folder, f"{len(prompts):064x}"
        self.prompts = self.corpus = "a" * 64
        self.has_hidden, self.engine = True, "another's"
        fields: dict[str, Any] = {"prompt": [1], "answer": [2] * TOKENS}
        asked = [
            Answer(prompt_id=each.id, kind=each.kind, language=each.language, source="greedy", **fields)
            for each in prompts
        ]
        read = [
            Answer(prompt_id=each.id, kind="corpus", language=each.language, source="written", **fields)
            for each in passages
        ]
        self.answers = (*asked, *read)

    def check(self, manifest: Any) -> None:
        """Of any tier."""


class Lab:
    """Engines that are as far from the reference as told, and a note of all that was asked of them."""

    def __init__(self, kl: dict[TierKind, float]) -> None:
        self.kl = kl
        self.packs: list[int] = []
        self.truths: list[Any] = []
        self.walks: list[tuple[TierKind, str, int]] = []
        self.restarts = 0
        self.last: tuple[Answer, ...] = ()
        self.fingerprint = ""
        self.long: set[str] = set()
        self.cached: list[set[str]] = []

    def running(self, tier: Tier, *, may_restart: bool) -> Any:
        verified = verify_precision(
            tier.recipe.precision_for(SMOL), [reading(tier.recipe.precision_for(SMOL))], SMOL
        )
        if tier.kind is TierKind.REFERENCE:
            self.fingerprint = verified.fingerprint

        async def restarted() -> Any:
            self.restarts += 1
            return self.running(tier, may_restart=may_restart)

        return SimpleNamespace(
            tier=tier,
            manifest=SimpleNamespace(model=tier.model, recipe=tier.recipe.name, short_digest="d", digest="d" * 64),
            engine=tier.kind,
            verified=verified,
            version="0.32.0",
            may_restart=may_restart,
            device_class=None,
            restarted=restarted,
        )

    async def make_pack(
        self, engine: Any, model: str, checkpoint: Path, prompts: Any, passages: Any, folder: Path, **rest: Any
    ) -> FakePack:
        self.packs.append(len(prompts))
        pack = FakePack(folder, prompts, passages)
        pack.answers = tuple(
            each.model_copy(update={"prompt": [1] * 200}) if each.prompt_id in self.long else each
            for each in pack.answers
        )
        if rest["earlier"]:
            old, new = rest["earlier"].answers, pack.answers
            pack.answers = (*old, *(each for each in new if each not in old))
        return pack

    async def score(self, engine: TierKind, pack: FakePack, checkpoint: Path, phase: Any, **rest: Any) -> Scores:
        numbers = sorted(rest["only"])
        if rest["cached"]:
            self.cached.append({pack.answers[number].prompt_id for number in numbers})
        self.walks.append((engine, phase, len(numbers)))
        prompt = np.repeat(numbers, TOKENS)
        rng = np.random.default_rng(len(self.walks))
        same = {name: np.zeros(len(prompt)) for name in ("tv", "top_p", "top_q", "token")}
        return Scores.of(
            {
                **same,
                "prompt": prompt,
                "position": np.tile(np.arange(TOKENS), len(numbers)),
                "kl": self.kl[engine] * rng.lognormal(0, 0.5, len(prompt)),
                "ln_p": np.full(len(prompt), -1.0),
                "ln_q": np.full(len(prompt), -1.0),
            }
        )


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts such engines in place of real ones; of a server that runs, which cannot be restarted, or not."""

    def put(kl: dict[TierKind, float], *, serves: bool = False) -> tuple[Lab, Config]:
        made = Lab(kl)
        config = Config(home=tmp_path)

        @asynccontextmanager
        async def engines(config: Config, wanted: Any, steps: Steps) -> AsyncIterator[list[Any]]:
            yield [made.running(tier, may_restart=not serves) for tier in config.tiers]

        async def run_truth(pack: FakePack, checkpoint: Path, folder: Path, earlier: Any, step: Any) -> None:
            made.truths.append((len(pack.answers), len(earlier.answers) if earlier else 0))

        def read(folder: Path) -> FakePack:
            if "fp32" in folder.name and made.truths and len(made.truths) == len(made.packs):
                pack = FakePack(folder, (), ())
                pack.answers = made.last
                return pack
            raise PackError("none")

        async def make_pack(*args: Any, **rest: Any) -> FakePack:
            pack = await made.make_pack(*args, **rest)
            made.last = pack.answers
            return pack

        async def worst(*args: Any) -> list[Any]:
            return []

        monkeypatch.setattr(module, "engines_to_measure", engines)
        monkeypatch.setattr(module, "make_pack", make_pack)
        monkeypatch.setattr(module, "score", made.score)
        monkeypatch.setattr(module, "worst_tokens", worst)
        monkeypatch.setattr(module, "compute_in_fp32", run_truth)
        monkeypatch.setattr(Pack, "read", read)
        monkeypatch.setattr(ModelShape, "read", lambda folder: SMOL)
        monkeypatch.setattr(module, "backend_of", lambda config: "cpu")
        origin = SimpleNamespace(tokenizer="b" * 64, template="c" * 64)
        monkeypatch.setattr(Origin, "of", lambda manifest: origin)
        monkeypatch.setattr(statistics, "measure", partial(statistics.measure, resamples=400))
        return made, config

    return put


async def measured(config: Config, asked: Asked, *kinds: TierKind) -> list[Measured]:
    return await certify(config, [tier for tier in config.tiers if tier.kind in kinds], asked, Steps())


KL = {TierKind.REFERENCE: 0.0005, TierKind.TURBO: 0.03, TierKind.LITE: 0.2}


@pytest.mark.parametrize(
    ("engine", "has_hidden", "is_taken"),
    [("the same", True, True), ("another", True, False), ("the same", False, False)],
)
async def test_a_pack_from_before_is_taken_if_it_is_of_this_engine_and_whole(
    lab: Any, monkeypatch: pytest.MonkeyPatch, engine: str, has_hidden: bool, is_taken: bool
) -> None:
    made, config = lab(KL)
    extent = Extent.of(Asked(quick=True), 8192)

    def read(folder: Path) -> FakePack:
        pack = FakePack(folder, extent.prompts, extent.passages)
        pack.has_hidden = has_hidden
        pack.engine = made.fingerprint if engine == "the same" else engine
        return pack

    monkeypatch.setattr(Pack, "read", read)
    await measured(config, Asked(quick=True), TierKind.TURBO)
    assert made.packs == ([] if is_taken else [24])


async def test_the_prefix_cache_is_tried_with_the_longest_prompts(lab: Any) -> None:
    made, config = lab(KL)
    made.long = {"long_context-en-01", "multi_turn-en-01"}
    await measured(config, Asked(quick=True), TierKind.TURBO)
    cached = [ids for ids in made.cached if ids]
    assert cached, "it was tried"
    for ids in cached:
        assert made.long <= ids
        assert not any(each.startswith("corpus-") for each in ids), "a passage has no prompt to be cached"


async def test_a_tier_is_walked_once_in_each_phase_and_the_noise_floor_costs_one_walk(lab: Any) -> None:
    made, config = lab(KL)
    (found,) = await measured(config, Asked(quick=True), TierKind.TURBO)
    assert made.packs == [24]
    assert made.restarts == 1
    for phase in ("prefill", "decode"):
        reference = [count for kind, each, count in made.walks if (kind, each) == (TierKind.REFERENCE, phase)]
        assert len(reference) == 3, "one of each condition"
        assert sum(reference) == 48, "24 answers and 24 passages, each once"
        assert [count for kind, each, count in made.walks if (kind, each) == (TierKind.TURBO, phase)] == [48]
    assert made.truths == [], "Turbo is held against the Reference, not against Transformers"
    assert found.certificate.verdict is Verdict.PASS
    floor = found.certificate.predicate.findings.phases["decode"].noise_floor
    assert floor is not None
    assert {name: each.prompts for name, each in floor.by_condition.items()} == {
        "other neighbours": 8,
        "prefix cache": 8,
        "restarted": 8,
    }


async def test_an_engine_that_serves_is_not_restarted(lab: Any) -> None:
    made, config = lab(KL, serves=True)
    (found,) = await measured(config, Asked(quick=True), TierKind.LITE)
    assert made.restarts == 0
    floor = found.certificate.predicate.findings.phases["decode"].noise_floor
    assert floor is not None
    assert set(floor.by_condition) == {"other neighbours", "prefix cache"}


async def test_the_reference_is_held_against_transformers(lab: Any) -> None:
    made, config = lab(KL)
    (found,) = await measured(config, Asked(quick=True), TierKind.REFERENCE)
    assert made.truths == [(48, 0)]
    assert found.certificate.predicate.budget["decode"] == {"kl": 0.002}


async def test_it_goes_on_with_what_is_undecided_and_with_nothing_else(lab: Any) -> None:
    made, config = lab(KL | {TierKind.TURBO: 0.0565})
    await measured(config, Asked(quick=True, until_decided=True), TierKind.TURBO, TierKind.LITE)
    lite = sum(count for kind, phase, count in made.walks if (kind, phase) == (TierKind.LITE, "decode"))
    turbo = sum(count for kind, phase, count in made.walks if (kind, phase) == (TierKind.TURBO, "decode"))
    assert lite == 48, "settled at the first look"
    assert turbo > 48
    assert made.packs == sorted({*made.packs})
    assert len(made.packs) > 1


async def test_a_verdict_that_is_never_settled_ends_with_all_prompts(lab: Any) -> None:
    made, config = lab(KL)
    budget = Budget(kl=KL[TierKind.TURBO] * float(np.exp(0.125)))
    models = tuple(
        model.model_copy(
            update={
                "tiers": {kind: tier.model_copy(update={"budget": budget}) for kind, tier in model.tiers.items()}
            }
        )
        for model in config.models
    )
    (found,) = await measured(
        config.model_copy(update={"models": models}), Asked(quick=True, until_decided=True), TierKind.TURBO
    )
    assert made.packs == [24, 48, 96, 211]
    assert found.certificate.verdict is Verdict.INCONCLUSIVE
    assert found.certificate.predicate.findings.confidence == pytest.approx(0.9875)
    assert found.certificate.predicate.pack.prompts == 211


async def test_certificates_and_the_report_are_written_where_the_gateway_looks(lab: Any) -> None:
    _, config = lab(KL)
    kinds = (TierKind.TURBO, TierKind.LITE)
    tiers = [tier for tier in config.tiers if tier.kind in kinds]
    certificates = config.certificates
    certificates.mkdir()
    (certificates / "smollm2-135m-instruct-turbo.dsse.json").write_text("of another certificate")
    written = Written(config, tiers)
    await certify(config, tiers, Asked(quick=True), Steps(), written.add)
    assert sorted(each.name for each in written.report.parent.iterdir()) == [
        "report.html",
        "smollm2-135m-instruct-lite.json",
        "smollm2-135m-instruct-turbo.json",
    ]


async def test_a_report_that_cannot_be_written_is_a_sentence(lab: Any) -> None:
    _, config = lab(KL)
    tiers = [tier for tier in config.tiers if tier.kind is TierKind.LITE]
    written = Written(config, tiers)
    written.report.mkdir(parents=True)
    with pytest.raises(CertificateError, match=r"report\.html cannot be written \(Is a directory\)"):
        await certify(config, tiers, Asked(quick=True), Steps(), written.add)
    assert Certificates(config.certificates).of(tiers[0]) is not None, "what was measured is kept"


async def test_what_was_measured_is_kept_when_another_tier_cannot_be(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = lab(KL)

    async def fails(*args: Any) -> None:
        raise BuildError("Transformers was ended.")

    monkeypatch.setattr(module, "compute_in_fp32", fails)
    written = Written(config, config.tiers)
    with pytest.raises(BuildError, match="was ended"):
        await certify(config, config.tiers, Asked(quick=True), Steps(), written.add)
    kept = Certificates(config.certificates)
    has = {tier.kind: kept.of(tier) is not None for tier in config.tiers}
    assert has == {TierKind.REFERENCE: False, TierKind.TURBO: True, TierKind.LITE: True}
    assert "Lite" in written.report.read_text()


async def test_a_tier_is_kept_once_and_not_while_more_is_asked_of_it(lab: Any) -> None:
    _, config = lab(KL | {TierKind.TURBO: 0.0565})
    kept: list[Measured] = []
    tiers = [tier for tier in config.tiers if tier.kind is not TierKind.REFERENCE]
    found = await certify(config, tiers, Asked(quick=True, until_decided=True), Steps(), kept.append)
    assert kept == found[::-1], "Lite at the first look, Turbo at a later one"
    assert kept[0].certificate.predicate.pack.prompts < kept[1].certificate.predicate.pack.prompts


async def test_too_little_memory_for_transformers_is_a_sentence_before_anything_is_measured(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, config = lab(KL)
    monkeypatch.setattr(module, "free_ram", lambda: 1 << 29)
    with pytest.raises(PlacementError, match=r"SmolLM2.* 193 tokens.*1\.1 GiB of memory, and 0\.5 GiB are free"):
        await measured(config, Asked(quick=True), *TierKind)
    assert made.walks == []
    await measured(config, Asked(quick=True), TierKind.TURBO, TierKind.LITE)
    assert made.walks, "they are not held against Transformers"
