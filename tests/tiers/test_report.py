"""The report says what the certificate says, to people, and runs nothing that a model wrote."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup

from tests.tiers.samples import make_certificate, make_few_findings, make_findings, make_measurement
from tiers.conformance import pictures
from tiers.conformance.certificate import Certificate
from tiers.conformance.findings import Findings, Verdict
from tiers.conformance.report import Measured, render_report
from tiers.conformance.scores import Phase
from tiers.conformance.wording import BY_NAME
from tiers.tier import TierKind

SCRIPT = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>"
INLINE = {"a", "b", "bdi", "code", "i", "mark", "small", "span"}
EMPTY = {"area", "br", "col", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """What a browser would find: text, elements, and whether they close as they open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in INLINE:
            self.words.append(" ")
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """All of it, spaced as a browser would."""
        return " ".join("".join(self.words).split())

    def values(self, *names: str) -> list[str]:
        """Of these attributes, wherever they are."""
        return [
            value or "" for _, attributes in self.elements for name, value in attributes.items() if name in names
        ]


@pytest.fixture(scope="module")
def measured() -> Measured:
    scores, noise = make_measurement()
    return Measured(make_certificate(make_findings(scores, noise)), scores, noise)


@pytest.fixture(scope="module")
def html(measured: Measured) -> str:
    return render_report([measured])


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what stands there in words: pictures take nearly all of a page's time."""
    for name in ("spread", "by_prompt", "by_position"):
        monkeypatch.setattr(pictures, name, lambda *_: Markup("<svg></svg>"))


@pytest.fixture
def by_position_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one picture that shows groups and intervals."""
    for name in ("spread", "by_prompt"):
        monkeypatch.setattr(pictures, name, lambda *_: Markup("<svg></svg>"))


def with_predicate(certificate: Certificate, **fields: Any) -> Certificate:
    return certificate.model_copy(update={"predicate": certificate.predicate.model_copy(update=fields)})


def with_findings(measured: Measured, **fields: Any) -> Measured:
    """Without scores: most pictures are not drawn again."""
    findings = measured.certificate.predicate.findings.model_copy(update=fields)
    return Measured(with_predicate(measured.certificate, findings=findings))


def only(findings: Findings, phase: Phase) -> Findings:
    kept = {
        "phases": {phase: findings.phases[phase].model_copy(update={"noise_floor": None, "by_language": {}})},
        "judgements": [each for each in findings.judgements if each.phase == phase],
        "worst": [],
    }
    return findings.model_copy(update=kept)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("scale", "verdict", "headline", "sentence"),
    [
        (0.0055, "PASS", "Turbo is within its budget", "Each of its 6 limits holds, with 95% confidence."),
        (
            0.06,
            "FAIL",
            "Turbo is over its budget",
            r"4 of its 6 limits are exceeded, with 95% confidence\. KL divergence in prefill is 0\.04\d+ to "
            r"0\.06\d+ nats; the limit is 0\.012\. Rejection rate in prefill is 5\.",
        ),
        (
            0.0088,
            "INCONCLUSIVE",
            "Turbo cannot be judged yet",
            r"KL divergence in decode is 0\.\d+ to 0\.\d+ nats; the limit is 0\.012\. That is too "
            r"close to tell: about [\d,]+ further prompts would settle it",
        ),
    ],
)
def test_the_verdict_comes_first_and_in_words(scale: float, verdict: str, headline: str, sentence: str) -> None:
    certificate = make_certificate(make_findings(*make_measurement(scale)))
    page = Page(render_report([Measured(certificate)]))
    assert certificate.verdict == verdict
    beginning = page.text[:900]
    assert f"{verdict} {headline}" in beginning
    assert re.search(sentence, beginning)
    assert ("section", f"verdict {verdict.lower()}") in [(tag, each.get("class")) for tag, each in page.elements]


@pytest.mark.usefixtures("undrawn")
def test_a_budget_that_no_number_of_prompts_settles_says_so(measured: Measured) -> None:
    judgement = measured.certificate.predicate.findings.judgements[0]
    undecided = judgement.model_copy(update={"verdict": Verdict.INCONCLUSIVE, "why_open": "too close"})
    page = Page(render_report([with_findings(measured, verdict=Verdict.INCONCLUSIVE, judgements=[undecided])]))
    assert "no number of further prompts would settle it" in page.text


@pytest.mark.usefixtures("by_position_alone")
def test_groups_of_too_few_prompts_have_figures_and_no_interval() -> None:
    findings = make_few_findings()
    scores = make_measurement(prompts=10)[0]
    html = render_report([Measured(make_certificate(findings), scores)])
    page = Page(html)
    assert re.search(r"\b(?:inf|nan)\b", html, flags=re.IGNORECASE) is None
    assert page.text.count("with its 95% interval, which fewer than 6 prompts do not have: prefill, decode.") == 2
    for phase, found in findings.phases.items():
        for metrics in found.by_language.values():
            digits = 4 if metrics.kl.value >= 0.01 else 5
            assert f"{metrics.kl.value:.{digits}f}" in page.text
        assert BY_NAME["kl"].interval(found.overall.kl) in page.text, "of all prompts there is one"
        assert f"{phase}: too few prompts" in page.values("title")
    # Six metrics in two phases have a range, and so has the legend; five kinds and five languages have none.
    ranges = [each for _, each in page.elements if each.get("class") == "range"]
    assert len(ranges) == 2 * 6 + 1
    dots = [each for _, each in page.elements if each.get("class") == "dot"]
    assert len(dots) == 2 * (6 + 5 + 5) + 1
    places = [float((each["style"] or "").removeprefix("left:").removesuffix("%")) for each in dots]
    groups = places[-2 * (5 + 5) :]
    assert max(groups) == pytest.approx(100 / 1.06, abs=0.1), "what is drawn fills the scale"
    assert len(set(groups)) == 2 * 5


@pytest.mark.usefixtures("undrawn")
def test_too_few_prompts_for_any_interval_are_one_sentence() -> None:
    findings = make_few_findings(prompts=4)
    assert findings.verdict is Verdict.INCONCLUSIVE
    page = Page(render_report([Measured(make_certificate(findings))]))
    sentence = "6 of its 6 limits cannot be judged: of so few prompts there is no interval, and at least 2 more"
    assert page.text.count(sentence) == 1
    assert "too close to tell" not in page.text
    assert page.text.count("too few prompts") == 2 * 6 + 4  # in the table, and of the figures at the top
    assert re.search(r"\b(?:inf|nan)\b", page.text, flags=re.IGNORECASE) is None


@pytest.mark.usefixtures("undrawn")
def test_a_lower_bound_below_its_limit_is_said_to_show_nothing() -> None:
    page = Page(render_report([Measured(make_certificate(make_findings(*make_measurement(), exact=False)))]))
    assert re.search(
        r"KL divergence in decode is at least 0\.00\d+ to 0\.0\d+ nats; the limit is 0\.012\.", page.text
    )
    assert page.text.count("A lower bound cannot show that a limit holds") == 1
    assert "too close to tell" not in page.text
    worse = Page(render_report([Measured(make_certificate(make_findings(*make_measurement(0.06), exact=False)))]))
    assert re.search(r"KL divergence in decode is at least 0\.0\d+ to 0\.\d+ nats; the limit", worse.text)
    assert re.search(r"Rejection rate in decode is \d", worse.text)
    assert "A lower bound cannot show" not in worse.text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("p_value", "sentence"),
    [
        (0.29, "not unusual by chance (McNemar's test, p = 0.29)"),
        (0.012, "more than chance (McNemar's test, p = 0.012)"),
        (1e-9, "more than chance (McNemar's test, p < 0.0001)"),
    ],
)
def test_flips_are_put_into_words(measured: Measured, p_value: float, sentence: str) -> None:
    phases = {
        phase: found.model_copy(update={"flips": found.flips.model_copy(update={"p_value": p_value})})
        for phase, found in measured.certificate.predicate.findings.phases.items()
    }
    assert sentence in Page(render_report([with_findings(measured, phases=phases)])).text


def test_every_metric_stands_there_with_interval_limit_and_noise_floor(page: Page, measured: Measured) -> None:
    for found in measured.certificate.predicate.findings.phases.values():
        metrics, noise = found.overall, found.noise_floor
        assert noise
        assert f"{metrics.kl.value:.5f} {metrics.kl.low:.5f} to {metrics.kl.high:.5f} 0.012" in page.text
        shares = [f"{100 * value:.2f}%" for value in (metrics.tv.value, metrics.tv.low, metrics.tv.high)]
        assert f"{shares[0]} {shares[1]} to {shares[2]} –" in page.text
        assert f"{100 * metrics.rejection.value:.2f}%" in page.text
        assert f"{100 * metrics.rms_delta_p.value:.2f}%" in page.text
        assert f"{noise.overall.kl.value:.7f}" in page.text
        assert f"{metrics.kl_tails.p99:.4f}".rstrip("0") in page.text


def test_what_it_holds_for_stands_there(page: Page, measured: Measured) -> None:
    certificate = measured.certificate
    predicate = certificate.predicate
    assert predicate.verified is not None
    wanted = [
        *(certificate.digest, certificate.checkpoint, predicate.pack.digest, predicate.pack.prompt_set),
        *(predicate.tokenizer, predicate.chat_template, predicate.verified.fingerprint, predicate.tier),
        *("vLLM 0.32.0, PyTorch 2.13.0", "Assay 0.1.0", "NVIDIA H100 80GB HBM3", "cuda, sm_90", "120 × Kernel"),
        *("21 November 2026, 17:30:00 UTC, after 3 min 7 s", "All 120 linear layers compute as declared."),
    ]
    assert [text for text in wanted if text not in page.text] == []


@pytest.mark.usefixtures("by_position_alone")
def test_what_a_model_wrote_is_text(measured: Measured) -> None:
    findings = measured.certificate.predicate.findings
    written = dict.fromkeys(("prompt_id", "before", "token", "top_q"), SCRIPT)
    worst = [findings.worst[0].model_copy(update=written)]
    phases = {
        phase: found.model_copy(
            update={"by_kind": {SCRIPT: found.overall}, "by_position": {SCRIPT: found.overall}}
        )
        for phase, found in findings.phases.items()
    }
    bad = with_findings(measured, worst=worst, phases=phases)
    assert bad.certificate.predicate.hardware is not None
    hardware = bad.certificate.predicate.hardware.model_copy(update={"device": SCRIPT})
    certificate = with_predicate(bad.certificate, tier=SCRIPT, hardware=hardware)
    html = render_report([replace(measured, certificate=certificate)])
    page = Page(html)
    assert html.count("&lt;script&gt;alert(") >= 8
    assert {tag for tag, _ in page.elements} & {"script", "img", "iframe", "object", "link", "base"} == set()
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    assert SCRIPT in page.text


def test_the_page_asks_for_nothing(page: Page, html: str) -> None:
    links = page.values("href", "xlink:href", "src", "srcset", "data", "poster", "action")
    assert links
    assert [link for link in links if not link.startswith("#")] == []
    assert "url(" not in html.replace("url(#", "")
    assert "@import" not in html
    # Names of XML namespaces are no addresses to fetch.
    assert set(re.findall(r"https?://[^\"\s<]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_pictures_are_in_the_pages_own_colours_and_font(html: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(pictures) == 4
    for picture in pictures:
        assert 'role="img" aria-label="' in picture
        assert re.findall(r"#[0-9a-f]{6}\b", picture) == []
        assert "font-family" not in picture
        assert "<style" not in picture
        assert " id=" not in re.sub(r"<(?:path|clipPath) id=", "", picture)


def test_a_link_leads_somewhere(page: Page, measured: Measured) -> None:
    both = Page(render_report([with_findings(measured)] * 2))
    for each in (page, both):
        assert {link[1:] for link in each.values("href", "xlink:href")} <= set(each.values("id"))
    assert {"tier-1", "tier-2"} <= set(both.values("id"))


@pytest.mark.usefixtures("undrawn")
def test_lower_bounds_are_marked_as_such(page: Page) -> None:
    bounds = make_certificate(make_findings(*make_measurement(), exact=False))
    text = Page(render_report([Measured(bounds)])).text
    kl = bounds.predicate.findings.phases["decode"].overall.kl.value
    assert f"≥ {kl:.5f}" in text
    assert "divergences are lower bounds" in text
    assert "times the noise floor" not in text
    rejection = bounds.predicate.findings.phases["decode"].overall.rejection.value
    assert f"≥ {100 * rejection:.2f}%" not in text  # the likeliest token is known
    assert "≥" not in page.text
    assert "times the noise floor" in page.text
    assert "divergences are exact" in page.text


def test_a_certificate_alone_makes_a_page(measured: Measured) -> None:
    page = Page(render_report([Measured(measured.certificate)]))
    assert sum(tag == "svg" for tag, _ in page.elements) == 1
    assert "Turbo is within its budget" in page.text


def test_one_phase_without_noise_floor_makes_a_page(measured: Measured) -> None:
    findings = only(measured.certificate.predicate.findings, "prefill")
    certificate = make_certificate(make_findings(*make_measurement()))
    scores = {"prefill": measured.scores["prefill"]}
    shown = Measured(with_predicate(certificate, findings=findings), scores)  # type: ignore[arg-type]
    text = Page(render_report([shown])).text
    assert "Each of its 3 limits holds" in text
    assert "By language" not in text
    assert "worst tokens" not in text


def test_a_tier_that_is_the_reference_makes_a_page(measured: Measured) -> None:
    scores = {phase: replace(each, kl=np.zeros(len(each))) for phase, each in measured.scores.items()}
    findings = make_findings(scores, {})
    text = Page(render_report([Measured(make_certificate(findings, TierKind.REFERENCE), scores)])).text
    assert "Reference is within its budget" in text


@pytest.mark.usefixtures("undrawn")
def test_several_tiers_are_compared_at_the_top(measured: Measured) -> None:
    lite = make_certificate(make_findings(*make_measurement(0.06)), TierKind.LITE)
    text = Page(render_report([Measured(measured.certificate), Measured(lite)])).text
    assert text.index("Llama-3.1-8B-Instruct-Lite") < text.index("Turbo is within its budget")
    assert text.index("Turbo is within its budget") < text.index("Lite is over its budget")


def test_no_tier_is_no_page() -> None:
    with pytest.raises(ValueError, match="at least one"):
        render_report([])


@pytest.mark.usefixtures("undrawn")
def test_whitespace_in_tokens_can_be_seen(measured: Measured) -> None:
    token = measured.certificate.predicate.findings.worst[0]
    shown = {" the": "␣the", "\n\n": "⏎⏎", "  ": "␣␣", "a b ": "a b␣", "\t": "⇥", "": "∅"}
    worst = [token.model_copy(update={"token": text, "top_q": "x", "before": "word " * 80}) for text in shown]
    text = Page(render_report([with_findings(measured, worst=worst)])).text
    for seen in shown.values():
        assert f"word {seen}The tier's likeliest: x" in text.replace(f"{seen} The", f"{seen}The")
    assert "word " * 80 not in text


@pytest.mark.usefixtures("undrawn")
def test_ten_worst_tokens_are_enough(measured: Measured) -> None:
    worst = measured.certificate.predicate.findings.worst * 2
    page = Page(render_report([with_findings(measured, worst=worst)]))
    assert page.text.count("The tier's likeliest:") == 10
    assert "The 10 worst tokens" in page.text


def test_the_same_measurement_makes_the_same_page(measured: Measured, html: str) -> None:
    assert render_report([measured]) == html


def test_what_was_signed_reads_as_what_was_measured(measured: Measured) -> None:
    """Canonical JSON sorts names: decode before prefill, token 128 before token 16."""
    findings = measured.certificate.predicate.findings
    names = ("0–15", "16–31", "32–127", "128+")
    phases = {
        phase: found.model_copy(update={"by_position": dict(zip(names, found.by_position.values(), strict=True))})
        for phase, found in findings.phases.items()
    }
    certificate = with_predicate(measured.certificate, findings=findings.model_copy(update={"phases": phases}))
    page = render_report([Measured(certificate)])
    assert render_report([Measured(Certificate.parse(certificate.canonical))]) == page
    places = [page.index(f">{name}<") for name in names]
    assert places == sorted(places)


@pytest.mark.program
def test_nothing_draws_before_it_is_asked_to() -> None:
    code = "import sys, tiers.conformance.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
