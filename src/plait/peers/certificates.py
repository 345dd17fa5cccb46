"""Certificates for trying a federation out, and the files of a new one.

The authority made here is for tests and first steps: its key lies beside the configs. A federation
between organisations brings its own authority, and each peer makes its own key; any certificate
will do that has the peer's name as a DNS name among its subject alternative names.
"""

from __future__ import annotations

import datetime as dt
import os
import random
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from plait.config import THIS_MACHINE, Config, Machine
from plait.peers.credentials import Pair
from plait.peers.federation import (
    RELAY,
    Federation,
    Limits,
    Member,
    is_loopback,
    split_address,
)
from plait.peers.membership import check_members

METRICS_PORT = 9600
"""Where a peer on a machine of its own shows its figures, on 127.0.0.1."""

PORTS = range(20_000, 32_000)
"""Where a federation on one machine finds its ports."""

DAY = dt.timedelta(days=1)
KEY_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def make_authority(name: str, days: float = 3650) -> Pair:
    """A certificate authority for `days`."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _named(f"{name} test authority")
    builder = _builder(subject, subject, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    return _signed(builder, key, key)


def make_certificate(authority: Pair, name: str, days: float = 365) -> Pair:
    """A certificate for a peer, which is a server and a client; expired if `days` is negative."""
    signer = x509.load_pem_x509_certificate(authority.certificate)
    signer_key = serialization.load_pem_private_key(authority.key, None)
    assert isinstance(signer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(_named(name), signer.subject, key.public_key(), days)
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName([x509.DNSName(name)]), False),
        (_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage(both), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()), False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return _signed(builder, key, signer_key)


def init_federation(
    directory: Path,
    names: Sequence[str],
    config: Config,
    *,
    addresses: Sequence[str] | None = None,
    relay: str | None = None,
    federation_id: str = "trial",
    labels: Sequence[str] = (),
    limits: Limits | None = None,
    machine: Machine = THIS_MACHINE,
) -> Path:
    """Write the files of a new federation: configs, a test CA, certificates.

    Without addresses all peers are on this machine. With them each listens on its address's port,
    on all of its machine's interfaces unless the address is of the machine itself. Peers of one
    host show their figures on ports of their own.

    Args:
        directory: A new or empty folder.
        names: The peers.
        config: The settings of the run; the number of clients becomes that of the peers.
        addresses: `host:port` for each peer, empty for one that can't be called; free ports of
            this machine if not given.
        relay: `host:port` of a relay, which gets files as a peer does.
        federation_id: Its name.
        labels: The classes, when peers bring data of their own.
        limits: Sizes and times.
        machine: Where and how fast each peer computes; it may change its own.

    Returns:
        The path of `federation.toml`.

    Raises:
        ValueError: The folder is in use, a name is none, or two neighbours can't be called.
        OSError: The folder can't be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is not an empty folder; take another.")
    if addresses is None:
        local = [f"127.0.0.1:{port}" for port in free_ports(2 * len(names))]
        addresses, metrics = local[::2], local[1::2]
    else:
        metrics = metrics_addresses(addresses)
    members = tuple(
        Member(name=n, address=a, reachable=bool(a)) for n, a in zip(names, addresses, strict=True)
    )
    values = config.to_json() | {"clients": len(names)}
    federation = Federation(
        id=federation_id,
        config=Config.from_json(values),
        peers=members,
        relay=relay,
        limits=limits or Limits(),
        labels=tuple(labels) or None,
    )
    check_members(federation)
    directory.mkdir(parents=True, exist_ok=True)
    authority = make_authority(federation_id)
    (directory / "ca.pem").write_bytes(authority.certificate)
    write_secret(directory / "ca.key", authority.key)
    path = directory / "federation.toml"
    path.write_text(federation_toml(federation), encoding="utf-8")
    for member, here in zip(members, metrics, strict=True):
        _write_peer(directory / member.name, member, authority, here, machine)
    if relay:
        place = Member(name=RELAY, address=relay)
        _write_peer(directory / RELAY, place, authority, None, THIS_MACHINE)
    return path


def metrics_addresses(addresses: Sequence[str]) -> list[str]:
    """Where each peer shows its figures: on a port that no other of its host uses.

    Example:
        >>> metrics_addresses(["a:7600", "b:7600", "a:7601"])
        ['127.0.0.1:9600', '127.0.0.1:9600', '127.0.0.1:9601']
    """
    taken = {split_address(address) for address in addresses if address}
    found = []
    for address in addresses:
        host, port = split_address(address)[0] if address else "", METRICS_PORT
        while (host, port) in taken:
            port += 1
        taken.add((host, port))
        found.append(f"127.0.0.1:{port}")
    return found


def federation_toml(federation: Federation) -> str:
    """The text of `federation.toml`; settings that have their default are left out."""
    config, default = federation.config.to_json(), Config().to_json()
    run = {k: v for k, v in config.items() if v != default[k] and k != "clients"}
    limits = {k: v for k, v in vars(federation.limits).items() if v is not None}
    top = {"federation": federation.id, "relay": federation.relay, "labels": federation.labels}
    top = {key: value for key, value in top.items() if value}
    lines = ["# The same file at every peer.", *_lines(top), "", "[run]"]
    lines += [*_lines(run), "", "[limits]", *_lines(limits)]
    for peer in federation.peers:
        kept = {k: v for k, v in vars(peer).items() if v != getattr(Member, k, None)}
        lines += ["", "[[peers]]", *_lines(kept)]
    return "\n".join(lines) + "\n"


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def free_ports(count: int) -> list[int]:
    """Ports on this machine that nobody listens on now.

    They are below those that a system gives to outgoing connections: one of these might be taken
    before anybody listens.
    """
    ports: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(ports) == count:
            break
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


def _write_peer(
    folder: Path, member: Member, authority: Pair, metrics: str | None, machine: Machine
) -> None:
    pair = make_certificate(authority, member.name)
    address = member.address or f"127.0.0.1:{free_ports(1)[0]}"
    host, port = split_address(address)
    folder.mkdir()
    (folder / "cert.pem").write_bytes(pair.certificate)
    write_secret(folder / "key.pem", pair.key)
    lines = {
        "listen": address if is_loopback(host) else f"0.0.0.0:{port}",
        "ca": "../ca.pem",
        "certificate": "cert.pem",
        "key": "key.pem",
        "out": "out",
        **({"metrics": metrics} if metrics else {}),
    }
    local = {k: v for k, v in vars(machine).items() if v != getattr(THIS_MACHINE, k)}
    table = ["", "[local]", *_lines(local)] if local else []
    text = "\n".join([f"# What peer {member.name} has of its own.", *_lines(lines), *table]) + "\n"
    (folder / "peer.toml").write_text(text, encoding="utf-8")


def _lines(values: Mapping[str, object]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in values.items()]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
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


def _signed(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    signer_key: ec.EllipticCurvePrivateKey,
) -> Pair:
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    certificate = builder.sign(signer_key, hashes.SHA256())
    return Pair(
        certificate.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain),
    )
