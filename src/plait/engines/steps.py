"""What every engine does in a round, for the clients whose state it holds: train, and evaluate."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from plait.events import Evaluated
from plait.job import Job, some_rows
from plait.local import batch_losses, evaluate, local_phase
from plait.lora import Stack
from plait.methods import Factor
from plait.mixing import mean
from plait.privacy import Noise, privatise


def train_round(
    job: Job, stack: Stack, round_: int, clients: Sequence[int], noise: Noise
) -> np.ndarray:
    """The local phase of a round, changing `stack` in place; with `dp_clip` it ends private.

    Args:
        job: The prepared run.
        stack: The state of these clients; row k belongs to client `clients[k]`.
        round_: The round's number.
        clients: Which clients the stack holds.
        noise: Where the noise of differential privacy comes from.

    Returns:
        (n,) float64, each client's loss, mean over the steps.

    Raises:
        ValueError: A client's loss is no longer finite.
    """
    active = job.trained(round_)
    reset_moments(stack, active, round_, job)
    private = active & job.travels if job.config.dp_clip is not None else Factor.NONE
    before = {factor: value.clone() for factor, value in stack.factors.items() if factor in private}
    losses: np.ndarray = local_phase(
        job.backbone, stack, active, round_, job.train, job.shares, clients, job.config
    ).mean(axis=1)
    check_finite(losses, clients, round_, job.config.lr)
    if before:
        privatise(before, stack.factors, round_, clients, job.config, noise)
    return losses


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
