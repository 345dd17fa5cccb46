"""`plait cert`: a certificate is asked for, approved, shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from plait.cli.arguments import parse
from plait.machine.extras import need


@dataclass(frozen=True, kw_only=True)
class Cert:
    """Ask for a peer's certificate, approve a request for one, or show one of them.

    `plait cert request --name ada --out DIR` makes a key, which stays there, and a request.
    `plait cert approve REQUEST --ca ca.pem --ca-key ca.key` makes a certificate of a request.
    `plait cert show FILE` prints the fingerprint and name of a certificate or a request.
    """

    action: tyro.conf.Positional[Literal["request", "approve", "show"]]
    """What to do."""
    file: tyro.conf.Positional[Path | None] = None
    """The request to approve, or what to show."""
    name: str | None = None
    """Request: the peer's name."""
    out: Path | None = None
    """Request: a folder for key.pem and request.pem. Approve: the certificate, cert.pem beside the
    request if not given."""
    ca: Path | None = None
    """Approve: the authority's certificate."""
    ca_key: Path | None = None
    """Approve: the authority's key."""
    days: float = 365
    """Approve: how long the certificate is valid."""


def cert(args: list[str]) -> None:
    """`plait cert`.

    Raises:
        ValueError: An option is missing, or the request is refused.
        OSError: A file can't be read or written.
    """
    given = parse(Cert, "cert", args)
    needed, act = ACTIONS[given.action]
    if missing := [one for one in needed if getattr(given, one) is None]:
        words = " and ".join("--" + one.replace("_", "-") for one in missing if one != "file")
        raise ValueError(f"plait cert {given.action} needs {words or 'a file'}.")
    need("cryptography", "peer", "A certificate")
    act(given)


def _request(given: Cert) -> None:
    from plait.peers.certificates import write_secret
    from plait.peers.signing import make_request

    assert given.name is not None
    assert given.out is not None
    made = make_request(given.name)
    key, request = given.out / "key.pem", given.out / "request.pem"
    _check_new(key, "and move what is in it over the old files once the certificate is there, too")
    given.out.mkdir(parents=True, exist_ok=True)
    write_secret(key, made.key)
    request.write_bytes(made.certificate)
    print(
        f"{_line(request)}\n"
        f"{key}: the key, which stays where it is\n"
        f"{request}: for whoever approves it; tell them the fingerprint above by another way"
    )


def _approve(given: Cert) -> None:
    from plait.peers.pem import read_pem
    from plait.peers.signing import approve, read_authority

    assert given.file is not None
    assert given.ca is not None
    assert given.ca_key is not None
    out = given.out or given.file.with_name("cert.pem")
    _check_new(out, "or move that file away")
    authority = read_authority(given.ca, given.ca_key, given.days)
    certificate = approve(read_pem(given.file), authority, given.days)
    print(f"{_line(given.file)}: the request; whoever sent it must know this fingerprint")
    out.write_bytes(certificate)
    print(f"{_line(out)}: the certificate, {out}")


def _show(given: Cert) -> None:
    assert given.file is not None
    print(_line(given.file))


def _check_new(path: Path, otherwise: str) -> None:
    if path.exists():
        raise ValueError(f"{path} is there already; take another --out, {otherwise}.")


def _line(path: Path) -> str:
    """Fingerprint and name, as a list of revoked certificates begins a line."""
    from plait.peers.pem import certificates_in, dns_names, read_pem
    from plait.peers.revocation import fingerprint
    from plait.peers.signing import named_in, read_request

    data = read_pem(path)
    if b"CERTIFICATE REQUEST" in data:
        request = read_request(data)
        return f"{fingerprint(request)} {named_in(request)}"
    one = certificates_in(data, path, "a certificate or a request")[0]
    names = dns_names(one) or [one.subject.rfc4514_string()]
    return f"{fingerprint(one)} {' '.join(names)} until {one.not_valid_after_utc:%Y-%m-%d}"


ACTIONS: dict[str, tuple[tuple[str, ...], Callable[[Cert], None]]] = {
    "request": (("name", "out"), _request),
    "approve": (("file", "ca", "ca_key"), _approve),
    "show": (("file",), _show),
}
