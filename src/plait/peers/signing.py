"""Certificates and the requests for them: made, looked at, signed.

A peer's key is made where the peer runs and never leaves it; what travels is a request, and the
certificate that whoever has the authority's key makes of it. Any other authority will do as well:
what a peer needs is a certificate with its name among the subject alternative names.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from plait.peers.federation import check_name
from plait.peers.pem import (
    Pair,
    certificates_in,
    extension,
    parsing,
    private_key,
    read_pem,
    useless_kind,
)

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PEM = serialization.Encoding.PEM

DAY = dt.timedelta(days=1)
KEY_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def make_authority(name: str, days: float = 3650) -> Pair:
    """A certificate authority for `days`."""
    key = _new_key()
    subject = _named(f"{name} test authority")
    builder = _builder(subject, subject, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    return Pair(builder.sign(key, hashes.SHA256()).public_bytes(PEM), _written(key))


def make_certificate(authority: Pair, name: str, days: float = 365) -> Pair:
    """A certificate for a peer, and its key; expired if `days` is negative."""
    request = make_request(name)
    return Pair(approve(request.certificate, authority, days), request.key)


def make_request(name: str) -> Pair:
    """A request for a certificate of the peer `name`, and the new key that it is for.

    Raises:
        ValueError: No peer can be named so.
    """
    check_name(name)
    key = _new_key()
    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    builder = x509.CertificateSigningRequestBuilder(_named(name)).add_extension(names, False)
    return Pair(builder.sign(key, hashes.SHA256()).public_bytes(PEM), _written(key))


def approve(request: bytes, authority: Pair, days: float = 365) -> bytes:
    """The certificate that a request asks for: for a peer, which is a server and a client.

    Nothing of the request is taken over but its name and its public key.

    Args:
        request: PEM.
        authority: Who signs (`read_authority`).
        days: From now on.

    Raises:
        ValueError: The request is refused, or the authority ends before.
    """
    asked = read_request(request)
    name, key = named_in(asked), asked.public_key()
    signer = x509.load_pem_x509_certificate(authority.certificate)
    signer_key = serialization.load_pem_private_key(authority.key, None)
    assert isinstance(signer_key, Key)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(_named(name), signer.subject, key, days)
    for one, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName([x509.DNSName(name)]), False),
        (_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage(both), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()), False),
    ):
        builder = builder.add_extension(one, critical=critical)
    return builder.sign(signer_key, hashes.SHA256()).public_bytes(PEM)


@parsing()
def read_request(data: bytes) -> x509.CertificateSigningRequest:
    """A request that whoever made it has the key of, and that asks for a peer's certificate.

    Raises:
        ValueError: It is none, or asks for something else; the message says what.
    """
    try:
        with parsing():
            request = x509.load_pem_x509_csr(data)
    except ValueError:
        raise ValueError(
            "This is no request in PEM; have one made with plait cert request, a text that begins "
            "with -----BEGIN CERTIFICATE REQUEST-----."
        ) from None
    if not request.is_signature_valid:
        raise ValueError("The request isn't signed with its own key: have it made anew.")
    if kind := useless_kind(request.public_key()):
        raise ValueError(f"gRPC's TLS has no use for a key of the kind {kind}; take EC P-256.")
    constraints = extension(request, x509.BasicConstraints)
    usage = extension(request, x509.KeyUsage)
    if (constraints and constraints.ca) or (usage and (usage.key_cert_sign or usage.crl_sign)):
        raise ValueError("The request is for an authority, not for a peer: refuse it.")
    named_in(request)
    return request


def named_in(request: x509.CertificateSigningRequest) -> str:
    """The one name that a request is for.

    Raises:
        ValueError: It is for none, for several, or for what can't be a peer.
    """
    names = [*(extension(request, x509.SubjectAlternativeName) or ())]
    common = [str(one.value) for one in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    name = str(names[0].value) if names else ""
    if names != [x509.DNSName(name)] or common not in ([], [name]):
        said = ", ".join(dict.fromkeys([*common, *(str(one.value) for one in names)])) or "no name"
        raise ValueError(
            f"The request is for {said:.200}; a peer's has one DNS name, its own, and nothing else."
        )
    check_name(name)
    return name


def read_authority(certificate: Path, key: Path, days: float) -> Pair:
    """An authority that can sign for `days`.

    Raises:
        ValueError: A file holds none, the two don't belong together, it may not sign or ends
            before; with the remedy.
    """
    pair = Pair(read_pem(certificate), read_pem(key))
    signer = certificates_in(pair.certificate, certificate, "the authority's certificate")[0]
    if private_key(pair.key, key).public_key() != signer.public_key():
        raise ValueError(f"{key} is not the key of {certificate}; name the two of one authority.")
    constraints = extension(signer, x509.BasicConstraints)
    if not constraints or not constraints.ca or useless_kind(signer.public_key()):
        raise ValueError(f"{certificate} is no authority with a key of EC or RSA; name another.")
    left = (signer.not_valid_after_utc - dt.datetime.now(dt.UTC)) / DAY
    if not 0 < days < left:
        raise ValueError(
            f"{certificate} is valid for {max(0, int(left))} more days, so --days can't be "
            f"{days:g}; give fewer, or have the authority renewed."
        )
    return pair


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _written(key: Key) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: CertificatePublicKeyTypes, days: float
) -> x509.CertificateBuilder:
    end = dt.datetime.now(dt.UTC) + days * DAY
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # Clocks differ: valid from yesterday on, or from the day before its end.
        .not_valid_before(min(dt.datetime.now(dt.UTC), end) - DAY)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*usages: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in usages for usage in KEY_USAGES})
