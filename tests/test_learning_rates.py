"""Learning rates over rounds: their values, and that what trains is trained with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import tiny_job
from plait.config import Config
from plait.engines.local_training import local_phase
from plait.experiments.plan import at_rate
from plait.factors import Factor
from plait.learning_rates import lr_factor


def factors(rounds, **settings):
    config = Config(lr=1e-3, rounds=rounds, **settings)
    return [lr_factor(config, t) for t in range(rounds)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"warmup_rounds": 3}, [0.25, 0.5, 0.75, 1, 1]),
        ({"warmup_rounds": 4, "lr_schedule": "cosine"}, [0.2, 0.4, 0.6, 0.8, 1]),
        ({"lr_schedule": "linear", "lr_end": 0.0}, [1, 0.75, 0.5, 0.25, 0]),
        ({"lr_schedule": "linear"}, [1, 0.775, 0.55, 0.325, 0.1]),
        # (1 + cos(pi t / 4)) / 2 of the way from the end.
        ({"lr_schedule": "cosine", "lr_end": 2e-4}, [1, 0.882843, 0.6, 0.317157, 0.2]),
        ({"lr_schedule": "cosine", "lr_end": 0.0, "warmup_rounds": 2}, [1 / 3, 2 / 3, 1, 0.5, 0]),
    ],
)
def test_the_rate_of_each_round(settings, expected):
    assert factors(5, **settings) == pytest.approx(expected, abs=1e-6)


def test_without_a_schedule_nothing_is_rounded():
    assert set(factors(7)) == {1.0}
    assert factors(1, lr_schedule="cosine") == [1.0]


def test_a_round_trains_factors_and_head_at_its_rate():
    config = Config(clients=2, rounds=3, local_steps=2, batch_size=3, rank=2, head="mixed")
    half = dataclasses.replace(config, lr=config.lr / 2, head_lr=config.head_lr / 2)
    falling = dataclasses.replace(config, lr_schedule="linear", lr_end=0)
    ends = []
    for one in (half, falling):
        job = tiny_job(one)
        stack = job.initial_stack()
        train = Factor.AB | Factor.HEAD
        local_phase(job.backbone, stack, train, 1, job.train, job.shares, range(2), one)
        ends.append(stack.factors)
    assert ends[0].keys() == ends[1].keys() == {Factor.A, Factor.B, Factor.HEAD}
    assert all(torch.equal(ends[0][factor], ends[1][factor]) for factor in ends[0])


def test_another_rate_has_the_same_schedule():
    config = Config(lr=1e-3, lr_schedule="cosine", lr_end=2e-4, rounds=5)
    other = at_rate(config, 5e-3)
    assert other.lr == 5e-3
    assert [lr_factor(other, t) for t in range(5)] == pytest.approx(factors(
        5, lr_schedule="cosine", lr_end=2e-4
    ))  # fmt: skip
    assert at_rate(config, 1e-3) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_end": 1e-4}, "lr_schedule constant; give 0 or more, and linear or cosine"),
        ({"lr_end": -1.0, "lr_schedule": "cosine"}, "give 0 or more"),
        ({"warmup_rounds": 3}, "below rounds, 3"),
        ({"warmup_rounds": -1}, "warmup_rounds is -1"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(rounds=3, **settings)
