"""How every client's own model and the averaged one do on held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence, Sized

import numpy as np
import torch
from torch import Tensor

from plait.data.objectives import LANGUAGE, Objective
from plait.data.tasks import Task
from plait.data.tokens import Tokens
from plait.engines.job import Job
from plait.engines.local_training import evaluate
from plait.events import Evaluated
from plait.factors import Factor
from plait.lora import Stack
from plait.model.backbone import Backbone
from plait.rng import stream
from plait.site_mixing import mean_client

Evaluator = Callable[
    [Backbone, Mapping[Factor, Tensor], Tokens, Objective | None], tuple[Tensor, Tensor]
]
"""What `local_training.evaluate` is."""


def judge(
    job: Job,
    models: Mapping[Factor, Tensor],
    clients: Sequence[int],
    round_: int,
    evaluate: Evaluator = evaluate,
) -> Evaluated:
    """Some models on the held-out rows that are evaluated after a round.

    Args:
        job: The prepared run.
        models: Factor -> (n, P), the own models of some clients, and perhaps the averaged one.
        clients: The numbers of these.
        round_: The round that was just done.
        evaluate: Computes it.

    Returns:
        What is said of it, NaN of the averaged model where it isn't there.
    """
    begin = time.perf_counter()
    rows = some_rows(job.held_out, job.evaluations.rows_after(round_))
    tokens = job.held_out.take(rows)
    # Models that are all the same, as before the first round, need to be computed only once.
    num_models, own = len(models[Factor.A]), len(clients)
    alike = all(bool((value == value[:1]).all()) for value in models.values())
    distinct = {factor: value[:1] if alike else value for factor, value in models.items()}
    losses, found = evaluate(job.backbone, distinct, tokens, job.judged)
    answers, right, copies = found.numpy(), tokens.targets, num_models if alike else 1
    if job.choices:
        some = job.choices.take(rows)
        of_options, _ = evaluate(job.backbone, distinct, some.tokens, None)
        answers, right = some.chosen(of_options), some.right
    scores = [job.score(one, right) for one in answers] * copies
    means = losses.mean(dim=1).tolist() * copies
    whose = np.zeros(num_models, int) if alike else np.arange(num_models)
    last = round_ + 1 == job.evaluations.rounds or job.config.stop_after is not None
    called = classes(job.task, answers) if last else None
    tables = [
        confusion(called[some], tokens.labels, job.task.num_outputs)
        if called is not None and len(some)
        else []
        for some in (whose[:own], whose[own:])
    ]
    of_tokens = last and job.task.objective is LANGUAGE and job.choices is None
    chosen = answers if last and (job.choices or of_tokens) else called
    hits = [] if chosen is None else (chosen == right)[whose[:own]].sum(axis=0)
    if of_tokens:
        hits = np.diff(np.cumsum([0, *hits])[tokens.asked_offsets])
    whole = job.own_rows and len(rows) == len(job.held_out)
    chosen_rows = [job.own_rows[client] for client in clients] if whole else []
    return Evaluated(
        round=round_,
        rows=len(rows),
        scores=scores[:own],
        losses=means[:own],
        averaged_score=[*scores[own:], math.nan][0],
        averaged_loss=[*means[own:], math.nan][0],
        seconds=time.perf_counter() - begin,
        confusion=tables[0],
        averaged_confusion=tables[1],
        hits=list(map(int, hits)),
        asked=np.diff(tokens.asked_offsets).tolist() if of_tokens else [],
        own_scores=[
            job.score(answers[k][chosen], tokens.labels[chosen])
            for k, chosen in zip(whose, chosen_rows, strict=False)
        ],
        own_rows=list(map(len, chosen_rows)),
    )


def classes(task: Task, answers: np.ndarray) -> np.ndarray | None:
    """(n, Q) the classes of answers (n, Q) or outputs (n, Q, C); None of a task without classes."""
    if not task.objective.has_classes:
        return None
    if answers.ndim == 2:
        return answers
    found: np.ndarray = task.objective.answer(torch.from_numpy(answers)).numpy()
    return found


def confusion(called: np.ndarray, labels: np.ndarray, C: int) -> list[list[int]]:
    """(C, C) how many rows of each class some models, all together, called each class.

    Args:
        called: (n, Q) the classes that each of n models called.
        labels: (Q,) the classes.
        C: How many there are.
    """
    counts = np.bincount((labels * C + called).ravel(), minlength=C * C)
    table: list[list[int]] = counts.reshape(C, C).tolist()
    return table


def evaluation(
    job: Job,
    stack: Stack,
    clients: Sequence[int],
    round_: int,
    evaluate: Evaluator = evaluate,
) -> Evaluated:
    """The own models of these clients, which the stack holds, and the averaged one."""
    averaged = mean_client(job.backbone.layout, stack.factors)
    models = {f: torch.cat([value, averaged[f]]) for f, value in stack.factors.items()}
    return judge(job, models, clients, round_, evaluate)


def some_rows(split: Sized, count: int | None, purpose: str = "eval_rows") -> np.ndarray:
    """`count` rows of a split, the same ones in every run, in ascending order; all for None."""
    if count is None or count >= len(split):
        return np.arange(len(split))
    return np.sort(stream(0, purpose).choice(len(split), count, replace=False))
