"""Evaluation in pieces: the losses and answers of each client's model on every text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from plait.config import Config, Machine
from plait.data.objectives import REGRESSION
from plait.engines.local_training import evaluate
from twin import all_logits, setup


@pytest.mark.parametrize("chunk_tokens", [1, 60, 100_000])
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_losses_and_answers_are_those_of_the_logits(architecture, chunk_tokens, ragged_tokens):
    config, machine = Config(clients=3, rank=4), Machine(chunk_tokens=chunk_tokens)
    _, backbone, stack, _, _ = setup(architecture, config, ragged_tokens, machine=machine)
    logits = all_logits(backbone, stack.factors, ragged_tokens)
    losses, answers = evaluate(backbone, stack.factors, ragged_tokens)
    labels = torch.from_numpy(ragged_tokens.labels)
    expected = torch.stack(
        [functional.cross_entropy(own, labels, reduction="none") for own in logits]
    )
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert torch.equal(answers, logits.argmax(dim=-1))
    assert len(torch.unique(answers)) > 1
    assert (losses.std(dim=0) > 1e-5).all(), "clients differ"


def test_scores_are_answered_as_they_are(ragged_tokens):
    targets = np.random.default_rng(0).normal(size=len(ragged_tokens)).astype(np.float32)
    tokens = dataclasses.replace(ragged_tokens, labels=targets)
    config = Config(clients=3, rank=4)
    _, backbone, stack, _, _ = setup("bert", config, tokens, objective=REGRESSION)
    outputs = all_logits(backbone, stack.factors, tokens)[..., 0]
    losses, answers = evaluate(backbone, stack.factors, tokens)
    expected = (outputs - torch.from_numpy(targets)) ** 2
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(answers, outputs, rtol=0, atol=1e-5)
