"""A signature vouches for every byte of a certificate, and for nobody else's."""

import base64
import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.tiers.samples import make_certificate, make_findings, make_measurement
from tiers.conformance.certificate import Certificate
from tiers.conformance.signature import (
    PAYLOAD_TYPE,
    Envelope,
    Signature,
    key_id,
    make_key,
    read,
    read_private_key,
    read_public_key,
    sign,
    verify,
)
from tiers.errors import CertificateError


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return make_certificate(make_findings(*make_measurement()))


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def envelope(certificate: Certificate, key: Ed25519PrivateKey) -> Envelope:
    return sign(certificate, key)


def with_payload(envelope: Envelope, payload: bytes) -> Envelope:
    return envelope.model_copy(update={"payload": base64.b64encode(payload).decode()})


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_what_was_signed_is_verified(
    certificate: Certificate, envelope: Envelope, key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    envelope.write(tmp_path / "signed.json")
    read = Envelope.parse((tmp_path / "signed.json").read_bytes())
    assert verify(read, key.public_key()) == certificate


def test_an_envelope_is_that_of_dsse(certificate: Certificate, key: Ed25519PrivateKey) -> None:
    written = json.loads(sign(certificate, key).model_dump_json(by_alias=True))
    assert set(written) == {"payloadType", "payload", "signatures"}
    assert written["payloadType"] == "application/vnd.in-toto+json"
    payload = base64.b64decode(written["payload"])
    assert payload == certificate.canonical
    # As the specification spells it: "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body.
    signed = f"DSSEv1 28 application/vnd.in-toto+json {len(payload)} ".encode() + payload
    (signature,) = written["signatures"]
    assert signature["keyid"] == key_id(key.public_key())
    key.public_key().verify(base64.b64decode(signature["sig"]), signed)


def test_one_key_signs_the_same_twice(certificate: Certificate, key: Ed25519PrivateKey) -> None:
    assert sign(certificate, key) == sign(certificate, key)


def test_a_flipped_bit_anywhere_is_found(envelope: Envelope, key: Ed25519PrivateKey) -> None:
    payload = base64.b64decode(envelope.payload)
    for at in range(0, len(payload), 97):
        with pytest.raises(CertificateError, match="changed after it was signed"):
            verify(with_payload(envelope, flipped(payload, at)), key.public_key())
    raw = base64.b64decode(envelope.signatures[0].sig)
    for at in range(len(raw)):
        broken = envelope.signatures[0].model_copy(update={"sig": base64.b64encode(flipped(raw, at)).decode()})
        with pytest.raises(CertificateError, match="changed after it was signed"):
            verify(envelope.model_copy(update={"signatures": (broken,)}), key.public_key())


def test_a_verdict_cannot_be_improved(envelope: Envelope, key: Ed25519PrivateKey) -> None:
    better = base64.b64decode(envelope.payload).replace(b'"value":', b'"value":-')
    with pytest.raises(CertificateError, match="changed after it was signed"):
        verify(with_payload(envelope, better), key.public_key())


def test_another_key_is_named(envelope: Envelope, key: Ed25519PrivateKey) -> None:
    other = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(CertificateError) as refused:
        verify(envelope, other)
    assert str(refused.value) == (
        f"The certificate was signed with key {key_id(key.public_key())}, and this is key {key_id(other)}: "
        "take the signer's public key."
    )


def test_a_key_id_proves_nothing(certificate: Certificate, envelope: Envelope, key: Ed25519PrivateKey) -> None:
    """Who signs with a key of their own under another's name is found out, and a wrong name harms nobody."""
    forged = sign(certificate, Ed25519PrivateKey.generate())
    mine = key_id(key.public_key())
    posing = forged.model_copy(update={"signatures": (Signature(keyid=mine, sig=forged.signatures[0].sig),)})
    with pytest.raises(CertificateError, match="changed after it was signed, or its signature was"):
        verify(posing, key.public_key())
    nameless = envelope.model_copy(update={"signatures": (Signature(sig=envelope.signatures[0].sig),)})
    assert verify(nameless, key.public_key()) == certificate


def test_one_of_several_signatures_is_enough(
    certificate: Certificate, envelope: Envelope, key: Ed25519PrivateKey
) -> None:
    second = Ed25519PrivateKey.generate()
    both = envelope.model_copy(
        update={"signatures": (*envelope.signatures, *sign(certificate, second).signatures)}
    )
    assert verify(both, key.public_key()) == verify(both, second.public_key()) == certificate


def test_both_alphabets_of_base64_are_read(
    certificate: Certificate, envelope: Envelope, key: Ed25519PrivateKey
) -> None:
    payload = envelope.payload.replace("+", "-").replace("/", "_")
    signature = envelope.signatures[0].sig.replace("+", "-").replace("/", "_")
    other = envelope.model_copy(update={"payload": payload, "signatures": (Signature(sig=signature),)})
    assert verify(other, key.public_key()) == certificate


def test_a_signed_something_else_is_no_certificate(key: Ed25519PrivateKey, envelope: Envelope) -> None:
    payload = b'{"_type":"https://in-toto.io/Statement/v1"}'
    signature = key.sign(b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload))
    signed = with_payload(envelope, payload).model_copy(
        update={"signatures": (Signature(sig=base64.b64encode(signature).decode()),)}
    )
    with pytest.raises(CertificateError, match="no certificate of Assay"):
        verify(signed, key.public_key())
    with pytest.raises(CertificateError, match="its payload is 'text/plain'"):
        verify(envelope.model_copy(update={"payload_type": "text/plain"}), key.public_key())


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"payloadType":"a","payload":"b","signatures":[]}'])
def test_what_is_no_envelope_is_named(text: bytes) -> None:
    with pytest.raises(CertificateError, match="a DSSE envelope has payloadType, payload and signatures"):
        Envelope.parse(text)


@pytest.mark.parametrize("payload", ["%", "abc", "é"])
def test_a_damaged_payload_is_named(envelope: Envelope, key: Ed25519PrivateKey, payload: str) -> None:
    with pytest.raises(CertificateError, match="no Base64"):
        verify(envelope.model_copy(update={"payload": payload}), key.public_key())


def test_a_key_is_made_for_its_owner_alone(certificate: Certificate, tmp_path: Path) -> None:
    public = make_key(tmp_path / "signing.pem")
    assert public == tmp_path / "signing.pem.pub"
    assert stat.S_IMODE((tmp_path / "signing.pem").stat().st_mode) == 0o600
    private_key, public_key = read_private_key(tmp_path / "signing.pem"), read_public_key(public)
    assert verify(sign(certificate, private_key), public_key) == certificate
    assert b"PRIVATE" not in public.read_bytes()


@pytest.mark.parametrize("taken", ["signing.pem", "signing.pem.pub"])
def test_a_key_is_never_replaced(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    with pytest.raises(CertificateError, match=f"{taken} exists, and a key is not replaced"):
        make_key(tmp_path / "signing.pem")
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "mine"


def test_another_file_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    with pytest.raises(CertificateError, match=r"The key .*key\.pem cannot be read \(No such file"):
        read_private_key(path)
    other = generate_private_key(SECP256R1())
    public_pem = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    private_pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"nothing", public_pem, private_pem):
        path.write_bytes(content)
        with pytest.raises(CertificateError, match="holds no private Ed25519 key"):
            read_private_key(path)
        with pytest.raises(CertificateError, match="holds no public Ed25519 key"):
            read_public_key(path)


def test_a_key_is_named_by_its_bytes() -> None:
    # RFC 8032, 7.1, test 1
    raw = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert key_id(Ed25519PublicKey.from_public_bytes(raw)) == "21fe31dfa154a261"
    assert PAYLOAD_TYPE == "application/vnd.in-toto+json"


def test_a_file_is_read_signed_or_not(certificate: Certificate, envelope: Envelope, tmp_path: Path) -> None:
    certificate.write(tmp_path / "plain.json")
    envelope.write(tmp_path / "signed.json")
    assert read(tmp_path / "plain.json") == certificate
    assert read(tmp_path / "signed.json") == envelope
    (tmp_path / "torn.json").write_text('{"payloadType": "application/vnd.in-toto+json"}')
    with pytest.raises(CertificateError, match=r"torn\.json: This is no signed certificate"):
        read(tmp_path / "torn.json")


def test_what_an_envelope_claims_can_be_shown_without_a_key(certificate: Certificate, envelope: Envelope) -> None:
    assert envelope.unverified() == certificate
    with pytest.raises(CertificateError, match="its payload is 'text/plain'"):
        envelope.model_copy(update={"payload_type": "text/plain"}).unverified()
