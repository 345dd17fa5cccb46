"""What is learned: losses and answers against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from plait.data.objectives import CLASSIFICATION, OBJECTIVES, REGRESSION
from plait.data.tasks import METRICS


def outputs(places=(3, 4), count=5):
    return torch.randn(*places, count, generator=torch.Generator().manual_seed(0))


def test_classification_is_cross_entropy_and_the_likeliest_class():
    logits, targets = outputs(), np.random.default_rng(0).integers(0, 5, 12)
    losses = CLASSIFICATION.loss(logits.flatten(0, 1), torch.from_numpy(targets))
    answers = CLASSIFICATION.answer(logits)
    assert (losses.shape, answers.shape) == ((12,), (3, 4))
    for place, target in enumerate(targets):
        row = logits.flatten(0, 1)[place].tolist()
        expected = math.log(sum(math.exp(x) for x in row)) - row[target]
        assert losses.flatten()[place].item() == pytest.approx(expected, abs=1e-5)
        assert answers.flatten()[place].item() == row.index(max(row))


def test_regression_is_the_squared_error_of_the_only_output():
    scores = outputs(count=1)
    targets = np.random.default_rng(0).normal(size=12).astype(np.float32)
    losses = REGRESSION.loss(scores.flatten(0, 1), torch.from_numpy(targets))
    expected = (scores[..., 0].flatten().numpy() - targets) ** 2
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-6)
    assert torch.equal(REGRESSION.answer(scores), scores[..., 0])


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_row_has_what_a_run_needs(objective):
    assert OBJECTIVES[objective.name] is objective
    assert objective.metric in METRICS
    assert objective.num_outputs(("a", "b", "c")) == (3 if objective.has_classes else 1)
    targets = np.zeros(12, dtype=objective.target_type)
    logits = outputs(count=objective.num_outputs(("a", "b"))).requires_grad_()
    objective.loss(logits.flatten(0, 1), torch.from_numpy(targets)).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
