"""`assay certify --url`: from a reference pack and a server that someone else runs to a certificate of bounds.

Knows the order of things: which pack, what is asked, what is judged and where it is written down.
"""

import hashlib
import importlib.metadata
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.config import Config
from server.measuring.measure import AT_ONCE, Say, by_turns
from server.measuring.outside import PublicApi, ServerNotMeasured
from server.progress import Steps
from tiers.conformance.bounds import lower_bounds
from tiers.conformance.budget import Budget, judge, overall
from tiers.conformance.certificate import Certificate, Conformance, Subject, SubjectDigest, Versions
from tiers.conformance.certificate import Pack as PackNamed
from tiers.conformance.extent import Asked, Extent
from tiers.conformance.findings import Findings
from tiers.conformance.pack import PACK_NAME, Pack, PackError
from tiers.conformance.prompts import SHORTEST_CONTEXT, Prompt, digest
from tiers.conformance.report import Measured, render_report
from tiers.conformance.scores import PHASES, Phase, Scores
from tiers.conformance.signature import sign as sign_certificate
from tiers.conformance.statistics import CONFIDENCE, phase_findings
from tiers.errors import CertificateError
from tiers.manifest import SHORT_DIGEST
from tiers.tier import Tier

log = logging.getLogger("assay.outside")

_CONTEXTS = (SHORTEST_CONTEXT, 1 << 20)
"""Prompts are of one length or another, by the context of the model that is measured: one of each."""


@dataclass(frozen=True)
class FromOutside:
    """What was found of a server, and what it told."""

    measured: Measured
    evidence: bytes
    """A parquet file: the scores of every token, with the prompt, phase and position that each is of."""


async def certify_outside(
    config: Config, tier: Tier, api: PublicApi, asked: Asked, folder: Path | None, steps: Steps
) -> FromOutside:
    """Measure a server as one of the tier, and judge it by the tier's budget.

    Args:
        config: has the budgets, and says where packs lie.
        tier: which the server is to be.
        api: the server's, not open yet.
        asked: which pack, where ``folder`` names none: that of so much.
        folder: of the reference pack.
        steps: told how far it is.

    Raises:
        PackError: there is no such pack, or it is of another model.
        ServerNotMeasured: the server lacks something that this takes, or stopped answering.
    """
    with steps.step("Reading the reference pack") as step:
        pack = Pack.read(folder) if folder else _newest(config, tier, asked)
        if pack.origin.model != tier.model:
            raise PackError(
                f"The reference pack in {pack.folder} is of {pack.origin.model}, and not of {tier.model}."
            )
        prompts = _prompts_of(pack)
        if not prompts:
            log.warning("%s is of other prompts than Assay has now: the tokenizer is not checked.", pack.folder)
    async with api:
        with steps.step(f"Looking at what {api.url} tells") as step:
            likeliest = await api.check(pack, prompts)
        with steps.step(f"Asking {api.url}, {likeliest} likeliest tokens of each position") as step:
            began = time.monotonic()
            scores = await score(api, pack, say=step.detail)
            seconds = time.monotonic() - began
    with steps.step("Judging"):
        budget = config.budget_of(tier)
        findings = _found(pack, scores, budget, seconds)
        evidence = _evidence(pack, scores, {"url": api.url, "model": api.model, "likeliest": str(likeliest)})
        certificate = _certificate(tier, api, pack, budget, findings, evidence)
    answers = {phase: pack.of_answers(scores[phase]) for phase in findings.phases}
    return FromOutside(Measured(certificate, answers), evidence)


async def score(api: PublicApi, pack: Pack, *, say: Say) -> dict[Phase, Scores]:
    """Lead a server along a pack's answers and the corpus: lower bounds at each token, in both phases.

    In decode only at tokens that follow ones which the server itself chose. There ln q of the reference's token is
    prefill's where it is not among those that the server tells of.

    Raises:
        ServerNotMeasured: it does not tell, or is gone.
    """
    done = 0

    async def scored(number: int) -> tuple[Scores, Scores]:
        nonlocal done
        answer, likeliest = pack.answers[number], pack.likeliest(number)
        try:
            prefill = lower_bounds(number, answer.answer, likeliest, await api.prefill(answer))
            told = await api.decode(answer, prefill.top_q == prefill.token)
            otherwise = dict(enumerate(prefill.ln_q.tolist()))
            decode = lower_bounds(number, answer.answer, likeliest, told, otherwise)
        except ValueError as error:
            raise ServerNotMeasured(
                f"{api.url} gives log-probabilities that are none, at {answer.prompt_id}: {error}."
            ) from None
        done += 1
        say(f"{done} of {len(pack.answers)} answers and passages")
        return prefill, decode

    both = await by_turns([partial(scored, number) for number in range(len(pack.answers))], AT_ONCE)
    prefill, decode = zip(*both, strict=True)
    return {"prefill": Scores.joined([*prefill]), "decode": Scores.joined([*decode])}


def write(
    found: FromOutside, tier: Tier, api: PublicApi, config: Config, key: Ed25519PrivateKey | None = None
) -> Path:
    """Put the certificate, its evidence and a report beside the tiers' own; returns the report.

    Args:
        found: of the server.
        tier: which it is to be.
        api: the server's.
        config: says where.
        key: to put a signed envelope beside the certificate.

    Raises:
        CertificateError: nothing can be written there.
    """
    name = f"{tier.slug}-outside-{_host(api.url)}-{_digest(api)}"
    folder = config.certificates
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.parquet").write_bytes(found.evidence)
        found.measured.certificate.write(folder / f"{name}.json")
        envelope = folder / f"{name}.dsse.json"
        envelope.unlink(missing_ok=True)  # it says of another certificate that it is signed
        if key is not None:
            sign_certificate(found.measured.certificate, key).write(envelope)
        report = folder / f"{name}.html"
        report.write_text(render_report([found.measured]), encoding="utf-8")
    except OSError as error:
        raise CertificateError(f"{folder / name} cannot be written ({error.strerror}).") from error
    return report


def _digest(api: PublicApi) -> str:
    """Tells the models of one host apart, and its ways."""
    return hashlib.sha256(f"{api.url} {api.model}".encode()).hexdigest()[:8]


def _host(url: str) -> str:
    """With its port, as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", urlsplit(url).netloc.lower()).strip("-.")


def _newest(config: Config, tier: Tier, asked: Asked) -> Pack:
    """The tier's, of that much.

    Raises:
        PackError: there is none.
    """
    contexts = (tier.context_length,) if tier.context_length else _CONTEXTS
    extents = [Extent.of(asked, context) for context in contexts]
    model = tier.model.replace("/", "--")
    marks = {extent.mark(len(extent.prompts)) for extent in extents}
    found = [
        file for mark in marks for file in config.packs.glob(f"{model}-{'?' * SHORT_DIGEST}-{mark}/{PACK_NAME}")
    ]
    if not found:
        much = f"{len(extents[0].prompts)} prompts and answers of up to {extents[0].tokens} tokens"
        options = f"{' --quick' if asked.quick else ''}{f' --prompts {asked.prompts}' if asked.prompts else ''}"
        raise PackError(
            f"There is no reference pack of {tier.model} with {much} in {config.packs}: `assay certify "
            f"Reference{options}` makes one where the reference runs, and --pack names one from elsewhere."
        )
    return Pack.read(max(found, key=lambda file: file.stat().st_mtime).parent)


def _prompts_of(pack: Pack) -> list[Prompt]:
    """What the pack's answers are to; none if those were other prompts than there are now."""
    ids = {answer.prompt_id for answer in pack.prompts_asked}
    for context in _CONTEXTS:
        prompts = [each for each in Extent.of(Asked(), context).prompts if each.id in ids]
        if digest(prompts) == pack.prompts:
            return prompts
    return []


def _found(pack: Pack, scores: Mapping[Phase, Scores], budget: Budget, seconds: float) -> Findings:
    asked = pack.prompts_asked
    kinds, languages = [each.kind for each in asked], [each.language for each in asked]
    phases = {}
    for phase in PHASES:
        answers, corpus = pack.of_answers(scores[phase]), pack.of_corpus(scores[phase])
        if len(answers) and len(corpus):
            phases[phase] = phase_findings(answers, corpus, kinds, languages)
        else:
            log.warning("Nothing is known of %s: the server never chose the token that the reference has.", phase)
    judgements = [
        each
        for phase, found in phases.items()
        for each in judge(found, phase, _limits(budget, phase), exact=False)
    ]
    return Findings(
        exact=False,
        phases=phases,
        judgements=judgements,
        verdict=overall(judgements),
        confidence=CONFIDENCE,
        seconds=seconds,
    )


def _limits(budget: Budget, phase: Phase) -> Budget:
    """None for decode: what is known of it is of tokens after such as the server itself chose: easier ones."""
    return budget if phase == "prefill" else Budget()


def _evidence(pack: Pack, scores: Mapping[Phase, Scores], about: Mapping[str, str]) -> bytes:
    """The scores of every token as a parquet file; ``about`` stands in its metadata."""
    import pyarrow as pa  # here, as in `tiers.conformance.pack`
    import pyarrow.parquet as pq

    tables = []
    for phase in PHASES:
        columns = scores[phase].columns()
        answers = [pack.answers[number] for number in columns.pop("prompt")]
        of = {
            "phase": [phase] * len(answers),
            "prompt_id": [each.prompt_id for each in answers],
            "source": [each.source for each in answers],
        }
        tables.append(pa.table({**{name: pa.array(each, pa.string()) for name, each in of.items()}, **columns}))
    whole = pa.concat_tables(tables).replace_schema_metadata({**about, "pack": pack.digest})
    sink = pa.BufferOutputStream()
    pq.write_table(whole, sink, compression="zstd")
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _certificate(
    tier: Tier, api: PublicApi, pack: Pack, budget: Budget, findings: Findings, evidence: bytes
) -> Certificate:
    subject = Subject(
        name=f"{api.url} {api.model}", digest=SubjectDigest(sha256=hashlib.sha256(evidence).hexdigest())
    )
    predicate = Conformance(
        tier=tier.name,
        kind=tier.kind,
        model=tier.model,
        versions=Versions(assay=importlib.metadata.version("assay")),
        pack=PackNamed.of(pack),
        tokenizer=pack.origin.tokenizer,
        chat_template=pack.origin.template,
        budget={phase: _limits(budget, phase).model_dump(exclude_none=True) for phase in PHASES},
        findings=findings,
        issued=datetime.now(UTC),
        method="public api",
    )
    return Certificate(subject=(subject,), predicate=predicate)
