"""A peer's certificate, key and authority: read, and looked at before anything is tried with them.

What TLS says of a bad file is a line of a library's, long after the start and at the other side as
often as not. Here each file is checked by itself and then with the others, and the first thing that
is wrong is said in one line: which file, what is wrong with it, what to do.
"""

from __future__ import annotations

import codecs
import datetime as dt
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from plait.peers.federation import PeerSettings

E = TypeVar("E", bound=x509.ExtensionType)

HANDSHAKE_S = 5.0
CURVES = (ec.SECP256R1, ec.SECP384R1)

NEEDED_USAGES = {
    ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth",
    ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth",
}
"""A peer is a server to its neighbours and a client of theirs."""


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class Papers:
    """What a peer's files hold, each readable.

    Attributes:
        settings: Which files they are.
        chain: Its certificate, and those between it and the authority if the file has any.
        key: Its private key's public half.
        authorities: What `ca` holds.
        now: What time it is on this machine.
    """

    settings: PeerSettings
    chain: Sequence[x509.Certificate]
    key: object
    authorities: Sequence[x509.Certificate]
    now: dt.datetime


def read_credentials(settings: PeerSettings) -> tuple[bytes, Pair]:
    """The authority's certificate, and a peer's own pair, fit for use.

    Raises:
        ValueError: A file is missing, can't be read, is out of date, of another authority, for
            another name or for another use. There is no falling back to an insecure channel.
    """
    check_credentials(settings)
    return _read(settings.ca), Pair(_read(settings.certificate), _read(settings.key))


def check_credentials(settings: PeerSettings) -> dt.datetime:
    """Look at a peer's files.

    Returns:
        Until when its certificate is valid.

    Raises:
        ValueError: With the first thing that is wrong, the file and the remedy.
    """
    for path in (settings.ca, settings.certificate, settings.key):
        if not path.is_file():
            raise ValueError(
                f"{path} is missing. Peers talk over mutual TLS only: put the file there, or name "
                f"another in the peer.toml of {settings.name}."
            )
    papers = Papers(
        settings=settings,
        authorities=_certificates(settings.ca, "the authority's certificate"),
        chain=_certificates(settings.certificate, "the certificate that the authority signed"),
        key=_public_key(settings.key),
        now=dt.datetime.now(dt.UTC),
    )
    for check in CHECKS:
        if wrong := check(papers):
            raise ValueError(wrong)
    return papers.chain[0].not_valid_after_utc


def _read(path: Path) -> bytes:
    """A PEM file, without the byte order mark that some editors put before it."""
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def _certificates(path: Path, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise ValueError(
            f"{path} holds no PEM certificate ({str(error).splitlines()[0]:.80}); put {what} "
            "there, a text that begins with -----BEGIN CERTIFICATE-----."
        ) from None


def _public_key(path: Path) -> object:
    data = _read(path)
    try:
        return serialization.load_pem_private_key(data, None).public_key()
    except TypeError:  # a password is needed
        raise ValueError(
            f"{path} is encrypted, and a peer that starts by itself has nobody to ask for the "
            f"password; decrypt it: openssl pkey -in {path} -out new.pem, then chmod 600 new.pem."
        ) from None
    except Exception as error:  # what OpenSSL makes of the bytes has many types
        raise ValueError(
            f"{path} holds no PEM key ({str(error).splitlines()[0]:.80}); a key in DER is turned "
            f"into PEM by: openssl pkey -inform DER -in {path} -out new.pem."
        ) from None


# -- what can be wrong with files that can be read: each says so, or nothing


def _key_of_another(papers: Papers) -> str:
    if papers.chain[0].public_key() == papers.key:
        return ""
    files = papers.settings
    return (
        f"{files.key} is not the key of {files.certificate}; put the two there that were made "
        "together."
    )


def _another_kind(papers: Papers) -> str:
    key = papers.key
    if isinstance(key, rsa.RSAPublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, CURVES)
    ):
        return ""
    kind = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
    return (
        f"{papers.settings.key} is a key of a kind that gRPC's TLS has no use for "
        f"({kind.removesuffix('PublicKey')}); make one of the kind EC P-256: openssl genpkey "
        "-algorithm EC -pkeyopt ec_paramgen_curve:P-256, and have its certificate signed."
    )


def _out_of_date(papers: Papers) -> str:
    files = papers.settings
    top = _top(papers)
    # An authority that was renewed may be there twice.
    above = [one for one in papers.authorities if _issued(one, top) or one == top]
    above = sorted(above or papers.authorities[:1], key=lambda one: one.not_valid_after_utc)
    for path, one in (
        *((files.certificate, one) for one in papers.chain),
        *((files.ca, one) for one in above[-1:]),
    ):
        begin, end = one.not_valid_before_utc, one.not_valid_after_utc
        if begin <= papers.now <= end:
            continue
        said = f"expired on {end}" if papers.now > end else f"is not valid before {begin}"
        return (
            f"{path} {said}, and this machine's clock says {papers.now:%Y-%m-%d %H:%M} UTC; if the "
            "clock is right have a new one signed, else set the clock."
        )
    return ""


def _another_authority(papers: Papers) -> str:
    top = _top(papers)
    if any(_issued(one, top) or one == top for one in papers.authorities):
        return ""
    files = papers.settings
    trusted = ", ".join(repr(_name(one.subject)) for one in papers.authorities)
    return (
        f"{files.certificate} is signed by {_name(top.issuer)!r}, but not with the key of "
        f"{trusted}, whose certificate {files.ca} is; put that of the "
        "authority that signed it there, the same at every peer."
    )


def _another_name(papers: Papers) -> str:
    names, files = _dns_names(papers.chain[0]), papers.settings
    if files.name in names:
        return ""
    return (
        f"{files.certificate} is for {', '.join(names) or 'no DNS name'}; the peer's name "
        f"{files.name} must be among its subject alternative names: have one signed with it."
    )


def _another_use(papers: Papers) -> str:
    certificate, path = papers.chain[0], papers.settings.certificate
    extended = _extension(certificate, x509.ExtendedKeyUsage)
    found = set(extended) if extended else set(NEEDED_USAGES)
    if ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in found:
        found = set(NEEDED_USAGES)
    missing = [name for usage, name in NEEDED_USAGES.items() if usage not in found]
    if missing:
        return (
            f"{path} may not be used for {' and '.join(missing)}; a peer is both a server and a "
            "client: have one signed with the extended key usages serverAuth and clientAuth."
        )
    usage = _extension(certificate, x509.KeyUsage)
    if usage and not usage.digital_signature:
        return f"{path} may not sign; have one signed with the key usage digitalSignature."
    return ""


def _another_chain(papers: Papers) -> str:
    """What only shows in a handshake, such as an authority that may not sign for this name."""
    files = papers.settings
    wrong = _meets_itself(files.name, *map(_read, (files.ca, files.certificate, files.key)))
    return wrong and (
        f"{files.certificate} makes no connection under {files.ca} ({wrong}); have one signed by "
        "an authority that may sign for it."
    )


def _meets_itself(name: str, ca: bytes, certificate: bytes, key: bytes) -> str:
    """What TLS says where both sides have the same papers; empty if they understand each other."""
    server = grpc.server(ThreadPoolExecutor(1))
    asked = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    own = grpc.ssl_channel_credentials(ca, key, certificate)
    options = [("grpc.ssl_target_name_override", name), ("grpc.enable_http_proxy", 0)]
    try:
        port = server.add_secure_port("127.0.0.1:0", asked)
        server.start()
        with grpc.secure_channel(f"127.0.0.1:{port}", own, options) as channel:
            channel.unary_unary("/")(b"", timeout=HANDSHAKE_S)
    except grpc.RpcError as error:
        # Through it comes if there is no such method; a busy machine may be too slow for a verdict.
        failed = error.code() is grpc.StatusCode.UNAVAILABLE
        return error.details().rpartition("OPENSSL_internal:")[2][-120:] if failed else ""
    except RuntimeError as error:  # a server can't be had with these
        return str(error)[:120]
    finally:
        server.stop(None)
    return ""


CHECKS: tuple[Callable[[Papers], str], ...] = (
    _key_of_another,
    _another_kind,
    _out_of_date,
    _another_name,
    _another_authority,
    _another_use,
    _another_chain,
)


def _top(papers: Papers) -> x509.Certificate:
    """The last certificate of the chain, in whatever order its file has them."""
    top, left = papers.chain[0], [*papers.chain[1:]]
    while above := next((one for one in left if _issued(one, top)), None):
        left.remove(above)
        top = above
    return top


def _issued(above: x509.Certificate, below: x509.Certificate) -> bool:
    try:
        below.verify_directly_issued_by(above)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _name(name: x509.Name) -> str:
    return name.rfc4514_string()[:80]


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _dns_names(certificate: x509.Certificate) -> list[str]:
    names = _extension(certificate, x509.SubjectAlternativeName)
    return names.get_values_for_type(x509.DNSName) if names else []
