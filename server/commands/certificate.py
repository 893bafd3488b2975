"""`assay certificate verify | report | keygen | sign | schema`: what may be done with certificates anywhere."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from server.commands.console import JsonOption, err, out
from server.commands.tables import show, table
from server.progress import Steps
from tiers.conformance.certificate import Certificate, certificate_schema
from tiers.conformance.findings import Verdict
from tiers.conformance.signature import Envelope, key_id, make_key, read, read_private_key, read_public_key
from tiers.conformance.signature import sign as sign_certificate
from tiers.conformance.signature import verify as verify_envelope
from tiers.errors import CertificateError, CheckpointError
from tiers.manifest import SHORT_DIGEST, Manifest

certificate_app = typer.Typer(
    no_args_is_help=True,
    help="Verify, show and sign certificates: how far a tier was measured to be from the reference.",
)
_COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.INCONCLUSIVE: "yellow"}
CertificateFile = Annotated[Path, typer.Argument(help="A certificate, signed or not.", dir_okay=False)]


@dataclass(frozen=True)
class _Verified:
    """A certificate and what was found of it."""

    certificate: Certificate
    signature: Literal["valid", "not checked"] | None
    """None of a certificate that is not signed."""
    keys: tuple[str, ...]
    """Who signed, by what the envelope says."""
    files: int | None = None
    """How many of the checkpoint's were read, if any were to be."""
    problem: str | None = None
    """Why the checkpoint is not what was measured."""


@certificate_app.command()
def verify(
    file: CertificateFile,
    key: Annotated[
        Path | None, typer.Option(help="The signer's public key, in PEM: whose signature it must have.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint's folder, such as .assay/checkpoints/MODEL/RECIPE: whether its "
            "files are those that were measured. Reads all of them.",
            file_okay=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a certificate is one, who signed it, and whether a checkpoint is the one it speaks of.

    One that was measured by a server's public API speaks of no checkpoint: its digest is that of the evidence, the
    parquet file beside it.

    Exits with 1 if something that was asked for does not hold. A certificate that says FAIL is one all the same.

    Example: assay certificate verify lite.dsse.json --key assay.key.pub
    """
    found = _checkpoint_checked(_signature_checked(file, key), checkpoint)
    if as_json:
        out.print_json(json.dumps(_as_json(found)))
    else:
        show(_as_table(file, found))
        if found.problem:
            out.print(f"\n[red]does not match[/]  {escape(found.problem)}", soft_wrap=True)
    if found.problem:
        raise typer.Exit(1)


@certificate_app.command()
def report(
    files: Annotated[
        list[Path], typer.Argument(help="Certificates, signed or not, in the order to show them.", dir_okay=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page; replaced if there is one.", dir_okay=False)
    ] = Path("report.html"),
) -> None:
    """Make a page to read of one certificate or several: one HTML file that asks for nothing else.

    Signatures are not checked: `assay certificate verify` does.

    Example: assay certificate report turbo.json lite.json --output report.html
    """
    # It brings a template engine, for which no other command need wait.
    from tiers.conformance.report import Measured, render_report

    page = render_report([Measured(_certificate_in(read(file))) for file in files])
    _write(output, page)
    out.print(f"{output}: {len(files)} certificate{'s' if len(files) > 1 else ''}", markup=False, soft_wrap=True)


@certificate_app.command()
def keygen(
    file: Annotated[
        Path, typer.Argument(help="Where the private key goes; the public one beside it as FILE.pub.")
    ],
) -> None:
    """Make a key pair to sign certificates with, Ed25519 in PEM.

    Example: assay certificate keygen assay.key
    """
    public = make_key(file)
    out.print(f"{file}: the private key, which signs; it stays here", markup=False, soft_wrap=True)
    name = key_id(read_public_key(public))
    out.print(f"{public}: the public key {name}, which verifies; give it away", markup=False, soft_wrap=True)


@certificate_app.command()
def sign(
    file: Annotated[Path, typer.Argument(help="A certificate that is not signed.", dir_okay=False)],
    key: Annotated[Path, typer.Option(help="A private key, as `assay certificate keygen` makes it.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Beside the certificate as NAME.dsse.json by default.", dir_okay=False
        ),
    ] = None,
) -> None:
    """Sign a certificate: it goes into a DSSE envelope, and stays as it is where it lies.

    Example: assay certificate sign lite.json --key assay.key --output lite.dsse.json
    """
    certificate = read(file)
    if isinstance(certificate, Envelope):
        raise CertificateError(f"{file} is signed already: sign the certificate that it was made from.")
    envelope = sign_certificate(certificate, read_private_key(key))
    signed = output or file.with_suffix(".dsse.json")
    _write(signed, envelope.text)
    by = envelope.signatures[0].keyid
    out.print(f"{signed}: signed with key {by}", markup=False, soft_wrap=True)


@certificate_app.command()
def schema() -> None:
    """Print the JSON schema of a certificate.

    Example: assay certificate schema > certificate.schema.json
    """
    out.print_json(json.dumps(certificate_schema()))


def _signature_checked(file: Path, key: Path | None) -> _Verified:
    """What the file holds.

    Raises:
        CertificateError: no certificate, or not with that key's signature.
    """
    held = read(file)
    if isinstance(held, Certificate):
        if key:
            raise CertificateError(
                f"{file} is not signed, so no key can vouch for it: leave out --key, or sign it."
            )
        return _Verified(held, signature=None, keys=())
    if not key:
        named = tuple(each.keyid for each in held.signatures)
        return _Verified(_certificate_in(held), signature="not checked", keys=named)
    public = read_public_key(key)
    return _Verified(verify_envelope(held, public), signature="valid", keys=(key_id(public),))


def _checkpoint_checked(found: _Verified, folder: Path | None) -> _Verified:
    if not folder:
        return found
    try:
        return replace(found, files=_files_measured(found.certificate, folder))
    except CheckpointError as error:
        return replace(found, files=0, problem=str(error))


def _files_measured(certificate: Certificate, folder: Path) -> int:
    """How many files the checkpoint has.

    Raises:
        CheckpointError: it is another than was measured, or damaged, or none.
    """
    if certificate.is_from_outside:
        raise CheckpointError(
            f"It speaks of no checkpoint but of {certificate.subject[0].name}, whose weights are not known."
        )
    manifest = Manifest.read(folder)
    if manifest.digest != certificate.checkpoint:
        raise CheckpointError(
            f"{folder} holds checkpoint {manifest.short_digest}, {manifest.model}/{manifest.recipe}, and "
            f"{certificate.checkpoint[:SHORT_DIGEST]} was measured."
        )
    with Steps(err) as steps, steps.step(f"Reading {folder}") as step:
        manifest.verify(folder, lambda name: step.detail(f"verifying {name}"))
    return len(manifest.files)


def _certificate_in(held: Certificate | Envelope) -> Certificate:
    return held if isinstance(held, Certificate) else held.unverified()


def _as_table(file: Path, found: _Verified) -> Table:
    certificate = found.certificate
    said, subject = certificate.predicate, certificate.subject[0]
    signature = "none"
    if found.signature == "valid":
        signature = f"[green]valid[/], of key {found.keys[0]}"
    elif found.signature:
        signature = "[yellow]not checked[/]: give the signer's public key with --key"
    outside = certificate.is_from_outside
    matches = "not known: a server's own" if outside else "not checked: give its folder with --checkpoint"
    if found.files is not None:
        matches = "[red]not those[/]" if found.problem else f"[green]those that were measured[/]: {found.files}"
    where = f"{said.hardware.device}, vLLM {said.versions.vllm}" if said.hardware else "its public API"
    measured_on = f"{where}, {said.pack.prompts} prompts"
    rows = table("certificate", _shown(file.name))
    for name, value in (
        ("tier", _shown(said.tier)),
        ("verdict", f"[{_COLOURS[certificate.verdict]}]{certificate.verdict}[/]"),
        ("server" if outside else "checkpoint", _shown(subject.name)),
        ("its evidence" if outside else "its digest", certificate.checkpoint),
        ("measured on", _shown(measured_on)),
        ("divergences", "exact" if said.findings.exact else "lower bounds"),
        ("issued", f"{said.issued:%Y-%m-%d %H:%M:%S} UTC"),
        ("digest", certificate.digest),
        ("signature", signature),
        ("files", matches),
    ):
        rows.add_row(name, value)
    return rows


def _shown(text: str) -> str:
    """As it is, and nothing that a terminal would obey: whoever wrote a certificate may be a stranger."""
    return escape("".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text))


def _as_json(found: _Verified) -> dict[str, Any]:
    certificate = found.certificate
    said, subject = certificate.predicate, certificate.subject[0]
    named = {"name": subject.name, "digest": subject.digest.sha256}
    return {
        "holds": not found.problem,
        "tier": said.tier,
        "verdict": certificate.verdict,
        **({"checkpoint": None, "evidence": named} if certificate.is_from_outside else {"checkpoint": named}),
        "issued": said.issued.isoformat(),
        "digest": certificate.digest,
        "signature": found.signature,
        "keys": found.keys,
        "checkpoint_matches": None if found.files is None else not found.problem,
        "problem": found.problem,
    }


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CertificateError(f"{path} cannot be written ({error.strerror}).") from error
