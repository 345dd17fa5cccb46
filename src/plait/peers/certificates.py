"""The files of a new federation, with certificates for trying it out where they are wanted.

Their authority's key lies beside the configs. Between organisations each peer makes a key of its
own, and asks for a certificate (signing.py).
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from plait.config import THIS_MACHINE, Config, Machine
from plait.machine.files import sync
from plait.peers.federation import (
    RELAY,
    Federation,
    Limits,
    Member,
    is_loopback,
    split_address,
    toml_lines,
)
from plait.peers.membership import check_members
from plait.peers.pem import Pair
from plait.peers.revocation import NOBODY_YET
from plait.peers.signing import make_authority, make_certificate

METRICS_PORT = 9600
"""Where a peer on a machine of its own shows its figures, on 127.0.0.1."""

PORTS = range(20_000, 32_000)
"""Where a federation on one machine finds its ports."""


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
    keys: bool = True,
) -> Path:
    """Write the files of a new federation: configs, an authority, certificates.

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
        keys: Whether to make each peer's key and certificate, too: for a trial.

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
    (directory / "revoked.txt").write_text(NOBODY_YET, encoding="utf-8")
    path = directory / "federation.toml"
    path.write_text(federation_toml(federation), encoding="utf-8")
    for member, here in zip(members, metrics, strict=True):
        _write_peer(directory / member.name, member, here, machine)
    if relay:
        _write_peer(directory / RELAY, Member(name=RELAY, address=relay), None, THIS_MACHINE)
    for name in [member.name for member in members if keys] + [RELAY] * bool(relay and keys):
        _write_pair(directory / name, make_certificate(authority, name))
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
    lines = ["# The same file at every peer.", *toml_lines(top), "", "[run]"]
    lines += [*toml_lines(run), "", "[limits]", *toml_lines(limits)]
    for peer in federation.peers:
        lines += ["", "[[peers]]", *toml_lines(peer.written())]
    return "\n".join(lines) + "\n"


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    sync(path)
    sync(path.parent)


def _write_pair(folder: Path, pair: Pair) -> None:
    (folder / "cert.pem").write_bytes(pair.certificate)
    write_secret(folder / "key.pem", pair.key)


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


def _write_peer(folder: Path, member: Member, metrics: str | None, machine: Machine) -> None:
    address = member.address or f"127.0.0.1:{free_ports(1)[0]}"
    host, port = split_address(address)
    folder.mkdir()
    lines = {
        "listen": address if is_loopback(host) else f"0.0.0.0:{port}",
        "ca": "../ca.pem",
        "certificate": "cert.pem",
        "key": "key.pem",
        "out": "out",
        **({"metrics": metrics} if metrics else {}),
        "revoked": "../revoked.txt",
    }
    local = {k: v for k, v in vars(machine).items() if v != getattr(THIS_MACHINE, k)}
    table = ["", "[local]", *toml_lines(local)] if local else []
    text = (
        "\n".join([f"# What peer {member.name} has of its own.", *toml_lines(lines), *table]) + "\n"
    )
    (folder / "peer.toml").write_text(text, encoding="utf-8")
