"""A certificate keeps what it says, and says nothing of a tier that has changed."""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from tests.tiers.samples import make_certificate, make_few_findings, make_findings, make_measurement
from tiers.conformance.certificate import Binding, Certificate, Conformance, Subject, certificate_schema, is_void
from tiers.conformance.findings import Findings
from tiers.conformance.signature import sign, verify
from tiers.errors import CertificateError
from tiers.manifest import Manifest
from tiers.precision import FP8, NumberFormat
from tiers.source import Source

Change = Callable[[Binding], Binding]


@pytest.fixture(scope="module")
def findings() -> Findings:
    return make_findings(*make_measurement())


@pytest.fixture
def certificate(findings: Findings) -> Certificate:
    return make_certificate(findings)


@pytest.fixture
def now(certificate: Certificate) -> Binding:
    """The tier as it was measured."""
    then = certificate.predicate
    assert then.verified is not None
    assert then.hardware is not None
    assert then.versions.vllm is not None
    return Binding(
        checkpoint=certificate.checkpoint,
        vllm=then.versions.vllm,
        verified=then.verified,
        device_class=then.hardware.device_class,
        chat_template=then.chat_template,
        budget=then.budget["decode"],
    )


def with_predicate(certificate: Certificate, **fields: Any) -> dict[str, Any]:
    predicate = certificate.predicate.model_dump(round_trip=True) | fields
    return Conformance.model_validate(predicate).model_dump()


def test_what_was_written_is_read(certificate: Certificate, tmp_path: Path) -> None:
    certificate.write(tmp_path / "certificate.json")
    again = Certificate.read(tmp_path / "certificate.json")
    assert again == certificate
    assert again.digest == certificate.digest
    assert Certificate.parse(certificate.canonical) == certificate


def test_it_is_a_statement_of_in_toto(certificate: Certificate) -> None:
    written = json.loads(certificate.canonical)
    assert written["_type"] == "https://in-toto.io/Statement/v1"
    assert written["predicateType"] == "urn:assay:conformance:v1"
    assert written["subject"] == [{"name": "Llama-3.1-8B-Instruct/fp8-dynamic", "digest": {"sha256": "ab" * 32}}]
    assert set(written) == {"_type", "predicateType", "subject", "predicate"}


def test_the_subject_is_what_the_manifest_digests() -> None:
    manifest = Manifest(
        model="M",
        recipe="fp8-dynamic",
        recipe_text="",
        precision=FP8,
        seed=1,
        bits_per_weight=8,
        source=Source.parse("./m"),
        provenance="p",
        versions={},
        created=datetime.now(UTC),
        files={},
    )
    subject = Subject.of(manifest)
    assert (subject.name, subject.digest.sha256) == ("M/fp8-dynamic", manifest.digest)


def test_the_digest_is_of_what_is_said(certificate: Certificate, findings: Findings) -> None:
    assert certificate.digest == make_certificate(findings).digest
    other = make_certificate(findings.model_copy(update={"seconds": findings.seconds + 1}))
    assert certificate.digest != other.digest


def test_canonical_json_is_sorted_and_without_spaces(certificate: Certificate) -> None:
    read = json.loads(certificate.canonical)
    assert (
        certificate.canonical
        == json.dumps(read, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    )


def test_the_words_for_a_format_are_no_part_of_it(certificate: Certificate) -> None:
    assert "text" not in json.loads(certificate.canonical)["predicate"]["verified"]["weights"]


def test_the_published_schema_is_one_and_fits(certificate: Certificate) -> None:
    schema = certificate_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    written = json.loads(certificate.canonical)
    validator.validate(written)
    assert list(validator.iter_errors(written | {"predicateType": "urn:another"}))
    assert list(validator.iter_errors(written | {"more": 1}))
    assert list(validator.iter_errors(written | {"subject": []}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda fields: fields.pop("predicate"), "no certificate of Assay: predicate: Field required"),
        (lambda fields: fields.update(more=1), "more: Extra inputs are not permitted"),
        (lambda fields: fields.update(predicateType="urn:another"), "predicateType: Input should be"),
        (lambda fields: fields["subject"][0]["digest"].update(sha256="ab"), r"subject\.0\.digest\.sha256"),
        (lambda fields: fields["predicate"].update(issued="2026-11-21T17:30:00"), r"predicate\.issued"),
    ],
)
def test_what_is_no_certificate_is_named(
    certificate: Certificate, damage: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    fields = json.loads(certificate.canonical)
    damage(fields)
    with pytest.raises(CertificateError, match=sentence):
        Certificate.parse(json.dumps(fields).encode())


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"none\.json cannot be read \(No such file or directory\)"):
        Certificate.read(tmp_path / "none.json")
    (tmp_path / "none.json").write_text("{")
    with pytest.raises(CertificateError, match="no certificate of Assay: Invalid JSON"):
        Certificate.read(tmp_path / "none.json")


def test_lower_bounds_are_never_called_exact(certificate: Certificate, findings: Findings) -> None:
    with pytest.raises(ValidationError, match="lower bounds by the public API"):
        with_predicate(certificate, method="public api")
    bounds = make_findings(*make_measurement(), exact=False)
    with pytest.raises(ValidationError, match="lower bounds by the public API"):
        with_predicate(certificate, findings=bounds)
    assert with_predicate(certificate, findings=bounds, method="public api")["method"] == "public api"


@pytest.mark.parametrize("unknown", ["verified", "hardware", "versions"])
def test_only_of_an_api_may_precision_hardware_and_versions_be_unknown(
    certificate: Certificate, unknown: str
) -> None:
    fields = {unknown: {"assay": "0.1.0"} if unknown == "versions" else None}
    with pytest.raises(ValidationError, match="precision, hardware and versions are known"):
        with_predicate(certificate, **fields)
    bounds = make_findings(*make_measurement(), exact=False)
    assert with_predicate(certificate, findings=bounds, method="public api", **fields)


def test_from_outside_it_says_nothing_of_a_tiers_engine(certificate: Certificate, now: Binding) -> None:
    bounds = make_findings(*make_measurement(), exact=False)
    outside = Conformance.model_validate(with_predicate(certificate, findings=bounds, method="public api"))
    (reason,) = is_void(certificate.model_copy(update={"predicate": outside}), now)
    assert "measured from outside by its public API" in reason


def test_a_certificate_is_issued_in_utc(certificate: Certificate) -> None:
    elsewhere = datetime(2026, 11, 21, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    with pytest.raises(ValidationError, match="issued in UTC"):
        with_predicate(certificate, issued=elsewhere)


def with_kl(findings: Findings, **ends: float) -> Findings:
    """With another estimate of the KL divergence in decode, which nothing has checked."""
    found = findings.phases["decode"]
    kl = found.overall.kl.model_copy(update=ends)
    changed = found.model_copy(update={"overall": found.overall.model_copy(update={"kl": kl})})
    return findings.model_copy(update={"phases": {**findings.phases, "decode": changed}})


@pytest.mark.parametrize("figure", [math.inf, -math.inf, math.nan])
def test_a_figure_that_is_no_number_is_refused(
    certificate: Certificate, findings: Findings, figure: float
) -> None:
    for changed in (findings.model_copy(update={"seconds": figure}), with_kl(findings, value=figure)):
        with pytest.raises(ValidationError, match="should be a finite number"):
            with_predicate(certificate, findings=changed)
    with pytest.raises(ValidationError, match="should be a finite number"):
        with_predicate(certificate, budget={"decode": {"kl": figure}})


@pytest.mark.parametrize("ends", [{"low": math.inf}, {"low": math.nan}, {"high": -math.inf}, {"high": math.nan}])
def test_an_interval_ends_where_one_can(
    certificate: Certificate, findings: Findings, ends: dict[str, float]
) -> None:
    with pytest.raises(ValidationError, match="begins at a number or -Infinity"):
        with_predicate(certificate, findings=with_kl(findings, **ends))


def test_an_interval_of_too_few_prompts_is_stated_signed_and_read(tmp_path: Path) -> None:
    certificate = make_certificate(make_few_findings())
    groups = certificate.predicate.findings.phases["decode"].by_language
    assert {each.prompts for each in groups.values()} == {2}
    assert not any(each.kl.is_bounded for each in groups.values())
    assert certificate.predicate.findings.phases["decode"].overall.kl.is_bounded

    written = json.loads(certificate.canonical, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    kl = written["predicate"]["findings"]["phases"]["decode"]["by_language"]["de"]["kl"]
    assert (kl["low"], kl["high"]) == ("-Infinity", "Infinity")
    again = Certificate.parse(certificate.canonical)
    assert again == certificate
    assert again.canonical == certificate.canonical
    certificate.write(tmp_path / "few.json")
    assert Certificate.read(tmp_path / "few.json").digest == certificate.digest
    key = Ed25519PrivateKey.generate()
    assert verify(sign(certificate, key), key.public_key()) == certificate

    validator = jsonschema.Draft202012Validator(certificate_schema())
    validator.validate(written)
    for wrong in ({"low": "Infinity"}, {"high": "-Infinity"}, {"high": "much"}, {"value": "Infinity"}):
        original = dict(kl)
        kl.update(wrong)
        assert list(validator.iter_errors(written)), wrong
        kl.update(original)


def test_a_pass_of_a_lower_bound_is_refused(certificate: Certificate, findings: Findings) -> None:
    passed = [each for each in findings.judgements if each.metric == "kl"]
    assert {each.verdict for each in passed} == {"PASS"}
    with pytest.raises(ValidationError, match="cannot show that a limit holds"):
        with_predicate(certificate, method="public api", findings=findings.model_copy(update={"exact": False}))


def test_a_tier_as_it_was_measured_has_a_certificate(certificate: Certificate, now: Binding) -> None:
    assert is_void(certificate, now) == []


def with_fields(**fields: object) -> Change:
    return lambda now: now.model_copy(update=fields)


def with_verified(**fields: object) -> Change:
    return lambda now: now.model_copy(update={"verified": now.verified.model_copy(update=fields)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            with_fields(checkpoint="cd" * 32),
            "The weights are others: checkpoint cdcdcdcdcdcd, and abababababab was measured.",
        ),
        (with_fields(vllm="0.33.0"), "The engine is vLLM 0.33.0, and 0.32.0 was measured."),
        (
            with_verified(kv_cache=NumberFormat(type="fp8_e4m3", scale="tensor")),
            "The precision is another: KV cache in FP8 E4M3, a scale per tensor, and BF16 was measured.",
        ),
        (
            with_verified(head=NumberFormat(type="fp32")),
            "The precision is another: head in FP32, and BF16 was measured.",
        ),
        (
            with_verified(weights=None),
            "The precision is another: weights in more than one format, and FP8 E4M3, a scale per channel was "
            "measured.",
        ),
        (
            with_verified(agrees=False, disagreements=("head: declared BF16, and 1 of 1 run FP16 (worker 0)",)),
            "The engine is not what its checkpoint declares: head: declared BF16, and 1 of 1 run FP16 (worker 0).",
        ),
        (with_fields(device_class="sm_100"), "The hardware is sm_100, and sm_90 was measured."),
        (with_fields(chat_template="5b" * 32), "The chat template is another than was measured."),
    ],
)
def test_any_change_of_what_it_is_bound_to_voids_it(
    certificate: Certificate, now: Binding, change: Change, reason: str
) -> None:
    assert is_void(certificate, change(now)) == [reason]


def test_every_reason_is_given(certificate: Certificate, now: Binding) -> None:
    changed = with_fields(checkpoint="cd" * 32, vllm="1", device_class="sm_80", chat_template="5b" * 32)(now)
    assert len(is_void(certificate, changed)) == 4


def test_what_it_is_not_bound_to_does_not_void_it(certificate: Certificate, now: Binding) -> None:
    restarted = with_verified(fingerprint="another", workers=2, layers=())(now)
    assert is_void(certificate, restarted) == []
