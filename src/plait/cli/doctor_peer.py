"""What a peer of a federation needs, and what to do about what it has not: `plait doctor`."""

from __future__ import annotations

import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from plait.cli.doctor_checks import Finding, room
from plait.machine.extras import PEER_PACKAGES, installed
from plait.presets import as_settings

if TYPE_CHECKING:
    from plait.peers.federation import Federation, Member, PeerSettings

NEIGHBOUR_S = 2.0
SOON = timedelta(days=30)


def examine_peers(folder: Path) -> Iterator[Finding]:
    """All checks of a peer's folder, or of one with several.

    Raises:
        ValueError: There is no peer.toml.
    """
    files = sorted([*folder.glob("peer.toml"), *folder.glob("*/peer.toml")])
    if not files:
        raise ValueError(
            f"{folder} has no peer.toml, nor has a folder in it; name the one with federation.toml."
        )
    for file in files:
        yield from check_peer(file)


def check_peer(file: Path) -> Iterator[Finding]:
    """A peer's certificate, key, ports, disk, rows and neighbours, as its files name them."""
    about = file.resolve().parent.name
    if not all(map(installed, PEER_PACKAGES)):
        yield Finding(about, "bad", f"{file} can't be checked", "pip install 'plait[peer]'")
        return
    from plait.peers.federation import load_federation, load_peer

    shared = file.resolve().parents[1] / "federation.toml"
    try:
        own = load_peer(shared, about)
        yield _papers(about, own)
        yield _key(about, own.key)
        for what, address in (("listen", own.listen), ("metrics", own.metrics)):
            if address is not None:
                yield _listen(about, address, what)
        yield room(about, own.out, "make room, or change `out` in peer.toml")
        federation = load_federation(shared)
        yield _rows(about, federation, own)
        others = [member for member in federation.peers if member.name != about]
        with ThreadPoolExecutor(len(others)) as pool:
            yield from pool.map(partial(_neighbour, about), others)
    except (OSError, ValueError) as error:
        yield Finding(about, "bad", f"{error}", "mend it, or write it anew")


def _papers(about: str, own: PeerSettings) -> Finding:
    """A peer's certificate, key and authority, as it looks at them itself when it starts."""
    from plait.peers.credentials import check_credentials

    try:
        end = check_credentials(own)
    except ValueError as error:
        found, _, remedy = str(error).partition("; ")
        return Finding(about, "bad", found, remedy)
    text = f"{own.certificate.name} is valid until {end:%Y-%m-%d}"
    if end - datetime.now(UTC) < SOON:
        return Finding(about, "note", text, "have a new one signed before that day")
    return Finding(about, "ok", text)


def _key(about: str, file: Path) -> Finding:
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        return Finding(about, "bad", f"others can read {file}", f"chmod 600 {file}")
    return Finding(about, "ok", f"{file.name} is its owner's alone")


def _listen(about: str, address: str, what: str) -> Finding:
    from plait.peers.federation import split_address

    host, port = split_address(address)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        text = f"{address} can't be listened on: {error}"
        return Finding(about, "bad", text, f"stop what uses it, or change `{what}`")
    return Finding(about, "ok", f"{address} is free")


def _rows(about: str, federation: Federation, own: PeerSettings) -> Finding:
    """The rows that a peer brings can be read."""
    from plait.data.sources import check_files
    from plait.peers.process import own_task

    config = own.apply(federation.config)
    try:
        task = own_task(federation, own)
        check_files(config)
    except (OSError, ValueError) as error:
        return Finding(
            about, "bad", as_settings(str(error)), "mend [local] of peer.toml, or the file"
        )
    if task is None:
        return Finding(about, "ok", f"rows: its share of the task {config.task}")
    text = f"{len(task.train)} rows to train on, {len(task.test)} to judge by"
    return Finding(about, "ok", text)


def _neighbour(about: str, member: Member) -> Finding:
    """Another peer can be reached; before it is started nobody can."""
    from plait.peers.federation import split_address

    where = f"{member.name} at {member.address}"
    try:
        socket.create_connection(split_address(member.address), timeout=NEIGHBOUR_S).close()
    except socket.gaierror as error:
        fix = "mend its address in federation.toml"
        return Finding(about, "bad", f"{where} can't be found: {error.strerror}", fix)
    except OSError as error:
        fix = "none is needed if it hasn't been started; else let its port through"
        return Finding(about, "note", f"{where} doesn't answer: {error}", fix)
    return Finding(about, "ok", f"{where} answers")
