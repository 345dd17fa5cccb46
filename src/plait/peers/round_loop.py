"""One client as a process of its own: the round loop over a stack of one, and a network.

Training, mixing and evaluation are those of the simulation. The rows of the neighbours come by
messages; a row that does not come in time leaves its weight with its receiver. What arrived, what
is awaited and what is refused is the inbox's business (inbox.py), sending and waiting that of
exchange.py; this loop says when training is due, hands over, mixes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from plait.engines.evaluation import evaluation
from plait.engines.job import Job
from plait.engines.steps import (
    Phase,
    active_of,
    leave_out,
    local_steps,
    mix,
    publish,
    round_done,
    train_round,
)
from plait.events import Event, RoundDone
from plait.factors import Factor, Slot, factors_name, factors_of, slots_name
from plait.lora import Stack, values
from plait.metrics import LayerState, Pair, diagnostics, pair, pair_distances
from plait.mixing import neighbour_weights
from plait.peers.changes import Copies
from plait.peers.codec import Message
from plait.peers.exchange import Exchange, Left
from plait.peers.federation import Member
from plait.peers.inbox import FactorRows, Turn
from plait.privacy import Noise
from plait.topology import MixingSchedule


class Write(Protocol):
    """Makes a message of this peer; with what changed, too, where `before` is what others know."""

    def __call__(
        self,
        rows: FactorRows,
        round_: int,
        active: str,
        kind: str,
        before: FactorRows | None = None,
    ) -> Message:
        """Of some factors in a round, and what trains in it."""
        ...


def agreed_turns(
    job: Job, me: int, members: Callable[[int], tuple[Member, ...]]
) -> Callable[[int], Turn]:
    """Round -> what all peers agree on for it without a word: phase, factors and weights.

    Whoever has not joined yet, or has left, gives and gets no weight; what its neighbours gave it
    stays with them. A symmetric W stays doubly stochastic so.

    Args:
        job: The prepared run.
        me: This peer's number.
        members: Round -> all peers of the list that holds for it, in the order of their numbers.
    """

    @lru_cache(maxsize=8)
    def schedule(clients: int) -> MixingSchedule:
        return job.method.meets(replace(job.config, clients=clients))

    @lru_cache(maxsize=64)
    def of(members: tuple[Member, ...], round_: int) -> Turn:
        size = max(len(members), me + 1)  # one that comes later is there, and meets nobody
        W = np.zeros((size, size))
        W[: len(members), : len(members)] = neighbour_weights(schedule(len(members))(round_))
        out = [k for k, member in enumerate(members) if not member.takes_part(round_)]
        W[out] = 0
        W[:, out] = 0
        if not job.shared(round_):
            W[:] = 0
        return Turn(
            active=factors_name(job.trained(round_)),
            shared=slots_name(job.shared(round_)),
            weights=W[me],
            hears=tuple(int(peer) for peer in np.flatnonzero(W[me])),
            heard_by=tuple(int(peer) for peer in np.flatnonzero(W[:, me])),
            since=tuple(job.shared_last(round_)),
        )

    return lambda round_: of(members(round_), round_)


@dataclass
class Due:
    """Local training of a round is due, before the loop goes on.

    Attributes:
        round: The round.
        losses: (1,) this client's loss, once it has trained.
    """

    round: int
    losses: np.ndarray | None = None


@dataclass
class Peer:
    """A client among its neighbours.

    Attributes:
        job: The prepared run, with this client's rows at its place in `shares`.
        stack: The state of this client, a stack of one.
        exchange: What connects it with the others.
        write: Makes its messages.
        noise: Where the noise of differential privacy comes from.
    """

    job: Job
    stack: Stack
    exchange: Exchange
    write: Write
    noise: Noise

    def __post_init__(self) -> None:
        """Take the parts that are used all the time."""
        self.desk, self.inbox = self.exchange.desk, self.exchange.inbox
        self.me = self.inbox.me
        self.end = self.job.config.rounds
        if self.job.wire.share is not None:
            self.desk.copies = Copies(self._start_of)

    def _start_of(self, client: int) -> FactorRows:
        """What a client would have sent of the common start."""
        state = self.job.initial_stack([client]).state
        return self.job.own({slot: state[slot][0].cpu() for slot in self.job.travels}, client)

    def rounds(self, first: int, end: int) -> Iterator[Event | Due]:
        """Take part from round `first` to before round `end`, changing the stack in place.

        Yields what `simulate` does, of this client alone, `Incident`s, and `Due` where whoever
        loops has to `train`. After a `RoundDone` or `Evaluated` the stack is whole.

        Raises:
            ValueError: The loss is no longer finite; nothing of that round was sent.
            Left: The peer was told to leave. A round that was begun will be done again.
        """
        self.end = end
        with self.desk.condition:
            self.inbox.skip_to(first)
        self._rest()
        if first == 0:
            yield self.job.started
            if self.judges:
                yield evaluation(self.job, self.stack, [self.me], -1)
        while (round_ := self._catch_up()) < self.end:
            done = yield from self._round(round_)
            yield from self.desk.incidents()
            yield done
            if self.evaluates_after(round_):
                yield evaluation(self.job, self.stack, [self.me], round_)
            if self.exchange.leave.is_set():
                raise Left

    def train(self, due: Due, phase: Phase = local_steps) -> None:
        """Do the local steps that are due, in place; `ValueError` if training diverged."""
        due.losses = train_round(self.job, self.stack, due.round, [self.me], self.noise, phase)

    @property
    def judges(self) -> bool:
        """Whether there are rows to evaluate on: a loop of one's own may keep all to itself."""
        return len(self.job.held_out) > 0

    def evaluates_after(self, round_: int) -> bool:
        """Whether this client is evaluated after a round: as in a simulation, and when it ends."""
        due = self.job.evaluations.after(round_) or round_ + 1 == self.end
        return due and self.judges

    def adopt(self, rows: FactorRows) -> None:
        """Begin from a neighbour's state: one that lost its own, or joins late."""
        for slot, row in rows.items():
            self.stack.state[slot] = row[None].to(self.job.backbone.device)
        self.job.cut(self.stack.state, [self.me])
        for factor in factors_of(rows):
            self.stack.reset(factor)
        self.stack.state |= self.job.made_public(self.stack.state)
        self._rest()

    def _catch_up(self) -> int:
        """The round to do next: the one that is open, unless the others are too far ahead.

        Further back than what they keep, every message would come too late and so would every
        answer. The rounds between count as rounds in which this peer was not there.
        """
        reached = self.exchange.whereabouts()
        with self.desk.condition:
            behind, target = self.inbox.round, min(reached, self.end - 1)
            if target <= behind + self.inbox.keep_rounds:
                return behind
            self.inbox.skip_to(target)
        leave_out(self.stack, range(behind, target), self.job, self.me)
        self.desk.report("skipped", self.desk.name, f"from round {behind} to {target}")
        return target

    def _round(self, round_: int) -> Generator[Due, None, RoundDone]:
        begin = time.perf_counter()
        turn, due = self.inbox.turn(round_), Due(round_)
        active = active_of(self.job, self.stack, round_, [self.me])
        if trains := bool(active):
            yield due
        else:
            due.losses = np.full(1, np.nan)
        trained = time.perf_counter()
        if self.exchange.leave.is_set():
            raise Left
        assert due.losses is not None, "train() comes before the loop goes on"
        before = self._sent(round_)
        publish(self.job, self.stack.state, round_, [self.me])
        mine = self._sent(round_)
        if mine and (trains or turn.hears):  # else it isn't kept for anybody
            known = before if self.desk.copies else None
            self.exchange.send(turn, self.write(mine, round_, turn.active, "round", known))
            self.exchange.wait()
        mixing = time.perf_counter()
        heard = self.exchange.close()
        self.desk.note("mixed", round=round_, peers=[self.desk.names[peer] for peer in heard])
        diagnosed, pairs_apart = self._mix(round_, turn, heard)
        self._rest()
        return round_done(
            self.job,
            round_,
            due.losses,
            [(self.me, peer, float(turn.weights[peer])) for peer in heard],
            sent_bytes=self.exchange.settle(),
            active=active,
            before=diagnosed,
            after=[],
            pairs_apart=pairs_apart,
            train_seconds=trained - begin,
            mix_seconds=time.perf_counter() - mixing,
        )

    def _sent(self, round_: int) -> FactorRows:
        """What neighbours know of the slots that travel in a round."""
        state, sent = self.stack.state, self.job.sent
        return {slot: state[sent(slot)][0] for slot in self.job.shared(round_)}

    def _mix(
        self, round_: int, turn: Turn, heard: dict[int, FactorRows]
    ) -> tuple[list[LayerState], list[Pair]]:
        """Mix with what came.

        Returns:
            Diagnostics of this peer and those it heard, and its distance from each of them, before
            mixing; none where not both factors came. A peer can't know them for everyone, nor for
            anyone after mixing; the mixing error it knows of itself alone.
        """
        mine, W = dict(self.stack.state), turn.weights[list(heard)][None]
        heard = {peer: self.job.whole(rows, peer) for peer, rows in heard.items()}
        theirs = {slot: _stacked(heard, slot, mine[slot]) for slot in self.job.shared(round_)}
        sent = {self.job.sent(slot): rows for slot, rows in theirs.items()}
        self.stack.state |= mix(self.job, mine, sent, W, round_, [self.me])
        before = values({slot: torch.cat([mine[slot], rows]) for slot, rows in theirs.items()})
        if not heard or not {Factor.A, Factor.B} <= before.keys():
            return [], []
        local = np.eye(1 + len(heard))
        local[0] = [1 - W.sum(), *W[0]]
        layout = self.job.backbone.layout
        distances = pair_distances(layout, before)[0, 1:].tolist()
        # Not strict: of very many neighbours only the first are measured.
        pairs = [pair(self.me, peer, far) for peer, far in zip(heard, distances, strict=False)]
        layers = diagnostics(layout, before, before, local).before
        # The others count as having heard nobody, which is an error of zero each.
        own = [replace(one, mixing_error=len(local) * one.mixing_error) for one in layers]
        return own, pairs

    def _rest(self) -> None:
        """Leave a copy of the state for a peer that lost its own: what has travelled, no more."""
        round_ = self.inbox.round
        rows = {slot: self.stack.state[slot][0].clone() for slot in self.job.travelled(round_)}
        if rows:
            active = self.inbox.turn(round_ - 1).active
            self.desk.resting = lambda: self.write(rows, round_, active, "state")


def _stacked(heard: dict[int, FactorRows], slot: Slot, like: Tensor) -> Tensor:
    """(n, P), a slot of all that were heard, where `like` (1, P) is."""
    return torch.cat([like[:0], *(rows[slot][None].to(like.device) for rows in heard.values())])
