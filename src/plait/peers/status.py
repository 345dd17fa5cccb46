"""Who is alive in a federation: asked as one of its peers, over the same connections.

A process of its own holds no data and no model; it has the peer's certificate, which is what
lets it ask.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.factors import Slot
from plait.lora import Layout
from plait.peers.changes import Rows
from plait.peers.codec import Answer, Header, Message, Question
from plait.peers.federation import (
    Member,
    PeerSettings,
    load_federation,
    load_peer,
)
from plait.peers.mailbox import OBSERVER
from plait.peers.membership import Members, load_members
from plait.peers.refusals import Reason, Refused
from plait.peers.transport import GrpcTransport

ASK_S = 5.0


DONE = "done: "

NEEDED = {"round", "rounds", "missing", "refused"}
"""The facts that a status has."""


@dataclass(frozen=True)
class PeerStatus:
    """What is known of a peer.

    Attributes:
        name: The peer.
        facts: What it answered: `round`, `rounds`, `refused`, `missing`, `sent_bytes` and others.
        why: Why there is no answer; empty if there is one.
    """

    name: str
    facts: dict[str, Any]
    why: str = ""

    @property
    def done(self) -> bool:
        """Whether it doesn't answer because its run is over, as far as is known here."""
        return self.why.startswith(DONE)


class _Nobody:
    """A desk for one who only asks."""

    def admit(self, header: Header) -> None:
        """Take nothing."""
        raise Refused(Reason.NOT_HERE, "this is no peer")

    def known(self, sender: str, slots: Collection[Slot]) -> Rows:
        """Have nothing."""
        return {}

    def take(self, header: Header, factors: dict[Slot, Any]) -> None:
        """Take nothing."""
        raise Refused(Reason.NOT_HERE, "this is no peer")

    def answer(self, question: Question) -> Answer:
        """Know nothing."""
        raise Refused(Reason.NOT_HERE, "this is no peer")

    def gave(self, asker: str, message: Message) -> None:
        """Nothing was given."""

    def moving(self, sender: str, until: float) -> None:
        """Nothing comes."""

    def refused(self, sender: str, reason: Reason, detail: str) -> None:
        """Nobody is listening."""


def status(
    federation_file: Path, name: str | None = None, insecure_loopback: bool = False
) -> list[PeerStatus]:
    """Ask every peer of a federation how it is.

    Args:
        federation_file: `federation.toml`.
        name: As whom to ask; the first peer whose key is at hand if not given.
        insecure_loopback: No TLS.

    Raises:
        ValueError: No peer's certificate is here.
    """
    folders = sorted(path.parent.name for path in federation_file.parent.glob("*/peer.toml"))
    names = [one for one in load_federation(federation_file).names if one in folders] or folders
    if name is None and not names:
        raise ValueError(f"No peer.toml lies beside {federation_file}; give --name of yours.")
    settings = load_peer(federation_file, name or names[0])
    members = load_members(federation_file, settings)
    federation = members.newest

    def ask(peer: str) -> PeerStatus:
        try:
            reply = transport.ask(peer, Question(kind="status", asker_round=OBSERVER), ASK_S)
        except Refused as refused:
            own = load_peer(federation_file, peer) if peer in folders else None
            return PeerStatus(peer, {}, _why(refused, federation.member(peer), own))
        lacks = sorted(NEEDED - reply.facts.keys())
        return PeerStatus(peer, reply.facts, f"its answer has no {lacks[0]}" if lacks else "")

    with (
        asking(members, settings, insecure_loopback) as transport,
        ThreadPoolExecutor(len(federation.names)) as pool,
    ):
        return list(pool.map(ask, federation.names))


@contextmanager
def asking(
    members: Members, settings: PeerSettings, insecure_loopback: bool = False
) -> Iterator[GrpcTransport]:
    """What can ask the members as one of them, without being reached itself.

    Raises:
        ValueError: The peer's certificate is missing or unfit.
    """
    transport = GrpcTransport(
        members, settings, Layout((), 1, 1.0), _Nobody(), insecure_loopback=insecure_loopback
    )
    transport.start(serve=False)
    try:
        yield transport
    finally:
        transport.stop(0.0)


def _why(refused: Refused, member: Member, own: PeerSettings | None) -> str:
    """Why there is no answer; of a peer whose folder is here, whether it is done."""
    if "errors resolving" in refused.detail:
        return f"there is no host of the name in {member.address}"
    if member.reachable and "Connection refused" not in refused.detail:
        return str(refused)
    if own and (own.out / "summary.json").is_file():
        return f"{DONE}{own.out / 'summary.json'}"
    where = f"nobody listens at {member.address}" if member.reachable else "it has no stream open"
    return f"{where}: not started yet, stopped, or done"


def lag(peers: Iterable[PeerStatus], peer: PeerStatus) -> int:
    """How many rounds a peer is behind the first."""
    return max(int(p.facts.get("round", 0)) for p in peers) - int(peer.facts.get("round", 0))


def first_end(expires: object) -> str:
    """The day on which a peer's certificate ends, or that of its authority if that is sooner.

    Example:
        >>> first_end({"certificate": 1893456000, "authority": 1890000000})
        '2029-11-22, authority'
    """
    try:
        what, end = min(expires.items(), key=lambda item: item[1])  # type: ignore[attr-defined]
        day = f"{dt.datetime.fromtimestamp(end, dt.UTC):%Y-%m-%d}"
    except (AttributeError, ValueError, TypeError, OverflowError, OSError):  # a peer's own words
        return "-"
    return day if what == "certificate" else f"{day}, {what:.20}"
