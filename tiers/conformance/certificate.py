"""A certificate: what was found of one tier, bound to all that the finding holds for.

An in-toto Statement v1, whose subject is the checkpoint and whose predicate says how far the running tier was from
the reference, on which engine and hardware, and by which prompts. Of a server that someone else runs, measured by
its public API, the subject is the evidence: what it told. Knows findings; knows nothing of signatures.
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
"""

import hashlib
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tiers.conformance.findings import LOWER_BOUNDS, Findings, Verdict
from tiers.conformance.pack import Pack as ReferencePack
from tiers.conformance.scores import Phase
from tiers.errors import CertificateError
from tiers.files import write_whole
from tiers.manifest import SHORT_DIGEST, Manifest
from tiers.precision import NumberFormat
from tiers.tier import TierKind
from tiers.verification import VerifiedPrecision

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:assay:conformance:v1"
Method = Literal["probe", "public api"]
Digest = str
"""SHA-256, 64 hex digits."""

_SHA256 = Field(pattern=r"^[0-9a-f]{64}$")
_PARTS = {
    "weights": "weights",
    "activations": "activations",
    "kv_cache": "KV cache",
    "attention": "attention",
    "head": "head",
}


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Hardware(_Plain):
    """What the engine ran on."""

    device: str
    """As the engine names it, such as NVIDIA H200."""
    device_class: str
    """What chooses the kernels, such as sm_90, or x86_64 with amx: machines of one class compute alike."""
    backend: Literal["cpu", "cuda"]


class Versions(_Plain):
    """Of what computed and what measured."""

    assay: str
    vllm: str | None = None
    torch: str | None = None
    """None where an API does not tell."""


class Pack(_Plain):
    """The reference pack that the tier was held against."""

    digest: Digest = _SHA256
    prompt_set: Digest = _SHA256
    """Of the prompts alone, whatever the reference answered."""
    prompts: int = Field(ge=1)
    corpus: Digest = _SHA256
    """Of the passages of which perplexity was measured."""
    passages: int = Field(ge=1)

    @classmethod
    def of(cls, pack: ReferencePack) -> Self:
        """That one."""
        return cls(
            digest=pack.digest,
            prompt_set=pack.prompts,
            prompts=len(pack.prompts_asked),
            corpus=pack.corpus,
            passages=len(pack.passages),
        )


class Conformance(_Plain):
    """The predicate: what was found, and what it holds for."""

    tier: str
    """Its full name, such as Llama-3.1-8B-Instruct-Lite."""
    kind: TierKind
    model: str
    verified: VerifiedPrecision | None = None
    """The arithmetic that was read back from the engine that was measured, and the engine's fingerprint; None
    where an API does not tell."""
    hardware: Hardware | None = None
    """None where an API does not tell."""
    versions: Versions
    pack: Pack
    tokenizer: Digest = _SHA256
    chat_template: Digest = _SHA256
    """By which the prompts were written down, as token ids."""
    budget: dict[Phase, dict[str, float]]
    """The limit of each metric, a field of `Metrics`, in each phase."""
    findings: Findings
    issued: AwareDatetime
    """UTC."""
    method: Method
    """By the probe inside the engine divergences are exact; by the API that callers have, lower bounds."""

    @field_validator("issued")
    @classmethod
    def _is_utc(cls, issued: datetime) -> datetime:
        if issued.utcoffset() != timedelta(0):
            raise ValueError("a certificate is issued in UTC")
        return issued

    @model_validator(mode="after")
    def _says_what_the_method_can(self) -> Self:
        if self.findings.exact != (self.method == "probe"):
            raise ValueError("divergences are exact by the probe, and lower bounds by the public API")
        unknown = None in (self.verified, self.hardware, self.versions.vllm, self.versions.torch)
        if self.method == "probe" and unknown:
            raise ValueError("of an engine with the probe precision, hardware and versions are known")
        if not self.findings.exact and any(
            each.metric in LOWER_BOUNDS and each.verdict is Verdict.PASS for each in self.findings.judgements
        ):
            raise ValueError("a lower bound cannot show that a limit holds")
        return self


class SubjectDigest(_Plain):
    """A digest of files, by the name of its algorithm."""

    sha256: Digest = _SHA256


class Subject(_Plain):
    """The checkpoint that a certificate speaks of. The digest is that of its manifest: of every file's bytes.

    Where the method is the public API it is a server, by its URL and its name for the model. The digest is that of
    the evidence, a file with the scores of every token: of an engine that someone else runs no more is at hand.
    """

    name: str
    digest: SubjectDigest

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """That checkpoint, called by its model and recipe."""
        return cls(name=f"{manifest.model}/{manifest.recipe}", digest=SubjectDigest(sha256=manifest.digest))


class Certificate(_Plain):
    """The whole statement."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(default=STATEMENT_TYPE, alias="_type")
    subject: tuple[Subject] = Field(description="One checkpoint, or what a server told.")
    predicate_type: Literal["urn:assay:conformance:v1"] = Field(default=PREDICATE_TYPE, alias="predicateType")
    predicate: Conformance

    @classmethod
    def of(cls, manifest: Manifest, predicate: Conformance) -> Self:
        """Of the checkpoint with that manifest."""
        return cls(subject=(Subject.of(manifest),), predicate=predicate)

    @property
    def is_from_outside(self) -> bool:
        """Whether it is of a server that someone else runs, by what it tells any caller."""
        return self.predicate.method == "public api"

    @property
    def checkpoint(self) -> Digest:
        """The digest of the checkpoint's manifest; from outside that of the evidence."""
        return self.subject[0].digest.sha256

    @property
    def verdict(self) -> Verdict:
        """Of the tier."""
        return self.predicate.findings.verdict

    @property
    def canonical(self) -> bytes:
        """The one JSON of this certificate: sorted names, no spaces, the shortest digits of each number, UTF-8."""
        # What is computed from other fields (a format in words) is left out: its wording may change.
        fields = self.model_dump(mode="json", by_alias=True, round_trip=True)
        return json.dumps(
            fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()

    @property
    def digest(self) -> Digest:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def short_digest(self) -> str:
        """The first digits of `digest`, for headers and tables."""
        return self.digest[:SHORT_DIGEST]

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """From its JSON.

        Raises:
            CertificateError: it is none; the sentence names the first field that is wrong.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(step) for step in first["loc"])
            raise CertificateError(
                f"This is no certificate of Assay: {f'{where}: ' if where else ''}{first['msg']}."
            ) from error

    def write(self, path: Path) -> None:
        """Put it into a file, for people and machines to read."""
        text = self.model_dump_json(by_alias=True, round_trip=True, indent=2) + "\n"
        write_whole(path, text.encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a file, unsigned.

        Raises:
            CertificateError: there is none.
        """
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CertificateError(f"{path} cannot be read ({error.strerror}).") from error
        return cls.parse(text)


class Binding(_Plain):
    """A tier as it is now, in all that a certificate is bound to."""

    checkpoint: Digest = _SHA256
    """The digest of its manifest."""
    vllm: str
    verified: VerifiedPrecision
    device_class: str
    chat_template: Digest = _SHA256
    budget: dict[str, float]
    """What the tier is held to."""


def is_void(certificate: Certificate, now: Binding) -> list[str]:
    """Why the certificate says nothing of the tier as it is now, a sentence for each reason; empty if it holds."""
    then = certificate.predicate
    if then.verified is None or then.hardware is None or certificate.is_from_outside:
        return [
            f"It is of {certificate.subject[0].name}, measured from outside by its public API: it does not say "
            "what computed there, and so nothing of an engine here."
        ]
    reasons = []
    if certificate.checkpoint != now.checkpoint:
        reasons.append(
            f"The weights are others: checkpoint {now.checkpoint[:SHORT_DIGEST]}, and "
            f"{certificate.checkpoint[:SHORT_DIGEST]} was measured."
        )
    if then.versions.vllm != now.vllm:
        reasons.append(f"The engine is vLLM {now.vllm}, and {then.versions.vllm} was measured.")
    reasons += [
        f"The precision is another: {spoken} in {_format(is_now)}, and {_format(was)} was measured."
        for part, spoken in _PARTS.items()
        if (was := getattr(then.verified, part)) != (is_now := getattr(now.verified, part))
    ]
    if not now.verified.agrees:
        reasons.append(f"The engine is not what its checkpoint declares: {now.verified.disagreements[0]}.")
    if then.hardware.device_class != now.device_class:
        reasons.append(f"The hardware is {now.device_class}, and {then.hardware.device_class} was measured.")
    if then.chat_template != now.chat_template:
        reasons.append("The chat template is another than was measured.")
    if any(budget != now.budget for budget in then.budget.values()):
        reasons.append("It was judged by another budget than the config has now.")
    return reasons


def certificate_schema() -> dict[str, Any]:
    """The JSON schema of a certificate, draft 2020-12."""
    schema = Certificate.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": PREDICATE_TYPE,
        **schema,
    }


def _format(number: NumberFormat | None) -> str:
    return str(number) if number else "more than one format"
