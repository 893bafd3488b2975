"""From the command to the gateway: certificates measured on the engines that serve, signed, checked, shown."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import CERTIFIED, MODEL, Certified, Server, run
from tiers.conformance.certificate import Certificate
from tiers.conformance.findings import FEWEST_PROMPTS
from tiers.conformance.scores import PHASES, Phase

pytestmark = pytest.mark.timeout(600)


def certificate(certified: Certified, tier: str) -> Certificate:
    return Certificate.read(certified.file(tier))


def test_the_engines_that_serve_are_measured_and_no_others_are_started(
    assay: Server, certified: Certified
) -> None:
    assert certified.done.returncode == 1, certified.done.stderr[-2000:]
    assert "The engines of the server that runs from" in certified.done.stderr
    assert "✓ Engine" not in certified.done.stderr
    fingerprints = {tier["id"]: tier["verified"]["fingerprint"] for tier in assay.get("/v1/tiers")["data"]}
    for tier in CERTIFIED:
        measured = certificate(certified, tier).predicate.verified
        assert measured is not None
        assert measured.fingerprint == fingerprints[f"{MODEL}-{tier}"]


def test_what_is_printed_is_what_is_kept(certified: Certified) -> None:
    said = json.loads(certified.done.stdout)
    assert said == [json.loads(certificate(certified, tier).canonical) for tier in CERTIFIED]
    assert [certificate(certified, tier).verdict for tier in CERTIFIED] == ["PASS", "FAIL"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_tier_is_above_the_noise_floor_and_the_reference_near_transformers(
    certified: Certified, phase: Phase
) -> None:
    reference, lite = (certificate(certified, tier).predicate.findings.phases[phase] for tier in CERTIFIED)
    floor = lite.noise_floor
    assert floor is not None
    for name, found in (("noise floor", floor), ("Reference from Transformers", reference), ("Lite", lite)):
        print(f"{phase}: {name} {found.overall.kl.value:.5f}, gap {found.corpus.perplexity_gap.value:.3f}")
    assert set(floor.by_condition) == {"other neighbours", "prefix cache"}
    assert 0 < reference.overall.kl.value < 0.004
    assert 0 < floor.overall.kl.high < lite.overall.kl.low
    assert 20 * floor.overall.kl.value < lite.overall.kl.value
    assert lite.corpus.perplexity_gap.value > 0
    assert (lite.overall.prompts, lite.corpus.prompts) == (FEWEST_PROMPTS, FEWEST_PROMPTS)


def test_a_signed_one_verifies_and_one_with_another_byte_does_not(certified: Certified, tmp_path: Path) -> None:
    signed = certified.file("Lite").with_suffix(".dsse.json")
    assert run("certificate", "verify", str(signed), "--key", f"{certified.key}.pub").returncode == 0
    envelope = json.loads(signed.read_text())
    middle = len(envelope["payload"]) // 2
    other = "A" if envelope["payload"][middle] != "A" else "B"
    envelope["payload"] = envelope["payload"][:middle] + other + envelope["payload"][middle + 1 :]
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(envelope))
    refused = run("certificate", "verify", str(changed), "--key", f"{certified.key}.pub")
    assert refused.returncode != 0
    assert "signature" in refused.stderr + refused.stdout


def test_the_report_says_both_verdicts_first(certified: Certified) -> None:
    page = (certified.folder / "report.html").read_text()
    assert "Reference is within its budget" in page
    assert "Lite is over its budget" in page
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_gateway_shows_how_each_tier_stands(assay: Server, certified: Certified) -> None:
    for tier, verdict in (("Reference", "none"), ("Turbo", "none"), ("Lite", "fail")):
        answer: Any = assay.client().completions.with_raw_response.create(
            model=f"{MODEL}-{tier}", prompt="Hello", max_tokens=1
        )
        assert answer.headers["x-assay-certificate"] == verdict, tier
        summary = assay.get(f"/v1/tiers/{MODEL}-{tier}")["certificate"]
        assert (summary["verdict"] if summary else "none") == verdict
        assert assay.metric("assay_tier_certified", tier) == (verdict == "pass")
    shown = assay.get(f"/v1/tiers/{MODEL}-Lite/certificate")
    assert shown == json.loads(certificate(certified, "Lite").canonical)
