"""What an evaluation says of models, by the logits of each and in words of scikit-learn's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from conftest import tiny_job
from plait.config import Config
from plait.engines.evaluation import evaluation, judge
from plait.engines.job import Job
from plait.events import together
from plait.figures import class_scores, macro_f1
from plait.lora import Stack
from plait.mixing import mean
from twin import all_logits

CONFIG = Config(clients=3, rounds=2, rank=4, topology="ring", eval_every=1)


def scattered(job: Job) -> Stack:
    """Clients that differ."""
    stack = job.initial_stack()
    generator = torch.Generator().manual_seed(0)
    for value in stack.factors.values():
        value += 0.3 * torch.randn(value.shape, generator=generator)
    return stack


def test_auroc_is_of_the_outputs():
    job = tiny_job(CONFIG)
    job = dataclasses.replace(job, task=dataclasses.replace(job.task, metric="auroc"))
    stack = scattered(job)
    found = evaluation(job, stack, range(3), 1)
    for client, logits in enumerate(all_logits(job.backbone, stack.factors, job.held_out)):
        wanted = roc_auc_score(
            job.held_out.labels, logits.softmax(dim=-1).numpy(), multi_class="ovr"
        )
        assert found.scores[client] == pytest.approx(wanted, abs=1e-6)
    assert len(set(found.scores)) > 1
    assert np.isfinite(found.losses).all()


@pytest.mark.parametrize("metric", ["accuracy", "auroc"])
def test_the_last_evaluation_counts_what_was_called_what(metric):
    job = tiny_job(CONFIG)
    job = dataclasses.replace(job, task=dataclasses.replace(job.task, metric=metric))
    stack = scattered(job)
    assert evaluation(job, stack, range(3), 0).confusion == []
    found = evaluation(job, stack, range(3), 1)
    called = all_logits(job.backbone, stack.factors, job.held_out).argmax(dim=-1).numpy()
    labels = np.tile(job.held_out.labels, 3)
    assert found.confusion == confusion_matrix(labels, called.ravel()).tolist()
    assert np.sum(found.averaged_confusion) == len(job.held_out)
    assert found.hits == (called == labels[: len(job.held_out)]).sum(axis=0).tolist()
    wanted = precision_recall_fscore_support(labels, called.ravel(), zero_division=0.0)
    np.testing.assert_allclose(class_scores(found.confusion), np.stack(wanted[:3], axis=1))
    assert macro_f1(found.confusion) == pytest.approx(wanted[2].mean())


def test_clients_that_are_alike_count_each():
    job = tiny_job(CONFIG)
    found = evaluation(job, job.initial_stack(), range(3), 1)
    assert found.confusion == (3 * np.array(found.averaged_confusion)).tolist()


def test_clients_are_judged_on_rows_of_their_own_where_all_are_evaluated():
    job = tiny_job(dataclasses.replace(CONFIG, test_split="client", eval_rows=7))
    stack = scattered(job)
    assert evaluation(job, stack, range(3), 0).own_scores == []
    found = evaluation(job, stack, range(3), 1)
    called = all_logits(job.backbone, stack.factors, job.held_out).argmax(dim=-1).numpy()
    right = called == job.held_out.labels
    assert found.own_scores == pytest.approx([right[k][job.own_rows[k]].mean() for k in range(3)])
    assert found.own_rows == [len(rows) for rows in job.own_rows]
    assert len({tuple(rows) for rows in job.own_rows}) == 3
    alone = judge(job, {f: value[[1]] for f, value in stack.factors.items()}, [1], 1)
    assert alone.own_scores == found.own_scores[1:2]


def test_of_some_clients_each_it_is_the_same_together():
    job = tiny_job(dataclasses.replace(CONFIG, test_split="client"))
    stack = scattered(job)
    whole = evaluation(job, stack, range(3), 1)
    models = {factor: torch.cat([value, mean(value)]) for factor, value in stack.factors.items()}
    some, others = ({f: v[rows] for f, v in models.items()} for rows in ([0, 1, 3], [2]))
    parts = [judge(job, some, [0, 1], 1), judge(job, others, [2], 1)]
    assert np.isnan(parts[1].averaged_loss)
    assert dataclasses.replace(together(parts), seconds=whole.seconds) == whole
