"""The members of a federation, round by round, and whether they can do what its graph asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from plait.config import Config
from plait.machine.files import write_atomically
from plait.machine.text_files import read_text
from plait.methods import build_method, settled
from plait.mixing import neighbour_weights
from plait.peers.federation import Federation, PeerSettings, load_federation
from plait.peers.pem import certificates_in, read_pem
from plait.peers.revocation import fingerprint_of, read_revoked
from plait.peers.roster import (
    Roster,
    Trust,
    check_follows,
    check_quorum,
    first,
    read_roster,
    signers,
    write_roster,
)
from plait.topology import build_schedule, topology_row

LISTS = "members-*.toml"
"""Files of later versions of the list; `*` is the version."""

OWN_ROWS = ("file", "chat")
"""Tasks to which each peer brings rows of its own."""

MOST_TURNS = 1000
"""Of a long run the first rounds decide who meets whom."""


@dataclass(frozen=True)
class Known:
    """A version of the list, and the federation with it."""

    roster: Roster
    federation: Federation

    @cached_property
    def digest(self) -> str:
        """Of what must be agreed on while it holds."""
        return self.federation.digest()


class Members:
    """A federation whose list of members grows by versions while it runs.

    It stands where a `Federation` does: the settings stay, and the peers are those of the newest
    version. What is agreed on for a round goes by the version that holds for it.
    """

    def __init__(self, federation: Federation, rosters: Iterable[Roster] = ()) -> None:
        """The first version, and those that are known already, in their order."""
        self._first = federation
        self._known: tuple[Known, ...] = (Known(first(federation), federation),)
        for roster in rosters:
            self.add(roster)

    def add(self, roster: Roster) -> None:
        """Let another version hold from its round on.

        Raises:
            ValueError: It doesn't follow from the newest, or its members can't do what they must.
        """
        check_follows(self.roster, roster)
        first = self._first.config
        if len(roster.peers) > len(self.roster.peers) and (
            first.task not in OWN_ROWS or first.train_file
        ):
            raise ValueError(
                f"nobody can join: the rows of {first.train_file or f'task {first.task}'} were "
                "dealt to the first members; where each peer has rows of its own, others can"
            )
        config = dataclasses.replace(first, clients=len(roster.peers))
        _check_sense(roster, first, config)
        if config.lora_alpha != first.lora_alpha:
            raise ValueError(
                f"nobody can join: with --scale {first.scale} the model depends on how many "
                "members there are; a new federation is needed"
            )
        federation = dataclasses.replace(self._first, config=config, peers=roster.peers)
        check_members(federation)
        self._known = (*self._known, Known(roster, federation))

    def with_read(self, read: Mapping[str, str]) -> Members:
        """The same with hashes of what all peers must have read alike."""
        federation = dataclasses.replace(self._first, read=read)
        return Members(federation, self.rosters[1:])

    @property
    def roster(self) -> Roster:
        """The newest version."""
        return self._known[-1].roster

    @property
    def rosters(self) -> list[Roster]:
        """All versions that are known; the first is in federation.toml."""
        return [one.roster for one in self._known]

    def version(self, number: int) -> Roster | None:
        """A version by its number, if it is known."""
        return next((one for one in self.rosters if one.version == number), None)

    def at(self, round_: int) -> Federation:
        """The federation of a round."""
        return self._of(round_).federation

    def _of(self, round_: int) -> Known:
        return next(one for one in reversed(self._known) if one.roster.from_round <= round_)

    def first_with(self, name: str) -> Federation:
        """The federation in whose list a member came first; the newest if it is in none."""
        known = (one.federation for one in self._known)
        return next((one for one in known if name in one.names), self.newest)

    def digest(self, round_: int) -> str:
        """Of what must be agreed on for a round."""
        return self._of(round_).digest

    @property
    def newest(self) -> Federation:
        """The federation with its newest list."""
        return self._known[-1].federation


def load_members(federation_file: Path, settings: PeerSettings) -> Members:
    """The members as files have them: federation.toml, and lists beside it or in the run folder.

    A list that counted once counts on, whatever became of the certificates: like federation.toml it
    comes from whoever runs the peer.

    Args:
        federation_file: `federation.toml`.
        settings: Of the peer that reads it.

    Raises:
        ValueError: A file isn't what it should be, or a list lacks signatures.
        OSError: One can't be read.
    """
    members = Members(load_federation(federation_file))
    found = [
        path for folder in (federation_file.parent, settings.out) for path in folder.glob(LISTS)
    ]
    for path in sorted(found, key=_version_of):
        try:
            roster = read_roster(read_text(path))
            if roster.version > members.roster.version:
                check_quorum(members.roster, roster, None)
                members.add(roster)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return members


def signed_by(members: Members, roster: Roster, settings: PeerSettings) -> str:
    """Who has signed a list, in words, and whose signatures don't count."""
    before = members.version(roster.version - 1)
    if before is None:
        return f"version {roster.version - 1} isn't known here, so nobody can say who may sign"
    names, wrong = signers(before, roster, _trust(settings))
    return "; ".join([f"signed by {', '.join(names) or 'nobody'}", *wrong])


def _trust(settings: PeerSettings) -> Trust:
    authorities = certificates_in(read_pem(settings.ca), settings.ca, "the authority's certificate")
    listed = read_revoked(settings.revoked)
    return Trust(authorities, lambda pem: fingerprint_of(pem) in listed)


def add_signed(members: Members, roster: Roster, settings: PeerSettings) -> None:
    """Let a list hold that enough members have signed.

    Raises:
        ValueError: It doesn't follow, lacks signatures, or its members can't do what they must.
    """
    check_quorum(members.roster, roster, _trust(settings))
    members.add(roster)


def take_list(members: Members, folder: Path, settings: PeerSettings) -> Roster | None:
    """Let the next list hold that lies in a folder, if one does: put there during a run.

    Raises:
        ValueError: It can't be read, or doesn't count.
    """
    path = _list_file(folder, members.roster.version + 1)
    if not path.is_file():
        return None
    try:
        roster = read_roster(read_text(path))
        add_signed(members, roster, settings)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    return roster


def keep_list(roster: Roster, folder: Path) -> None:
    """Write a list where `load_members` finds it."""
    write_atomically(_list_file(folder, roster.version), write_roster(roster))


def _list_file(folder: Path, version: int) -> Path:
    return folder / LISTS.replace("*", str(version))


def _version_of(path: Path) -> int:
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _check_sense(roster: Roster, first: Config, config: Config) -> None:
    start, rounds = roster.from_round, config.rounds
    if not 0 < start < rounds:
        raise ValueError(f"it holds from round {start}, and the run has {rounds}, from 0 on")
    here = [one.name for one in roster.peers if one.takes_part(start)]
    if len(here) < 2:
        raise ValueError(f"nobody would be left to meet {', '.join(here) or 'anybody'}")
    old, new = build_method(first), build_method(config)
    both = min(first.clients, config.clients)
    if any(old.plan(t, both) != new.plan(t, both) for t in range(rounds)):
        raise ValueError(
            f"with another number of members {config.method} would train or send other factors in "
            "a round, and those that are there would not know"
        )


def check_members(federation: Federation) -> None:
    """Refuse what the graph can't give.

    Raises:
        ValueError: What needs a symmetric W has none, or two would have to meet that can't.
    """
    method = build_method(federation.config)
    if (method.picks or method.base_rank) and _changing(federation):
        raise ValueError(
            f"{federation.config.method} needs the same members from the first round to the last."
        )
    if federation.config.frozen_every == 0 and _changing(federation):
        raise ValueError(
            "frozen_every is 0, and members come or go, so what would be equal at all isn't; put "
            "frozen_every = 1 under [run] of federation.toml."
        )
    _check_symmetry(federation)
    _check_reachability(federation)


def _changing(federation: Federation) -> bool:
    """Whether somebody joins later, or leaves before the end."""
    return any(peer.joins or peer.leaves is not None for peer in federation.peers)


def links(federation: Federation) -> frozenset[tuple[int, int]]:
    """The pairs of members (i, j), i < j, of whom one needs the other's messages in some round."""
    config = settled(federation.config)
    schedule = build_method(config).meets(config)
    met: set[tuple[int, int]] = set()
    for round_ in range(min(federation.config.rounds, MOST_TURNS)):
        W = neighbour_weights(schedule(round_))
        met |= {(int(i), int(j)) for i, j in np.argwhere(np.triu(W + W.T))}
    return frozenset(met)


def _check_reachability(federation: Federation) -> None:
    hidden = [k for k, peer in enumerate(federation.peers) if not peer.reachable]
    if federation.relay or len(hidden) < 2:
        return
    stuck = sorted(links(federation) & set(combinations(hidden, 2)))
    if stuck:
        pairs = ", ".join(" and ".join(federation.names[k] for k in pair) for pair in stuck[:3])
        raise ValueError(
            f"{pairs} exchange messages over the topology {federation.config.topology} and neither "
            "can be called by the other; add a relay, one that both can reach (relay = "
            '"host:port", or --relay for a new federation), give one of them an address, or take '
            "another topology, such as a star around one that can be called."
        )


def _check_symmetry(federation: Federation) -> None:
    config = settled(federation.config)
    symmetric = topology_row(config).symmetric and build_method(config).meets is build_schedule
    for needs, what in (
        (_changing(federation), "peers that join or leave"),
        (federation.limits.symmetric_loss, "symmetric_loss"),
    ):
        if needs and not symmetric:
            raise ValueError(
                f"{what} need a symmetric topology; {config.method} on {config.topology} with "
                f"weights {config.weights} has none."
            )
