"""What a peer needs before it is started, and what to do about what it has not.

`plait peer --check` does this for a peer, `plait doctor --federation` for all whose files are here.
"""

from __future__ import annotations

import socket
import ssl
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.cli.doctor_checks import Finding, room
from plait.machine.extras import PEER_PACKAGES, installed
from plait.presets import as_settings

if TYPE_CHECKING:
    from plait.peers.federation import Federation, Member, PeerSettings
    from plait.peers.membership import Members
    from plait.peers.transport import GrpcTransport

NEIGHBOUR_S = 2.0
CLOCKS_S = 60.0
"""Certificates begin and end by a peer's own clock, and logs are compared."""


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
    """A peer's certificate, key, ports, disk, rows and neighbours, as its files name them.

    Neighbours that have not been started are a note; the model is only loaded to compare it.
    """
    about = file.resolve().parent.name
    if not all(map(installed, PEER_PACKAGES)):
        yield Finding(about, "bad", f"{file} can't be checked", "pip install 'plait[peer]'")
        return
    from plait.peers.federation import load_peer
    from plait.peers.membership import load_members

    shared = file.resolve().parents[1] / "federation.toml"
    try:
        own = load_peer(shared, about)
        yield _papers(about, own)
        yield _key(about, own.key)
        for what, address in (("listen", own.listen), ("metrics", own.metrics)):
            if address is not None:
                yield _listen(about, address, what)
        yield room(about, own.out, "make room, or change `out` in peer.toml")
        members = load_members(shared, own)
        yield _rows(about, members.newest, own)
        yield from _others(about, members, own)
    except (OSError, ValueError) as error:
        yield Finding(about, "bad", f"{error}", "mend it, or write it anew")


def _papers(about: str, own: PeerSettings) -> Finding:
    """A peer's certificate, key and authority, as it looks at them itself when it starts."""
    from plait.peers.credentials import read_credentials
    from plait.peers.keyring import SOON
    from plait.peers.pem import certificates_in
    from plait.peers.revocation import fingerprint, read_revoked

    try:
        read = read_credentials(own)
        shown = certificates_in(read.own.certificate, own.certificate, "a certificate")[0]
        if fingerprint(shown) in read_revoked(own.revoked):
            text = f"{own.certificate} is on the list {own.revoked}"
            return Finding(about, "bad", text, "ask for a new one: plait cert request")
        what, end = min(read.expires.items(), key=lambda item: item[1])
    except ValueError as error:
        found, _, remedy = str(error).partition("; ")
        return Finding(about, "bad", found, remedy)
    text = f"the {what} is valid until {end:%Y-%m-%d}"
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


def _others(about: str, members: Members, own: PeerSettings) -> Iterator[Finding]:
    """Each other peer that is there: reached, known by its certificate, on time, of one mind."""
    from plait.peers.status import asking

    others = [member for member in members.newest.peers if member.name != about]
    try:
        with asking(members, own) as transport, ThreadPoolExecutor(len(others)) as pool:
            met = list(pool.map(partial(_meet, about, own, transport), others))
    except ValueError:
        return  # its own papers are unfit, and that was said
    for one in met:
        yield from one.found
    if there := [one for one in met if one.settings is not None]:
        yield from _agreed(about, members.newest, own, there)


@dataclass
class Met:
    """What was found out about another peer: findings, and its settings if it told them."""

    name: str
    found: list[Finding]
    settings: dict[str, Any] | None = None


def _meet(about: str, own: PeerSettings, transport: GrpcTransport, member: Member) -> Met:
    """Try another peer, from its address to its clock; before it is started there is none."""
    from plait.peers.codec import Question
    from plait.peers.mailbox import OBSERVER
    from plait.peers.refusals import Refused

    name, where = member.name, f"{member.name} at {member.address}"
    found = [_shown(about, own, transport, member)]
    if found[0].mark != "ok":
        return Met(name, found)
    try:
        begin = time.time()
        facts = transport.ask(
            name, Question(kind="status", asker_round=OBSERVER), NEIGHBOUR_S
        ).facts
        found.append(_clock(about, name, facts.get("time"), (begin + time.time()) / 2))
        settings = transport.ask(name, Question(kind="settings"), NEIGHBOUR_S).facts
    except Refused as refused:
        fix = (
            f"if it isn't just stopping, have its operator compare ca.pem, federation.toml, "
            f"revoked.txt, plait's version and the clock with what {about} has"
        )
        return Met(name, [*found, Finding(about, "bad", f"{where} has none of it: {refused}", fix)])
    return Met(name, found, settings)


def _shown(about: str, own: PeerSettings, transport: GrpcTransport, member: Member) -> Finding:
    """The address leads to somebody who has a certificate of that name."""
    from plait.peers.refusals import Refused
    from plait.peers.revocation import fingerprint_of, read_revoked

    where = f"{member.name} at {member.address or 'a stream of its own'}"
    try:
        pem = transport.shows(member.name)
    except socket.gaierror as error:
        fix = "mend its address in federation.toml"
        return Finding(about, "bad", f"{where} can't be found: {error.strerror}", fix)
    except ssl.SSLError as error:
        if isinstance(error, ssl.SSLEOFError):  # it hung up: whoever passes calls on found nobody
            return _absent(about, where, error)
        text = f"{where} shows no good certificate: {getattr(error, 'verify_message', error)}"
        fix = "have its operator run plait peer --check, and compare ca.pem, address and clock"
        return Finding(about, "bad", text, fix)
    except (OSError, Refused) as error:
        return _absent(about, where, error)
    if fingerprint_of(pem) in read_revoked(own.revoked):
        text = f"{where} shows a certificate that is revoked"
        return Finding(about, "bad", text, "it needs a new one: plait cert request")
    return Finding(about, "ok", f"{where} answers, with its certificate")


def _absent(about: str, where: str, error: Exception) -> Finding:
    fix = "none is needed if it hasn't been started; else let its port through"
    return Finding(about, "note", f"{where} is not there yet: {error}", fix)


def _clock(about: str, name: str, theirs: object, here: float) -> Finding:
    """How far two machines' clocks are apart."""
    if not isinstance(theirs, int | float) or not abs(theirs - here) < 1e9:
        return Finding(about, "note", f"{name} doesn't say what time it is", "update plait there")
    text = (
        f"the clock of {name} is {abs(theirs - here):.0f} s {'ahead' if theirs > here else 'back'}"
    )
    if abs(theirs - here) > CLOCKS_S:
        return Finding(about, "bad", text, "have both machines set their clocks by NTP")
    return Finding(about, "ok", text)


def _agreed(
    about: str, federation: Federation, own: PeerSettings, there: list[Met]
) -> Iterator[Finding]:
    """Whether peers have the same settings, frozen weights, tokenizer, template and labels."""
    from plait.peers.exchange import differences
    from plait.peers.process import as_read

    ours = as_read(federation, own).shared()
    for one in there:
        if wrong := differences(ours, one.settings or {}, one.name):
            fix = "all need the same federation.toml, frozen model, tokenizer and rows in common"
            yield Finding(about, "bad", f"{one.name} has another setting: {wrong}", fix)
        else:
            text = f"{one.name} has the same settings, frozen weights ({ours['weights_hash']}), "
            yield Finding(about, "ok", text + "tokenizer and labels")
