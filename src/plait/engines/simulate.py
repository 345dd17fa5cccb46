"""All clients on one machine, as one stack: nothing needs to be exchanged."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from plait.events import Evaluated, Event, RoundDone
from plait.job import Job, some_rows
from plait.local import batch_losses, evaluate, local_phase
from plait.lora import Stack
from plait.methods import Factor
from plait.metrics import apart, layer_states
from plait.mixing import mean, neighbour_weights
from plait.topology import rho_of_round


def simulate(job: Job, stack: Stack, first_round: int = 0) -> Iterator[Event]:
    """Run the rounds from `first_round` on, changing `stack` in place.

    Yields `RoundDone` after each round and `Evaluated` where the config asks for it; between two
    events the stack is whole, so it can be saved.

    Raises:
        ValueError: A client's loss is no longer finite.
    """
    config = job.config
    everyone = range(config.clients)
    if first_round == 0:
        yield job.started
        yield evaluation(job, stack, -1)
    for round_ in range(first_round, config.rounds):
        begin = time.perf_counter()
        active = job.trained(round_)
        reset_moments(stack, active, round_, job)
        losses = local_phase(
            job.backbone, stack, active, round_, job.train, job.shares, everyone, config
        ).mean(axis=1)
        check_finite(losses, everyone, round_, config.lr)
        trained = time.perf_counter()
        W = job.schedule(round_)
        weights = neighbour_weights(W)
        before = dict(stack.factors)
        shared = job.shared(round_)
        for factor in stack.factors:
            if factor in shared:
                mine = before[factor]
                stack.factors[factor] = job.method.mix(mine, mine, weights)
        mixed = time.perf_counter()
        states = layer_states(job.backbone.layout, before, stack.factors, W)
        edges = [(int(i), int(j), float(W[i, j])) for i, j in np.argwhere(weights)]
        row_bytes = sum(4 * job.backbone.layout.size(f) for f in stack.factors if f in shared)
        yield RoundDone(
            round=round_,
            active=names(active),
            shared=names(shared),
            train_losses=losses.tolist(),
            edges=edges,
            rho=rho_of_round(W),
            sent_bytes=row_bytes * len(edges),
            before=states[0],
            after=states[1],
            apart=apart(job.backbone.layout, stack.factors),
            train_seconds=trained - begin,
            mix_seconds=mixed - trained,
        )
        if config.evaluates_after(round_):
            yield evaluation(job, stack, round_)


def reset_moments(stack: Stack, active: Factor, round_: int, job: Job) -> None:
    """Start AdamW anew where `optimizer_state` says so.

    `reset_each_phase` resets a factor's moments in the first round of each of its phases.
    """
    policy = job.config.optimizer_state
    for factor in stack.factors:
        if factor not in active:
            continue
        begins = round_ == 0 or factor not in job.trained(round_ - 1)
        if policy == "reset_each_round" or (policy == "reset_each_phase" and begins):
            stack.reset_moments(factor)


def evaluation(job: Job, stack: Stack, round_: int) -> Evaluated:
    """Every client's own model, and the averaged one, on the held-out rows."""
    begin = time.perf_counter()
    last = round_ + 1 == job.config.rounds
    rows = some_rows(job.held_out, None if last else job.config.eval_rows)
    tokens = job.held_out.take(rows)
    # Clients that are all the same, as before the first round, need to be computed only once.
    num_clients = len(stack.factors[Factor.A])
    alike = all(bool((value == value[:1]).all()) for value in stack.factors.values())
    models = {
        factor: value[:1] if alike else torch.cat([value, mean(value)])
        for factor, value in stack.factors.items()
    }
    logits = evaluate(job.backbone, models, tokens, job.config)
    if alike:
        logits = logits.expand(num_clients + 1, -1, -1)
    losses = [float(loss) for loss in _losses(logits, tokens.labels)]
    scores = [job.score(client, tokens.labels) for client in logits.numpy()]
    return Evaluated(
        round=round_,
        rows=len(rows),
        scores=scores[:num_clients],
        losses=losses[:num_clients],
        averaged_score=scores[-1],
        averaged_loss=losses[-1],
        seconds=time.perf_counter() - begin,
    )


def names(factors: Factor) -> str:
    """`B`, `A|B`, or `-` for none."""
    return (factors.name if factors else None) or "-"


def _losses(logits: Tensor, labels: np.ndarray) -> Tensor:
    everyone = torch.from_numpy(labels).repeat(len(logits))
    return batch_losses(logits, everyone)


def check_finite(losses: np.ndarray, clients: Sequence[int], round_: int, lr: float) -> None:
    """Raise a `ValueError` if a client's loss (n,) is no longer finite."""
    bad = [str(clients[int(k)]) for k in np.flatnonzero(~np.isfinite(losses))]
    if bad:
        raise ValueError(
            f"The loss of client {', '.join(bad)} is not finite in round {round_}: training "
            f"diverged. Lower the learning rate (--lr, now {lr:g}), or clip gradients "
            "(--clip-norm 1)."
        )
