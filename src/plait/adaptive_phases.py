"""Phases of ADF-LoRA that end when the frozen factor has become nearly equal, without a server.

Each client keeps a note of two numbers that travels with the factors: how often the phase has
changed, which says what trains (B where it is even), and a spread. Rounds go by epochs. In the
first round of an epoch a client measures how far mixing moved its frozen factor, as a share of how
far it moved the active one. In the others each takes the largest spread that it hears of, so once
all have heard of all, by whatever ways, everybody has the same. When that is follows from the
graphs, which all know. If the spread is small enough then, all change the phase in the same round;
if not, another epoch begins.

A message that is lost may leave a client behind by a phase; it takes over the highest count that it
hears of, and so is back after one epoch.

Sources: Consensus on the maximum, as in gossip with max (Iutzeler, Ciblat, Jakubowicz 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from plait.config import Config
from plait.factors import NOTE, VALUE, A, B, Factor
from plait.later import torch
from plait.lora import Layout, State
from plait.machine.devices import exact
from plait.machine.file_cache import kept
from plait.mixing import Mix, average
from plait.screening import Slots
from plait.topology import build_schedule

NOTES = 2
"""Changes of the phase so far, and the spread."""


def active_of_note(note: Sequence[float]) -> Factor:
    """What trains at a client with this note."""
    return A if round(note[0]) % 2 else B


@kept(8)
def epochs(config: Config) -> tuple[range, ...]:
    """The epochs of a run, each as its rounds; the last one may not come to its end.

    Example:
        >>> epochs(Config(topology="complete", rounds=5, clients=4))
        (range(0, 2), range(2, 4), range(4, 5))
    """
    schedule, found, start = build_schedule(config), [], 0
    while start < config.rounds:
        end, heard = start + 1, np.eye(config.clients, dtype=np.float32)
        while end < config.rounds and not heard.all():
            # In floats, of which products are fast.
            heard = ((schedule(end) > 0).astype(np.float32) @ heard + heard > 0).astype(np.float32)
            end += 1
        found.append(range(start, end))
        start = end
    return tuple(found)


@kept(8)
def _place(config: Config) -> tuple[tuple[bool, bool, int], ...]:
    """Of each round: whether it is the first of its epoch, or the last, and the epochs before."""
    return tuple(
        (round_ == epoch.start, len(epoch) > 1 and round_ == epoch[-1], before)
        for before, epoch in enumerate(epochs(config))
        for round_ in epoch
    )


def mix_with_notes(config: Config) -> Callable[[int], Mix]:
    """Averaging of A and B and, by the round, what becomes of the notes."""
    return lambda round_: _mix(*_place(config)[round_], config.switch_below)


MOST_SPREAD = 1e6
"""Where nothing but the frozen factor moves; a number that messages can hold."""


def _mix(first: bool, last: bool, most: int, below: float) -> Mix:
    def combine(_layout: Layout, mine: Slots, heard: Slots, W: np.ndarray) -> State:
        note = VALUE, NOTE
        mixed = {slot: average(own, heard[slot], W) for slot, own in mine.items() if slot != note}
        notes = mine[note].clone()
        for i, row in enumerate(W):
            known = torch.cat([mine[note][i : i + 1], heard[note][np.flatnonzero(row)]])
            # A liar's count is at most that of an honest client whose every epoch ended a phase.
            known[:, 0] = known[:, 0].round().clamp(0, most)
            known[:, 1] = known[:, 1].clamp(0, MOST_SPREAD)
            notes[i] = known.max(dim=0).values
            if first:
                notes[i, 1] = _spread(mine, mixed, i, active_of_note(mine[note][i].tolist()))
            if last and notes[i, 1] < below:
                notes[i, 0] += 1
        return mixed | {note: notes}

    return Mix(combine, together=A | B | NOTE)


def _spread(mine: Slots, mixed: State, i: int, active: Factor) -> float:
    """How far mixing moved client i's frozen factor, as a share of how far it moved the active."""
    moved = {
        factor: math.sqrt(np.square(exact(mixed[slot][i] - mine[slot][i]).cpu().numpy()).sum())
        for factor in (A, B)
        for slot in [(VALUE, factor)]
    }
    frozen = moved[B if active is A else A]
    return min(MOST_SPREAD, frozen / max(moved[active], 1e-300)) if frozen else 0.0
