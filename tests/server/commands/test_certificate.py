"""`assay certificate`: what it says of a certificate holds, and what does not hold exits with 1."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
from typer.testing import CliRunner, Result

from server.commands.certificate import certificate_app
from tests.tiers.samples import make_certificate, make_few_findings, make_findings, make_measurement
from tiers.conformance.certificate import Certificate, Subject
from tiers.conformance.findings import Verdict
from tiers.conformance.signature import Envelope, key_id, make_key, read_private_key, read_public_key, sign, verify
from tiers.errors import AssayError
from tiers.manifest import Manifest, describe_files
from tiers.precision import FP8
from tiers.source import Source
from tiers.tier import TierKind

COMMANDS = ("verify", "report", "keygen", "sign", "schema")


@dataclass(frozen=True)
class Files:
    """What lies in a folder: a checkpoint, its certificate, the certificate signed, and the key."""

    folder: Path
    certificate: Certificate

    @property
    def plain(self) -> Path:
        return self.folder / "turbo.json"

    @property
    def signed(self) -> Path:
        return self.folder / "turbo.dsse.json"

    @property
    def key(self) -> Path:
        return self.folder / "assay.key"

    @property
    def public(self) -> Path:
        return self.folder / "assay.key.pub"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "fp8-dynamic"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    checkpoint = tmp_path / "fp8-dynamic"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    manifest = Manifest(
        model="Llama-3.1-8B-Instruct",
        recipe="fp8-dynamic",
        recipe_text="",
        precision=FP8,
        seed=0,
        bits_per_weight=8,
        source=Source.parse("./m"),
        provenance="made by a test",
        versions={},
        created=datetime.now(UTC),
        files=describe_files(checkpoint),
    )
    manifest.write(checkpoint)
    certificate = make_certificate(make_few_findings()).model_copy(update={"subject": (Subject.of(manifest),)})
    made = Files(tmp_path, certificate)
    certificate.write(made.plain)
    make_key(made.key)
    sign(certificate, read_private_key(made.key)).write(made.signed)
    return made


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(certificate_app, [str(each) for each in arguments])


def sentence(result: Result) -> str:
    """What the command line prints of an error of Assay's own, with which it exits."""
    assert isinstance(result.exception, AssayError), result.output
    assert result.stdout == ""
    return str(result.exception)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: assay certificate {command}" in result.stdout


def test_a_certificate_is_shown_with_all_that_it_is_known_by(files: Files) -> None:
    result = run("verify", files.plain)
    assert result.exit_code == 0
    shown = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in result.stdout.splitlines())
    assert shown["certificate"] == "turbo.json"
    assert shown["tier"] == "Llama-3.1-8B-Instruct-Turbo"
    assert shown["verdict"] == files.certificate.verdict
    assert shown["checkpoint"] == "Llama-3.1-8B-Instruct/fp8-dynamic"
    assert shown["its digest"] == files.certificate.checkpoint
    assert shown["issued"] == "2026-11-21 17:30:00 UTC"
    assert shown["digest"] == files.certificate.digest
    assert shown["signature"] == "none"
    assert shown["files"].startswith("not checked")


def test_a_signature_that_is_valid_is_said_to_be_and_whose_it_is(files: Files) -> None:
    result = run("verify", files.signed, "--key", files.public)
    assert result.exit_code == 0
    assert f"valid, of key {key_id(read_public_key(files.public))}" in result.stdout


def test_a_signature_without_a_key_is_not_called_valid(files: Files) -> None:
    result = run("verify", files.signed)
    assert result.exit_code == 0
    assert re.search(r"signature\s+not checked", result.stdout)
    assert "valid" not in result.stdout


def test_another_key_and_a_changed_certificate_show_nothing_of_it(files: Files) -> None:
    make_key(files.folder / "other.key")
    result = run("verify", files.signed, "--key", files.folder / "other.key.pub")
    assert result.exit_code == 1
    assert "was signed with key" in sentence(result)

    envelope = Envelope.parse(files.signed.read_bytes())
    better = sign(make_certificate(make_few_findings(scale=1e-5)), read_private_key(files.key))
    envelope.model_copy(update={"payload": better.payload}).write(files.signed)
    result = run("verify", files.signed, "--key", files.public)
    assert result.exit_code == 1
    assert "was changed after it was signed" in sentence(result)


def test_a_key_for_what_nobody_signed_is_an_error(files: Files) -> None:
    result = run("verify", files.plain, "--key", files.public)
    assert result.exit_code == 1
    assert "turbo.json is not signed" in sentence(result)


def test_the_checkpoint_that_was_measured_matches(files: Files) -> None:
    result = run("verify", files.signed, "--key", files.public, "--checkpoint", files.checkpoint)
    assert result.exit_code == 0
    assert "those that were measured: 2" in result.stdout


def test_a_checkpoint_that_was_rebuilt_does_not_match(files: Files) -> None:
    (files.checkpoint / "model.safetensors").write_bytes(b"others!")
    manifest = Manifest.read(files.checkpoint).model_copy(update={"files": describe_files(files.checkpoint)})
    manifest.write(files.checkpoint)
    result = run("verify", files.plain, "--checkpoint", files.checkpoint)
    assert result.exit_code == 1
    assert "not those" in result.stdout
    assert f"{files.certificate.checkpoint[:12]} was measured." in result.stdout


def test_a_checkpoint_that_lost_a_bit_or_is_none_does_not_match(files: Files) -> None:
    (files.checkpoint / "model.safetensors").write_bytes(b"weighty")
    result = run("verify", files.plain, "--checkpoint", files.checkpoint)
    assert result.exit_code == 1
    assert "model.safetensors is damaged" in result.stdout
    result = run("verify", files.plain, "--checkpoint", files.folder / "none")
    assert result.exit_code == 1
    assert "There is no finished checkpoint" in result.stdout


def test_what_was_found_can_be_json(files: Files) -> None:
    result = run("verify", files.signed, "--key", files.public, "--checkpoint", files.checkpoint, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "holds": True,
        "tier": "Llama-3.1-8B-Instruct-Turbo",
        "verdict": files.certificate.verdict,
        "checkpoint": {
            "name": "Llama-3.1-8B-Instruct/fp8-dynamic",
            "digest": Manifest.read(files.checkpoint).digest,
        },
        "issued": "2026-11-21T17:30:00+00:00",
        "digest": files.certificate.digest,
        "signature": "valid",
        "keys": [key_id(read_public_key(files.public))],
        "checkpoint_matches": True,
        "problem": None,
    }
    (files.checkpoint / "config.json").unlink()
    result = run("verify", files.plain, "--checkpoint", files.checkpoint, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert (told["holds"], told["checkpoint_matches"], told["signature"]) == (False, False, None)
    assert "config.json is missing" in told["problem"]
    told = json.loads(run("verify", files.signed, "--json").stdout)
    assert (told["checkpoint_matches"], told["signature"]) == (None, "not checked")


def test_a_verdict_of_fail_is_a_certificate_all_the_same(files: Files) -> None:
    failed = make_certificate(make_findings(*make_measurement(0.06)), TierKind.LITE)
    assert failed.verdict is Verdict.FAIL
    failed.write(files.plain)
    result = run("verify", files.plain)
    assert result.exit_code == 0
    assert re.search(r"verdict\s+FAIL", result.stdout)


@pytest.mark.parametrize("command", [("verify",), ("report",), ("sign", "--key", "assay.key")])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Invalid JSON"),
        ("[]", "This is no certificate of Assay"),
        ('{"payloadType": "x"}', "a DSSE envelope has"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_certificate_is_named_with_its_file(
    files: Files, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], text: str | None, why: str
) -> None:
    monkeypatch.chdir(files.folder)
    if text is not None:
        Path("bad.json").write_text(text)
    result = run(*command, "bad.json")
    assert result.exit_code == 1
    assert "bad.json" in sentence(result)
    assert why in str(result.exception)
    assert not Path("report.html").exists()


def test_keys_are_made_once(files: Files) -> None:
    key = files.folder / "new.key"
    result = run("keygen", key)
    assert result.exit_code == 0
    assert f"{key}.pub: the public key {key_id(read_public_key(key.with_name('new.key.pub')))}" in result.stdout
    assert key.read_text().strip().splitlines()[1] not in result.output, "a private key is printed nowhere"
    before = key.read_bytes()
    result = run("keygen", key)
    assert "a key is not replaced" in sentence(result)
    assert key.read_bytes() == before


def test_what_is_signed_verifies_and_the_original_stays(files: Files) -> None:
    before = files.plain.read_bytes()
    files.signed.unlink()
    assert run("sign", files.plain, "--key", files.key).exit_code == 0
    assert run("sign", files.plain, "--key", files.key, "--output", files.folder / "own.json").exit_code == 0
    assert files.plain.read_bytes() == before
    for signed in (files.signed, files.folder / "own.json"):
        envelope = Envelope.parse(signed.read_bytes())
        assert verify(envelope, read_public_key(files.public)) == files.certificate


def test_what_cannot_be_signed_is_a_sentence(files: Files) -> None:
    assert "is signed already" in sentence(run("sign", files.signed, "--key", files.key))
    assert "holds no private" in sentence(run("sign", files.plain, "--key", files.public))
    nowhere = files.folder / "no" / "where.json"
    result = run("sign", files.plain, "--key", files.key, "--output", nowhere)
    assert "where.json cannot be written (No such file or directory)" in sentence(result)


def test_a_report_shows_signed_and_unsigned_in_the_order_given(files: Files) -> None:
    lite, page = files.folder / "lite.json", files.folder / "page.html"
    make_certificate(make_few_findings(), TierKind.LITE).write(lite)
    result = run("report", lite, files.signed, "--output", page)
    assert result.exit_code == 0
    assert f"{page}: 2 certificates" in result.stdout
    html = page.read_text()
    assert html.index("Instruct-Lite") < html.index("Instruct-Turbo")
    assert files.certificate.digest in html


def test_the_schema_is_that_of_certificates(files: Files) -> None:
    result = run("schema")
    assert result.exit_code == 0
    jsonschema.Draft202012Validator(json.loads(result.stdout)).validate(json.loads(files.certificate.canonical))


def test_a_stranger_gives_the_terminal_no_orders(files: Files) -> None:
    said = files.certificate.predicate.model_copy(update={"tier": "\x1b[2J[green]Turbo\nsignature valid"})
    named = files.folder / "[red]turbo.json"
    files.certificate.model_copy(update={"predicate": said}).write(named)
    shown = run("verify", named).stdout
    assert "[red]turbo.json" in shown
    assert "\ufffd[2J[green]Turbo\ufffdsignature valid" in shown
    assert "\x1b" not in shown
