"""Who is alive in a federation: asked as one of its peers, over the same connections.

A process of its own holds no data and no model; it has the peer's certificate, which is what
lets it ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.factors import Slot
from plait.lora import Layout
from plait.peers.codec import Answer, Header, Message, Question
from plait.peers.federation import Member, PeerSettings, load_federation, load_peer
from plait.peers.mailbox import OBSERVER
from plait.peers.refusals import Reason, Refused
from plait.peers.transport import GrpcTransport

ASK_S = 5.0


DONE = "done: "


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
    federation = load_federation(federation_file)
    here = [n for n in federation.names if (federation_file.parent / n / "peer.toml").is_file()]
    if name is None and not here:
        raise ValueError(f"No peer.toml lies beside {federation_file}; give --name of yours.")
    settings = load_peer(federation_file, name or here[0])
    transport = GrpcTransport(
        federation, settings, Layout((), 1, 1.0), _Nobody(), insecure_loopback=insecure_loopback
    )
    transport.start(serve=False)

    def ask(peer: str) -> PeerStatus:
        try:
            reply = transport.ask(peer, Question(kind="status", asker_round=OBSERVER), ASK_S)
        except Refused as refused:
            own = load_peer(federation_file, peer) if peer in here else None
            return PeerStatus(peer, {}, _why(refused, federation.member(peer), own))
        return PeerStatus(peer, reply.facts)

    try:
        with ThreadPoolExecutor(len(federation.names)) as pool:
            return list(pool.map(ask, federation.names))
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
