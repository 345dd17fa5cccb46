"""What every engine does in a round, for the clients whose state it holds, and what it says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.engines.job import Job, some_rows
from plait.engines.local_training import batch_losses, evaluate, local_phase
from plait.events import Evaluated, RoundDone
from plait.factors import Factor
from plait.lora import Stack
from plait.mixing import mean, neighbour_weights
from plait.privacy import Noise, privatise
from plait.topology import rho_of_round


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


@dataclass(frozen=True)
class Judged:
    """How models did on held-out rows: rows, and each model's score and loss."""

    rows: int
    scores: list[float]
    losses: list[float]


def judge(job: Job, models: dict[Factor, Tensor], round_: int) -> Judged:
    """Some models (n, P) on the held-out rows that are evaluated after a round."""
    last = round_ + 1 == job.config.rounds
    rows = some_rows(job.held_out, None if last else job.config.eval_rows)
    tokens = job.held_out.take(rows)
    # Models that are all the same, as before the first round, need to be computed only once.
    num_models = len(models[Factor.A])
    alike = all(bool((value == value[:1]).all()) for value in models.values())
    distinct = {factor: value[:1] if alike else value for factor, value in models.items()}
    logits = evaluate(job.backbone, distinct, tokens, job.config)
    if alike:
        logits = logits.expand(num_models, -1, -1)
    return Judged(
        rows=len(rows),
        scores=[job.score(client, tokens.labels) for client in logits.numpy()],
        losses=[float(loss) for loss in _losses(logits, tokens.labels)],
    )


def evaluation(job: Job, stack: Stack, round_: int) -> Evaluated:
    """Every client's own model, and the averaged one, on the held-out rows."""
    begin = time.perf_counter()
    models = {factor: torch.cat([value, mean(value)]) for factor, value in stack.factors.items()}
    return evaluated(round_, judge(job, models, round_), time.perf_counter() - begin)


def evaluated(round_: int, judged: Judged, seconds: float) -> Evaluated:
    """What is said of an evaluation of every client's own model and, last, the averaged one."""
    return Evaluated(
        round=round_,
        rows=judged.rows,
        scores=judged.scores[:-1],
        losses=judged.losses[:-1],
        averaged_score=judged.scores[-1],
        averaged_loss=judged.losses[-1],
        seconds=seconds,
    )


def round_done(
    job: Job, round_: int, clients: range, losses: np.ndarray, **measured: Any
) -> RoundDone:
    """What is said of a round of some clients, as far as it follows from the job.

    Args:
        job: The prepared run.
        round_: The round's number.
        clients: Which clients.
        losses: (n,) their training losses.
        **measured: The other fields of the event.
    """
    W = job.schedule(round_)
    shared = job.shared(round_)
    pairs = np.argwhere(neighbour_weights(W)).tolist()
    edges = [(i, j, float(W[i, j])) for i, j in pairs if i in clients]
    layout = job.backbone.layout
    return RoundDone(
        round=round_,
        active=names(job.trained(round_)),
        shared=names(shared),
        train_losses=losses.tolist(),
        edges=edges,
        rho=rho_of_round(W),
        sent_bytes=sum(4 * layout.size(f) for f in layout.factors if f in shared) * len(edges),
        **measured,
    )


def names(factors: Factor) -> str:
    """`B`, `AB`, `A|B|HEAD`, or `-` for none."""
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
