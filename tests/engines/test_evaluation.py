"""What an evaluation says of models, by the logits of each and in words of scikit-learn's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from conftest import tiny_job
from plait.config import Config
from plait.engines.evaluation import evaluation
from plait.engines.job import Job
from plait.lora import Stack
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
    found = evaluation(job, stack, 1)
    for client, logits in enumerate(all_logits(job.backbone, stack.factors, job.held_out)):
        wanted = roc_auc_score(
            job.held_out.labels, logits.softmax(dim=-1).numpy(), multi_class="ovr"
        )
        assert found.scores[client] == pytest.approx(wanted, abs=1e-6)
    assert len(set(found.scores)) > 1
    assert np.isfinite(found.losses).all()
