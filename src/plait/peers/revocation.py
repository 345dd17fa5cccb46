"""Certificates that count no more, by their fingerprint: the list, and who shows what.

A list is a text with a line for each: SHA-256 fingerprint, name, and what else there is to say.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from plait.machine.text_files import read_text
from plait.peers.federation import check_name, split_address
from plait.peers.pem import Signed

LINE = re.compile(r"(?P<fingerprint>[0-9A-Fa-f:]+)\s+(?P<name>\S+)(\s.*)?")
SHOW_S = 2.0
"""Longest that a peer is waited for that is to show its certificate."""

NOBODY_YET = """\
# Certificates that count no more, a line for each: SHA-256 fingerprint, name, and why.
# `plait cert show FILE` prints the first two. Peers read this file again when it changes.
"""


def fingerprint(signed: Signed) -> str:
    """The SHA-256 of a certificate or a request, as openssl writes it: `AB:CD:...`."""
    return _written(signed.public_bytes(Encoding.DER))


@lru_cache(maxsize=1024)
def fingerprint_of(pem: bytes) -> str:
    """The same of a certificate in PEM."""
    return _written(ssl.PEM_cert_to_DER_cert(pem.decode("ascii")))


def _written(der: bytes) -> str:
    return hashlib.sha256(der).digest().hex(":").upper()


def read_revoked(path: Path | None) -> Mapping[str, str]:
    """Fingerprint -> name of each certificate in a list; nothing where there is none to read.

    Raises:
        ValueError: A line isn't what it should be, or the list that is named is missing.
    """
    if path is None:
        return {}
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, and who is revoked is unknown without it: put the list there, an "
            "empty file if nobody is."
        )
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            found.update([_entry(line.strip(), f"{path}, line {number}")])
    return found


def _entry(line: str, where: str) -> tuple[str, str]:
    parts = LINE.fullmatch(line)
    digits = parts["fingerprint"].replace(":", "").upper() if parts else ""
    if parts is None or len(digits) != 64:
        raise ValueError(
            f"{where} is {line!r:.80}; write the SHA-256 fingerprint and the name, as plait cert "
            "show prints them."
        )
    check_name(parts["name"])
    return ":".join(re.findall("..", digits)), parts["name"]


@dataclass(frozen=True)
class Route:
    """How a server is reached: `host:port`, or `unix:PATH` of this machine, and through a proxy."""

    address: str
    proxied: bool = False

    def connect(self) -> socket.socket:
        """A connection; the proxy is the one that gRPC takes from the environment."""
        if self.address.startswith("unix:"):
            near = socket.socket(socket.AF_UNIX)
            near.settimeout(SHOW_S)
            near.connect(self.address.removeprefix("unix:"))
            return near
        host, port = split_address(self.address)
        named = [os.environ.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy")]
        proxy = next(filter(None, named), None)
        if not self.proxied or proxy is None or proxy_bypass(host):
            return socket.create_connection((host, port), timeout=SHOW_S)
        there = urlsplit(proxy)
        by = HTTPConnection(there.hostname or "", there.port or 80, timeout=SHOW_S)
        by.set_tunnel(host, port)
        by.connect()
        return by.sock


def shown(route: Route, name: str, authority: bytes) -> bytes:
    """The certificate, PEM, that a server shows who calls it by `name`.

    It is one of the authority's, for this name, and the server has its key. That is known before
    the server asks for a certificate of the caller's, so none is needed.

    Raises:
        OSError: Nobody is there, or what is shown is none of these (`ssl.SSLError`).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
    context.load_verify_locations(cadata=authority.decode("ascii", "ignore"))
    with (
        route.connect() as plain,
        context.wrap_socket(plain, server_hostname=name) as secured,
    ):
        der = secured.getpeercert(binary_form=True)
    assert der is not None, "a server without certificate fails the handshake"
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
