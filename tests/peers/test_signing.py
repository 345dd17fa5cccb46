"""Requests for certificates: what is approved, and what is refused with a line that says why."""

from __future__ import annotations

import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from conftest import of_another_version
from plait.peers.pem import certificates_in
from plait.peers.signing import (
    KEY_USAGES,
    approve,
    make_authority,
    make_certificate,
    make_request,
    read_authority,
    read_request,
)

PEM = serialization.Encoding.PEM
AUTHORITY = make_authority("trial", days=100)
ADA = [x509.DNSName("ada")]


def request(names=ADA, common="ada", key=None, *more: x509.ExtensionType) -> bytes:
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = [x509.NameAttribute(x509.NameOID.COMMON_NAME, common)] if common else []
    builder = x509.CertificateSigningRequestBuilder(x509.Name(subject))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in more:
        builder = builder.add_extension(extension, critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(PEM)


def usage(*set_: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in set_ for name in KEY_USAGES})


def forged() -> bytes:
    """A request for another's public key: its signature isn't that key's."""
    mine = x509.load_pem_x509_csr(request()).public_bytes(serialization.Encoding.DER)
    point = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    own = x509.load_der_x509_csr(mine).public_key().public_bytes(*point)
    other = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*point)
    return x509.load_der_x509_csr(mine.replace(own, other)).public_bytes(PEM)


REFUSED = {
    "no request": (lambda: b"nothing", "no request in PEM.*plait cert request"),
    "a certificate": (lambda: make_certificate(AUTHORITY, "ada").certificate, "no request in PEM"),
    "another's key": (forged, "isn't signed with its own key"),
    "Ed25519": (lambda: request(key=ed25519.Ed25519PrivateKey.generate()), "kind Ed25519"),
    "P-521": (lambda: request(key=ec.generate_private_key(ec.SECP521R1())), "kind secp521r1"),
    "no name": (lambda: request([], ""), "is for no name"),
    "no DNS name": (lambda: request([]), "is for ada;"),
    "two names": (lambda: request([*ADA, x509.DNSName("ben")]), "is for ada, ben"),
    "an address, too": (lambda: request([*ADA, x509.RFC822Name("a@b.org")]), "is for ada, a@b.org"),
    "another subject": (lambda: request(common="ben"), "is for ben, ada"),
    "no peer's name": (lambda: request([x509.DNSName("*.org")], "*.org"), r"named '\*\.org'"),
    "an authority": (
        lambda: request(ADA, "ada", None, x509.BasicConstraints(True, None)), "for an authority",
    ),
    "one that signs": (
        lambda: request(ADA, "ada", None, usage("key_cert_sign")), "for an authority",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_request_may_not_be(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as refused:
        approve(make(), AUTHORITY)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key", [None, ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)]
)
def test_a_certificate_is_for_the_requests_key_and_name_and_nothing_else_it_asks_for(key):
    asked = request(ADA, "ada", key, usage("digital_signature", "key_agreement"))
    made = x509.load_pem_x509_certificate(approve(asked, AUTHORITY, days=20))
    made.verify_directly_issued_by(x509.load_pem_x509_certificate(AUTHORITY.certificate))
    get = made.extensions.get_extension_for_class
    assert made.public_key() == x509.load_pem_x509_csr(asked).public_key()
    assert list(get(x509.SubjectAlternativeName).value) == ADA
    assert get(x509.KeyUsage).value == usage("digital_signature")
    assert not get(x509.BasicConstraints).value.ca
    left = made.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert dt.timedelta(days=19) < left < dt.timedelta(days=20)


def test_a_subject_without_a_name_will_do():
    assert read_request(request(common=""))


def test_an_authority_signs_with_its_own_key_and_not_beyond_its_end(tmp_path):
    ca, key = tmp_path / "ca.pem", tmp_path / "ca.key"
    ca.write_bytes(AUTHORITY.certificate)
    key.write_bytes(AUTHORITY.key)
    assert read_authority(ca, key, 90) == AUTHORITY
    with pytest.raises(ValueError, match=r"valid for 99 more days, so --days can't be 101"):
        read_authority(ca, key, 101)
    with pytest.raises(ValueError, match="--days can't be -1"):
        read_authority(ca, key, -1)
    key.write_bytes(make_authority("trial").key)
    with pytest.raises(ValueError, match=r"ca\.key is not the key of .*ca\.pem"):
        read_authority(ca, key, 90)
    peer = make_certificate(AUTHORITY, "ada")
    ca.write_bytes(peer.certificate)
    key.write_bytes(peer.key)
    with pytest.raises(ValueError, match="is no authority"):
        read_authority(ca, key, 90)


def test_a_request_of_ours_is_approved():
    made = make_request("ada")
    assert approve(made.certificate, AUTHORITY)
    with pytest.raises(ValueError, match="peer is named"):
        make_request("Ada")


def test_errors_of_other_types_are_lines_too(tmp_path):
    x400 = x509.UnrecognizedExtension(
        x509.SubjectAlternativeName.oid, bytes.fromhex("3004a3020500")
    )
    with pytest.raises(ValueError, match="UnsupportedGeneralNameType"):
        read_request(request([], "ada", None, x400))
    odd = of_another_version(make_certificate(AUTHORITY, "ada").certificate)
    with pytest.raises(ValueError, match="holds no PEM certificate"):
        certificates_in(odd, tmp_path / "cert.pem", "it")
