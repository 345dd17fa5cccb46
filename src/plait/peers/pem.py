"""PEM files: what is in them, or one line that says what to put there instead."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

E = TypeVar("E", bound=x509.ExtensionType)
Signed = x509.Certificate | x509.CertificateSigningRequest

CURVES = (ec.SECP256R1, ec.SECP384R1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes


@contextmanager
def parsing() -> Iterator[None]:
    """Of the many types of errors that OpenSSL's parsers raise there is one: `ValueError`."""
    try:
        yield
    except (ValueError, InvalidSignature):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error!s:.200}") from error


def read_pem(path: Path) -> bytes:
    """A PEM file, without the byte order mark that some editors put before it."""
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def certificates_in(data: bytes, path: Path, what: str) -> list[x509.Certificate]:
    """The certificates in a file's bytes; a `ValueError` asks for `what` if there are none."""
    try:
        with parsing():
            return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise ValueError(
            f"{path} holds no PEM certificate ({str(error).splitlines()[0]:.80}); put {what} "
            "there, a text that begins with -----BEGIN CERTIFICATE-----."
        ) from None


def private_key(data: bytes, path: Path) -> PrivateKeyTypes:
    """The key in a file's bytes.

    Raises:
        ValueError: There is none, or it takes a password.
    """
    try:
        return serialization.load_pem_private_key(data, None)
    except TypeError:  # a password is needed
        raise ValueError(
            f"{path} is encrypted, and a program that starts by itself has nobody to ask for the "
            f"password; decrypt it: openssl pkey -in {path} -out new.pem, then chmod 600 new.pem."
        ) from None
    except Exception as error:  # what OpenSSL makes of the bytes has many types
        raise ValueError(
            f"{path} holds no PEM key ({str(error).splitlines()[0]:.80}); a key in DER is turned "
            f"into PEM by: openssl pkey -inform DER -in {path} -out new.pem."
        ) from None


def useless_kind(key: object) -> str:
    """The kind of a public key that gRPC's TLS has no use for; empty for the others."""
    if isinstance(key, rsa.RSAPublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, CURVES)
    ):
        return ""
    kind = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
    return kind.removesuffix("PublicKey")


def issued(above: x509.Certificate, below: x509.Certificate) -> bool:
    """Whether one certificate vouches for another."""
    try:
        below.verify_directly_issued_by(above)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


@parsing()
def extension(certificate: Signed, kind: type[E]) -> E | None:
    """An extension of a certificate or a request; None if it has none of the kind.

    Raises:
        ValueError: They can't be read.
    """
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def dns_names(certificate: Signed) -> list[str]:
    """The DNS names among its subject alternative names."""
    names = extension(certificate, x509.SubjectAlternativeName)
    return names.get_values_for_type(x509.DNSName) if names else []
