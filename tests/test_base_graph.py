"""Base-(k+1) graphs: the exact mean after few rounds of few neighbours, for any number."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.base_graph import base_turns
from plait.config import Config
from plait.topology import build_schedule, measure_rho, rho_of


@settings(max_examples=80, deadline=None)
@given(N=st.integers(1, 40), k=st.integers(1, 4))
def test_after_all_turns_everybody_has_the_exact_mean(N, k):
    turns = [turn() for turn in base_turns(N, k)]
    for W in turns:
        np.testing.assert_array_equal(W, W.T)
        np.testing.assert_allclose(W.sum(axis=0), 1, rtol=0, atol=1e-12)
        assert W.min() >= 0
        assert np.count_nonzero(W - np.diag(W.diagonal()), axis=1).max() <= k
    product = functools.reduce(lambda before, W: W @ before, turns)
    np.testing.assert_allclose(product, np.full((N, N), 1 / N), rtol=0, atol=1e-12)
    assert len(turns) <= max(1, 2 * math.log(N, k + 1) + 2)  # theorem 1 of the paper


@pytest.mark.parametrize(
    ("N", "k", "rounds"),  # of the authors' code
    [(5, 1, 5), (6, 1, 4), (7, 1, 5), (8, 1, 3), (24, 1, 6), (25, 1, 9), (6, 2, 2), (35, 3, 6)],
)
def test_there_are_as_many_turns_as_published(N, k, rounds):
    assert len(base_turns(N, k)) == rounds


def test_a_schedule_starts_over_and_its_rho_is_that_of_a_period():
    config = Config(topology="base", clients=10)
    schedule, period = build_schedule(config), len(base_turns(10, 1))
    np.testing.assert_array_equal(schedule(2), schedule(2 + 7 * period))
    whole = measure_rho(schedule, 10, static=False, rounds=7 * period)
    assert rho_of(config) == pytest.approx(whole, abs=1e-12)
