"""Signs certificates and verifies them: Ed25519 in a DSSE envelope. Knows nothing of what a certificate says.

https://github.com/secure-systems-lab/dsse: what is signed is not the payload alone but its type with it, so that a
signature cannot be passed off as one of something else, and verification never parses what it has not verified.
"""

import base64
import binascii
import hashlib
import json
import os
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tiers.conformance.certificate import Certificate
from tiers.errors import CertificateError
from tiers.files import write_whole

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_KEY_ID_DIGITS = 16


class Signature(BaseModel):
    """One signer's. ``sig`` is Base64; ``keyid`` says whose key to try and proves nothing."""

    model_config = ConfigDict(frozen=True)

    keyid: str = ""
    sig: str


class Envelope(BaseModel):
    """A signed certificate, as it lies in a file. ``payload`` is Base64."""

    model_config = ConfigDict(frozen=True)

    payload_type: str = Field(alias="payloadType")
    payload: str
    signatures: tuple[Signature, ...] = Field(min_length=1)

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """From its JSON.

        Raises:
            CertificateError: it is no envelope.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise CertificateError(
                "This is no signed certificate: a DSSE envelope has payloadType, payload and signatures."
            ) from error

    @property
    def text(self) -> str:
        """Its JSON, as it lies in a file."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    def write(self, path: Path) -> None:
        """Put it into a file."""
        write_whole(path, self.text.encode())

    def unverified(self) -> Certificate:
        """The certificate inside, whoever wrote it: for showing what it claims, never for trusting it.

        Raises:
            CertificateError: there is none inside.
        """
        return Certificate.parse(_payload(self))


def read(path: Path) -> Certificate | Envelope:
    """What lies in a file: a certificate, signed or not.

    Raises:
        CertificateError: neither; the sentence names the file.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path} cannot be read ({error.strerror}).") from error
    try:
        return Envelope.parse(text) if _looks_signed(text) else Certificate.parse(text)
    except CertificateError as error:
        raise CertificateError(f"{path}: {error}") from error


def make_key(path: Path) -> Path:
    """A new key pair: the private key into ``path``, the public one beside it, which is returned.

    Raises:
        CertificateError: there is already a file of either name, and a key is not replaced.
    """
    public_path = path.with_name(f"{path.name}.pub")
    if taken := next((each for each in (path, public_path) if os.path.lexists(each)), None):
        raise CertificateError(f"{taken} exists, and a key is not replaced: choose another name.")
    key = Ed25519PrivateKey.generate()
    private_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for file, pem, mode in ((path, private_pem, 0o600), (public_path, public_pem, 0o644)):
        try:
            # Never open to others, not even until a chmod.
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise CertificateError(f"{file} cannot be written ({error.strerror}).") from error
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(pem)
    return public_path


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """From a PEM file.

    Raises:
        CertificateError: there is none, or of another kind.
    """
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # the second is a key under a password
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise CertificateError(f"{path} holds no private Ed25519 key in PEM without a password.")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """From a PEM file.

    Raises:
        CertificateError: there is none, or of another kind.
    """
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise CertificateError(f"{path} holds no public Ed25519 key in PEM.")
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """A short name for a key: the first digits of the SHA-256 of its 32 bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:_KEY_ID_DIGITS]


def sign(certificate: Certificate, key: Ed25519PrivateKey) -> Envelope:
    """The certificate's canonical JSON, signed."""
    payload = certificate.canonical
    signature = Signature(
        keyid=key_id(key.public_key()), sig=base64.b64encode(key.sign(_signed(PAYLOAD_TYPE, payload))).decode()
    )
    return Envelope(payloadType=PAYLOAD_TYPE, payload=base64.b64encode(payload).decode(), signatures=(signature,))


def verify(envelope: Envelope, key: Ed25519PublicKey) -> Certificate:
    """The certificate inside, which the holder of the key has signed as it is.

    Raises:
        CertificateError: another key's, changed since, or no certificate.
    """
    payload = _payload(envelope)
    signed = _signed(envelope.payload_type, payload)
    if not any(_fits(key, _decoded(each.sig), signed) for each in envelope.signatures):
        named = [each.keyid for each in envelope.signatures]
        if key_id(key) in named:
            raise CertificateError("The certificate was changed after it was signed, or its signature was.")
        signers = ", ".join(named)
        raise CertificateError(
            f"The certificate was signed with key {signers or 'unknown'}, and this is key {key_id(key)}: "
            "take the signer's public key."
        )
    return Certificate.parse(payload)


def _looks_signed(text: bytes) -> bool:
    try:
        fields = json.loads(text)
    except ValueError:
        return False
    return isinstance(fields, dict) and bool({"payloadType", "payload", "signatures"} & set(fields))


def _payload(envelope: Envelope) -> bytes:
    if envelope.payload_type != PAYLOAD_TYPE:
        raise CertificateError(
            f"This is no signed certificate: its payload is {envelope.payload_type!r}, not {PAYLOAD_TYPE!r}."
        )
    return _decoded(envelope.payload)


def _signed(payload_type: str, payload: bytes) -> bytes:
    """What a signature is of: DSSE's pre-authentication encoding (PAE)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _fits(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _decoded(text: str) -> bytes:
    """Base64 of either alphabet, which DSSE leaves to the signer."""
    try:
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        raise CertificateError("The envelope is damaged: its payload or signature is no Base64.") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"The key {path} cannot be read ({error.strerror}).") from error
