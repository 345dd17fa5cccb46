"""How every client's own model and the averaged one do on held-out rows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plait.data.tokens import Tokens
from plait.engines.job import Job
from plait.engines.local_training import evaluate
from plait.events import Evaluated
from plait.factors import Factor
from plait.lora import Stack
from plait.mixing import mean
from plait.rng import stream


@dataclass(frozen=True)
class Judged:
    """How models did on held-out rows: rows, and each model's score and loss."""

    rows: int
    scores: list[float]
    losses: list[float]


def judge(job: Job, models: Mapping[Factor, Tensor], round_: int) -> Judged:
    """Some models (n, P) on the held-out rows that are evaluated after a round."""
    rows = some_rows(job.held_out, job.evaluations.rows_after(round_))
    tokens = job.held_out.take(rows)
    # Models that are all the same, as before the first round, need to be computed only once.
    num_models = len(models[Factor.A])
    alike = all(bool((value == value[:1]).all()) for value in models.values())
    distinct = {factor: value[:1] if alike else value for factor, value in models.items()}
    losses, answers = evaluate(job.backbone, distinct, tokens)
    found, right = answers.numpy(), tokens.targets
    if job.choices:
        some = job.choices.take(rows)
        found, right = some.chosen(evaluate(job.backbone, distinct, some.tokens)[0]), some.right
    scores = [job.score(client, right) for client in found]
    copies = num_models if alike else 1
    return Judged(len(rows), scores * copies, losses.mean(dim=1).tolist() * copies)


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


def some_rows(tokens: Tokens, count: int | None) -> np.ndarray:
    """`count` rows of a split, the same ones in every run, in ascending order; all for None."""
    if count is None or count >= len(tokens):
        return np.arange(len(tokens))
    return np.sort(stream(0, "eval_rows").choice(len(tokens), count, replace=False))
