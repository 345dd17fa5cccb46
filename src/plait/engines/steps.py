"""What every engine does in a round, for the clients whose state it holds, and what it says."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
from torch import Tensor

from plait.engines.job import Edge, Job
from plait.engines.local_training import local_phase
from plait.events import RoundDone
from plait.factors import NOTE, VALUE, Factor, Slot, factors_name, factors_of, slots_name
from plait.lora import Stack, State
from plait.mixing import neighbour_weights
from plait.privacy import Noise, privatise
from plait.topology import rho_of_round
from plait.wire_types import farthest

Turns = Sequence[Factor]
"""What takes each of the K local steps of a round."""
Phase = Callable[[Job, Stack, int, Sequence[int], Turns], np.ndarray]
"""(job, stack, round, clients, turns) -> (n,) losses: the local steps of a round of clients who
train the same, changing the stack's active factors in place; a `ValueError` if training
diverged."""


def local_steps(
    job: Job, stack: Stack, round_: int, clients: Sequence[int], turns: Turns
) -> np.ndarray:
    """The `Phase` of every engine: the job's rows, its optimizer, its number of steps."""
    losses: np.ndarray = local_phase(
        job.backbone, stack, reduce(or_, turns), round_, job.train, job.shares, clients,
        job.config, job.method.optimizer, turns,
    ).mean(axis=1)  # fmt: skip
    check_finite(losses, clients, round_, job.config.lr)
    return losses


def train_round(
    job: Job,
    stack: Stack,
    round_: int,
    clients: Sequence[int],
    noise: Noise,
    phase: Phase = local_steps,
) -> np.ndarray:
    """The local phase of a round, changing `stack` in place; with `dp_clip` it ends private.

    A method that corrects what it has trained does so at the end, with what is private already.

    Args:
        job: The prepared run.
        stack: The state of these clients; row k belongs to client `clients[k]`.
        round_: The round's number.
        clients: Which clients the stack holds.
        noise: Where the noise of differential privacy comes from.
        phase: What trains.

    Returns:
        (n,) float64, each client's loss, mean over the steps; NaN of one that rests.

    Raises:
        ValueError: A client's loss is no longer finite.
    """
    losses = np.empty(len(clients))
    for turns, rows in _alike(job, stack, round_, clients):
        part, some = stack.part(rows), [clients[row] for row in rows]
        losses[rows] = _train_alike(job, part, round_, some, turns, noise, phase)
        stack.put(rows, part)
    return losses


def _turns_of(job: Job, stack: Stack, row: int, round_: int, client: int) -> list[Factor]:
    """The `Turns` of a client, whose row of the stack it is."""
    turns, picks = job.turns(round_, client), job.method.picks
    if picks is None:
        return turns
    chosen = picks(stack.state[VALUE, NOTE][row].tolist()) | Factor.HEAD
    return [turn & chosen for turn in turns]


def active_of(job: Job, stack: Stack, round_: int, clients: Sequence[int]) -> Factor:
    """What takes local steps in a round at any of some clients, whose state the stack is."""
    turns = (_turns_of(job, stack, row, round_, client) for row, client in enumerate(clients))
    return reduce(or_, itertools.chain.from_iterable(turns))


def _alike(
    job: Job, stack: Stack, round_: int, clients: Sequence[int]
) -> list[tuple[Turns, list[int]]]:
    """The rows of clients who train the same in a round, after as many steps; and that."""
    found: dict[tuple[Turns, object], list[int]] = defaultdict(list)
    for row, client in enumerate(clients):
        turns = tuple(_turns_of(job, stack, row, round_, client))
        active = reduce(or_, turns)
        taken = tuple(
            0 if begins_anew(factor, round_, job, client) else int(steps[row])
            for factor, steps in stack.steps.items()
            if factor in active
        )
        found[turns, taken].append(row)
    return [(turns, rows) for (turns, _), rows in found.items()]


def _train_alike(
    job: Job,
    stack: Stack,
    round_: int,
    clients: Sequence[int],
    turns: Turns,
    noise: Noise,
    phase: Phase,
) -> np.ndarray:
    """As `train_round`, of clients who train the same after as many steps."""
    method, private = job.method, job.config.dp_clip is not None
    active = reduce(or_, turns)
    if not active:
        return np.full(len(clients), np.nan)
    reset_optimizer(stack, active, round_, job, clients[0])
    before = {
        (kind, factor): stack.state[kind, factor].clone()
        for kind, factor in job.travels
        if factor in active and kind not in method.kept and (private or method.correct)
    }
    losses = phase(job, stack, round_, clients, turns)
    if private and before:
        privatise(before, stack.state, round_, clients, job.config, noise)
    if method.correct:
        for factor in factors_of(before):
            now = stack.beside(factor) | {VALUE: stack.state[VALUE, factor]}
            corrected = method.correct(before[VALUE, factor], now)
            stack.state |= {(kind, factor): value for kind, value in corrected.items()}
    job.cut(stack.state, clients)
    return losses


def publish(job: Job, state: State, round_: int, clients: Sequence[int]) -> None:
    """Bring what others know of some clients nearer to their slots that travel in a round.

    Once in a round, after training; in memory of its own, nothing is changed in place.
    """
    if job.wire.share is None:
        return
    for slot in job.shared(round_):
        copies = state[job.sent(slot)].clone()
        for x, copy, client in zip(state[slot], copies, clients, strict=True):
            count = job.wire.count(job.layout_of(client).size(slot[1]))
            sent = farthest(x, copy, count)
            copy[sent] = x[sent]
        state[job.sent(slot)] = copies


def mix(
    job: Job,
    mine: Mapping[Slot, Tensor],
    heard: Mapping[Slot, Tensor],
    W: np.ndarray,
    round_: int,
    clients: Sequence[int],
) -> State:
    """What some clients make of the slots that travel in a round, their own and those they heard.

    Args:
        job: The prepared run.
        mine: Slot -> (m, P), at least of those that travel, and of what was sent of them.
        heard: Slot -> (n, P), what was sent by the clients that were heard (`Job.sent`).
        W: (m, n) what each of mine gives to each of those heard; 0 for itself.
        round_: The round's number.
        clients: Whose slots `mine` are.

    Returns:
        Slot -> (m, P) after mixing, of the slots that travel.
    """
    slots = job.shared(round_)
    if not slots:
        return {}
    how, layout = job.method.mix(round_), job.backbone.layout
    own, theirs = (
        {slot: job.wire.rounded(state[job.sent(slot)], layout.sizes(slot[1])) for slot in slots}
        for state in (mine, heard)
    )
    own = {slot: mine[slot] for slot in job.base} | own
    mixed = how.combine(layout, own, theirs, W)
    if job.config.wire != "float32" and how.restore:  # what wasn't sent stays
        mixed = how.restore(layout, mixed, mine, own)
    job.cut(mixed, clients)
    return mixed


def reset_optimizer(stack: Stack, active: Factor, round_: int, job: Job, client: int) -> None:
    """Start the optimizer anew where `optimizer_state` says so, as at a client so at all."""
    for factor in stack.factors:
        if factor in active and begins_anew(factor, round_, job, client):
            stack.reset(factor, but=job.method.kept)


def begins_anew(factor: Factor, round_: int, job: Job, client: int) -> bool:
    """Whether the optimizer of a factor that trains at a client in a round starts anew.

    `reset_each_phase` resets a factor's state in the first round of each of its phases there.
    """
    policy = job.config.optimizer_state
    if policy == "reset_each_phase":
        return _begins(job, factor, round_, client)
    return policy == "reset_each_round"


def leave_out(stack: Stack, rounds: Iterable[int], job: Job, client: int) -> None:
    """What rounds in which a client was not there leave of its optimizer's state.

    With `reset_each_phase` nothing, of a factor whose phase began in them.
    """
    if job.config.optimizer_state == "reset_each_phase":
        for factor in stack.factors:
            if any(_begins(job, factor, round_, client) for round_ in rounds):
                stack.reset(factor, but=job.method.kept)


def _begins(job: Job, factor: Factor, round_: int, client: int) -> bool:
    """Whether a phase of a factor begins with a round at a client."""
    before = round_ > 0 and factor in job.trained(round_ - 1, client)
    return factor in job.trained(round_, client) and not before


def edges_of(W: np.ndarray, clients: range) -> list[Edge]:
    """Whom some clients hear in a round with the matrix W (N, N), if everything arrives."""
    pairs = np.argwhere(neighbour_weights(W)).tolist()
    return [(i, j, float(W[i, j])) for i, j in pairs if i in clients]


def round_done(
    job: Job,
    round_: int,
    losses: np.ndarray,
    edges: Sequence[Edge],
    sent_bytes: int,
    active: Factor,
    **measured: Any,
) -> RoundDone:
    """The event of a round of some clients.

    Args:
        job: The prepared run.
        round_: The round's number.
        losses: (n,) their training losses.
        edges: Whom they heard.
        sent_bytes: `Job.message_bytes` of each of their messages that was taken.
        active: What took local steps, `active_of` before them.
        **measured: The other fields of the event.
    """
    return RoundDone(
        round=round_,
        active=factors_name(active),
        shared=slots_name(job.shared(round_)),
        train_losses=losses.tolist(),
        edges=list(edges),
        rho=rho_of_round(job.schedule(round_)),
        sent_bytes=sent_bytes,
        **measured,
    )


def check_finite(losses: np.ndarray, clients: Sequence[int], round_: int, lr: float) -> None:
    """Raise a `ValueError` if a client's loss (n,) is no longer finite."""
    bad = [str(clients[int(k)]) for k in np.flatnonzero(~np.isfinite(losses))]
    if bad:
        raise ValueError(
            f"The loss of client {', '.join(bad)} is not finite in round {round_}: training "
            f"diverged. Lower the learning rate (--lr, now {lr:g}), or clip gradients "
            "(--clip-norm 1)."
        )
