"""A peer's certificate, key and authority: read, and looked at before anything is tried with them.

What TLS says of a bad file is a line of a library's, long after the start and at the other side as
often as not. Here each file is checked by itself and then with the others, and the first thing that
is wrong is said in one line: which file, what is wrong with it, what to do.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from plait.peers.federation import PeerSettings
from plait.peers.pem import (
    Pair,
    certificates_in,
    dns_names,
    extension,
    issued,
    private_key,
    read_pem,
    useless_kind,
)

HANDSHAKE_S = 5.0

NEEDED_USAGES = {
    ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth",
    ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth",
}
"""A peer is a server to its neighbours and a client of theirs."""


@dataclass(frozen=True)
class Credentials:
    """What a peer shows and whom it trusts, fit for use.

    Attributes:
        authority: What `ca` holds, PEM.
        own: Its certificate and key.
        expires: Until when its certificate and the authority's are valid, `certificate` and
            `authority`.
    """

    authority: bytes
    own: Pair
    expires: Mapping[str, dt.datetime]


@dataclass(frozen=True)
class Papers:
    """What a peer's files hold, each readable.

    Attributes:
        settings: Which files they are.
        authority: What `ca` holds, PEM.
        own: Its certificate and key.
        chain: Its certificate, and those between it and the authority if the file has any.
        key: Its private key's public half.
        authorities: The certificates in `authority`.
        now: What time it is on this machine.
    """

    settings: PeerSettings
    authority: bytes
    own: Pair
    chain: Sequence[x509.Certificate]
    key: object
    authorities: Sequence[x509.Certificate]
    now: dt.datetime


def read_credentials(settings: PeerSettings) -> Credentials:
    """A peer's files, read once and looked at.

    Raises:
        ValueError: A file is missing, can't be read, is out of date, of another authority, for
            another name or for another use; with the first thing that is wrong, the file and the
            remedy. There is no falling back to an insecure channel.
    """
    for path in (settings.ca, settings.certificate, settings.key):
        if not path.is_file():
            raise ValueError(
                f"{path} is missing. Peers talk over mutual TLS only: put the file there, or name "
                f"another in the peer.toml of {settings.name}."
            )
    authority, own = (
        read_pem(settings.ca),
        Pair(*map(read_pem, (settings.certificate, settings.key))),
    )
    papers = Papers(
        settings=settings,
        authority=authority,
        own=own,
        authorities=certificates_in(authority, settings.ca, "the authority's certificate"),
        chain=certificates_in(
            own.certificate, settings.certificate, "the certificate that the authority signed"
        ),
        key=private_key(own.key, settings.key).public_key(),
        now=dt.datetime.now(dt.UTC),
    )
    for check in CHECKS:
        if wrong := check(papers):
            raise ValueError(wrong)
    ends = {
        "certificate": min(one.not_valid_after_utc for one in papers.chain),
        "authority": _above(papers).not_valid_after_utc,
    }
    return Credentials(authority, own, ends)


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
    kind = useless_kind(papers.key)
    return kind and (
        f"{papers.settings.key} is a key of a kind that gRPC's TLS has no use for ({kind}); make "
        "one with plait cert request, and have its certificate signed."
    )


def _out_of_date(papers: Papers) -> str:
    files = papers.settings
    for path, one in (
        *((files.certificate, one) for one in papers.chain),
        (files.ca, _above(papers)),
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
    if any(issued(one, top) or one == top for one in papers.authorities):
        return ""
    files = papers.settings
    trusted = ", ".join(repr(_name(one.subject)) for one in papers.authorities)
    return (
        f"{files.certificate} is signed by {_name(top.issuer)!r}, but not with the key of "
        f"{trusted}, whose certificate {files.ca} is; put that of the "
        "authority that signed it there, the same at every peer."
    )


def _another_name(papers: Papers) -> str:
    names, files = dns_names(papers.chain[0]), papers.settings
    if files.name in names:
        return ""
    return (
        f"{files.certificate} is for {', '.join(names) or 'no DNS name'}; the peer's name "
        f"{files.name} must be among its subject alternative names: have one signed with it."
    )


def _another_use(papers: Papers) -> str:
    certificate, path = papers.chain[0], papers.settings.certificate
    extended = extension(certificate, x509.ExtendedKeyUsage)
    found = set(extended) if extended else set(NEEDED_USAGES)
    if ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in found:
        found = set(NEEDED_USAGES)
    missing = [name for usage, name in NEEDED_USAGES.items() if usage not in found]
    if missing:
        return (
            f"{path} may not be used for {' and '.join(missing)}; a peer is both a server and a "
            "client: have one signed with the extended key usages serverAuth and clientAuth."
        )
    usage = extension(certificate, x509.KeyUsage)
    if usage and not usage.digital_signature:
        return f"{path} may not sign; have one signed with the key usage digitalSignature."
    return ""


def _another_chain(papers: Papers) -> str:
    """What only shows in a handshake, such as an authority that may not sign for this name."""
    files = papers.settings
    wrong = _meets_itself(files.name, papers.authority, papers.own)
    return wrong and (
        f"{files.certificate} makes no connection under {files.ca} ({wrong}); have one signed by "
        "an authority that may sign for it."
    )


def _meets_itself(name: str, ca: bytes, pair: Pair) -> str:
    """What TLS says where both sides have the same papers; empty if they understand each other."""
    server = grpc.server(ThreadPoolExecutor(1))
    asked = grpc.ssl_server_credentials([(pair.key, pair.certificate)], ca, True)
    own = grpc.ssl_channel_credentials(ca, pair.key, pair.certificate)
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
    while above := next((one for one in left if issued(one, top)), None):
        left.remove(above)
        top = above
    return top


def _above(papers: Papers) -> x509.Certificate:
    """The authority's certificate that vouches for the chain, the first one if none does.

    One that was renewed may be there twice.
    """
    top = _top(papers)
    above = [one for one in papers.authorities if issued(one, top) or one == top]
    return max(above or papers.authorities[:1], key=lambda one: one.not_valid_after_utc)


def _name(name: x509.Name) -> str:
    return name.rfc4514_string()[:80]
