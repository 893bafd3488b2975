"""How a tier stands: what its certificate says of the engines that run it now. Knows no requests."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from server.certificates import Certificates, Followed
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.state import State
from tiers.conformance.budget import Budget
from tiers.conformance.certificate import Binding, Certificate, is_void
from tiers.conformance.extent import QUICK
from tiers.conformance.findings import Judgement, Verdict
from tiers.conformance.pack import Origin
from tiers.conformance.scores import Phase
from tiers.errors import AssayError
from tiers.hardware import device_class
from tiers.tier import Tier
from tiers.verification import VerifiedPrecision

Outcome = Literal["pass", "fail", "none"]
"""A verdict that holds now. There is none on a tier that could not be judged, or runs otherwise than measured."""
OUTCOMES: tuple[Outcome, ...] = ("pass", "fail", "none")
_Seen = tuple[tuple[str | None, VerifiedPrecision | None, bool], ...]
"""Of each replica: the version of its engine, what was read back from it, and whether it was refused."""


@dataclass(frozen=True)
class Standing:
    """How one tier stands, and why."""

    verdict: Outcome
    reasons: tuple[str, ...] = ()
    """In sentences; none of a tier that passes."""
    certificate: Certificate | None = None
    """The tier's, even where it says nothing of what runs now."""
    holds: bool = False
    """Whether it is of what runs now, whatever it says of that."""

    @property
    def has_passed(self) -> bool:
        """Whether the tier is within its budget."""
        return self.verdict == "pass"

    @property
    def issued(self) -> datetime | None:
        """When the certificate was."""
        return self.certificate.predicate.issued if self.certificate else None

    @property
    def age_s(self) -> float | None:
        """Seconds since then."""
        return (datetime.now(UTC) - self.issued).total_seconds() if self.issued else None

    @property
    def short_digest(self) -> str | None:
        """The beginning of the certificate's digest."""
        return self.certificate.short_digest if self.certificate else None

    def kl(self, phase: Phase) -> float | None:
        """The mean KL divergence that the certificate states, in nats per token."""
        found = self.certificate.predicate.findings.phases.get(phase) if self.certificate else None
        return found.overall.kl.value if found else None


class Standings:
    """Of every tier. Made anew when a tier's certificate changes, or what was read back from its engines."""

    def __init__(self, certificates: Certificates, budget_of: Callable[[Tier], Budget]) -> None:
        self._certificates = certificates
        self._budget_of = budget_of
        self._watched: dict[Pool, _Watched] = {}

    def of(self, pool: Pool) -> Standing:
        """How the tier stands now. Asked at every request: where nothing has changed it compares, no more."""
        watched = self._watched.get(pool)
        if watched is None:
            file, budget = self._certificates.follow(pool.tier), self._budget_of(pool.tier)
            watched = self._watched[pool] = _Watched(pool, file, budget)
        return watched.standing


class _Watched:
    """One tier, and how it stood when it was last asked."""

    def __init__(self, pool: Pool, file: Followed, budget: Budget) -> None:
        self._pool = pool
        self._file = file
        self._budget = budget
        self._seen: _Seen = ()
        self._standing = _standing(None, pool, budget)

    @property
    def standing(self) -> Standing:
        certificate, seen = self._file.certificate, _seen(self._pool)
        if certificate is not self._standing.certificate or seen != self._seen:
            self._seen = seen
            self._standing = _standing(certificate, self._pool, self._budget)
        return self._standing


def _seen(pool: Pool) -> _Seen:
    return tuple([(each.engine_version, each.verified, each.state is State.REFUSED) for each in pool.replicas])


def _standing(certificate: Certificate | None, pool: Pool, budget: Budget) -> Standing:
    if certificate is None:
        return Standing("none", ("There is no certificate.",))
    if reasons := _why_void(certificate, pool, budget):
        return Standing("none", reasons, certificate)
    findings, prompts = certificate.predicate.findings, certificate.predicate.pack.prompts
    if findings.verdict is Verdict.PASS and prompts < QUICK:
        few = f"It passed by {prompts} prompts, and fewer than {QUICK} do not have every kind and language."
        return Standing("none", (few,), certificate)
    if findings.verdict is Verdict.PASS:
        return Standing("pass", (), certificate, holds=True)
    decisive = tuple(_said(each) for each in findings.judgements if each.verdict is findings.verdict)
    if findings.verdict is Verdict.FAIL:
        return Standing("fail", decisive or ("The tier is over its budget.",), certificate, holds=True)
    undecided = "The measurement is inconclusive."
    return Standing("none", (undecided, *decisive), certificate, holds=True)


def _why_void(certificate: Certificate, pool: Pool, budget: Budget) -> tuple[str, ...]:
    """Why it says nothing of one engine or another; every one that answers has to be as the one measured was."""
    # An engine that was refused has ended. It counts where all were, for what it says is why.
    engines = [each for each in pool.replicas if each.verified and each.state is not State.REFUSED]
    engines = engines or [each for each in pool.replicas if each.verified]
    if not engines:
        return ("Nothing was read back from an engine yet.",)
    try:
        sentences = [each for engine in engines for each in is_void(certificate, _binding(engine, budget))]
    except AssayError as error:
        return (str(error),)
    return tuple(dict.fromkeys(sentences))


def _binding(engine: Replica, budget: Budget) -> Binding:
    assert engine.verified is not None
    return Binding(
        checkpoint=engine.manifest.digest,
        vllm=engine.engine_version or "of an unknown version",
        verified=engine.verified,
        device_class=engine.device_class or device_class(engine.verified.device),
        chat_template=Origin.of(engine.manifest).template,
        budget=budget.limits,
    )


def _said(judgement: Judgement) -> str:
    estimate = judgement.estimate
    return (
        f"{judgement.metric} in {judgement.phase} is {estimate.value:.3g} ({estimate.low:.3g} to "
        f"{estimate.high:.3g}), and the budget {judgement.budget:g}."
    )
