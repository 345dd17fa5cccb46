"""`plait members`: a new list of members is proposed, signed, shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from plait.cli.arguments import parse, split
from plait.machine.extras import PEER_PACKAGES, need

if TYPE_CHECKING:
    from plait.peers.federation import PeerSettings
    from plait.peers.membership import Members
    from plait.peers.roster import Roster


@dataclass(frozen=True, kw_only=True)
class MembersCommand:
    """Let peers join or leave while a federation runs: propose a list of members, sign it, show it.

    `plait members propose --config fed/federation.toml --name ada --join dan=dan.example.org:7600
    --from-round 30` writes fed/proposed-2.toml.
    `plait members sign fed/proposed-2.toml --config fed/federation.toml --name ben` signs it with
    ben's key. Once more than half have signed it, it becomes fed/members-2.toml: a peer that runs
    takes it from there, and the others from it.
    `plait members show --config fed/federation.toml --name ada` prints who takes part and who has
    signed.
    """

    action: tyro.conf.Positional[Literal["propose", "sign", "show"]]
    """What to do."""
    file: tyro.conf.Positional[Path | None] = None
    """Sign, show: a list; show without one has the list that holds."""
    config: Path
    """The federation's file, federation.toml; NAME/peer.toml lies beside it."""
    name: str
    """Which peer you are."""
    join: str = ""
    """Propose: who joins, comma-separated, `dan=dan.example.org:7600`; one without an address
    accepts no connections."""
    leave: str = ""
    """Propose: who leaves, comma-separated."""
    from_round: int | None = None
    """Propose: the first round of the new list. Take one that is some rounds off, so that all have
    heard of it by then."""
    out: Path | None = None
    """Propose: the list's file; proposed-VERSION.toml beside federation.toml if not given."""


def members(args: list[str]) -> None:
    """`plait members`.

    Raises:
        ValueError: An option is missing, or the list can't be.
        OSError: A file can't be read or written.
    """
    given = parse(MembersCommand, "members", args)
    for package in PEER_PACKAGES:
        need(package, "peer", "A federation")
    from plait.peers.federation import load_peer
    from plait.peers.membership import load_members

    own = load_peer(given.config, given.name)
    ACTIONS[given.action](given, own, load_members(given.config, own))


def _propose(given: MembersCommand, _own: PeerSettings, known: Members) -> None:
    from plait.peers.federation import Member
    from plait.peers.roster import after, write_roster

    if given.from_round is None or not (split(given.join) or split(given.leave)):
        raise ValueError("plait members propose needs --from-round, and --join or --leave.")
    new = [
        Member(name=name, address=address, reachable=bool(address))
        for name, _, address in (one.partition("=") for one in split(given.join))
    ]
    roster = after(known.roster, given.from_round, new, split(given.leave))
    known.add(roster)
    out = given.out or given.config.parent / f"proposed-{roster.version}.toml"
    if out.exists():
        raise ValueError(f"{out} is there already; take another --out, or sign that one.")
    out.write_text(write_roster(roster), encoding="utf-8")
    print(f"{out}: version {roster.version}, from round {roster.from_round} on; not signed yet")


def _sign(given: MembersCommand, own: PeerSettings, known: Members) -> None:
    from plait.peers.credentials import read_credentials
    from plait.peers.membership import add_signed, keep_list
    from plait.peers.roster import check_follows, sign, write_roster

    roster = _read(given)
    check_follows(known.roster, roster)
    papers = read_credentials(own)
    signed = sign(roster, own.name, papers.own.certificate, papers.own.key)
    assert given.file is not None
    given.file.write_text(write_roster(signed), encoding="utf-8")
    _say(signed, own, known)
    try:
        add_signed(known, signed, own)
    except ValueError as error:
        print(f"Not yet: {error}.")
        return
    keep_list(signed, given.config.parent)
    print(f"It counts: {given.config.parent}/members-{signed.version}.toml")


def _show(given: MembersCommand, own: PeerSettings, known: Members) -> None:
    _say(_read(given) if given.file else known.roster, own, known)


def _read(given: MembersCommand) -> Roster:
    from plait.machine.text_files import read_text
    from plait.peers.roster import read_roster

    if given.file is None:
        raise ValueError(f"plait members {given.action} needs a file.")
    return read_roster(read_text(given.file))


def _say(roster: Roster, own: PeerSettings, known: Members) -> None:
    """Who takes part, and whose signatures count."""
    from plait.peers.membership import signed_by

    print(f"version {roster.version} of {roster.federation}, from round {roster.from_round} on")
    for peer in roster.peers:
        until = "" if peer.leaves is None else f", until round {peer.leaves}"
        where = peer.address or "accepts no connections"
        print(f"  {peer.name}: {where}, from round {peer.joins}{until}")
    if roster.version > 1:
        print(signed_by(known, roster, own))


ACTIONS: dict[str, Callable[[MembersCommand, PeerSettings, Members], None]] = {
    "propose": _propose,
    "sign": _sign,
    "show": _show,
}
