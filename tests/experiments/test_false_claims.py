"""How often the whole procedure claims a difference where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from plait.experiments.significance import differences, seeds_needed

METHODS = ("adf", "dec-lora", "ffa", "rolora")
RATES, PILOT, AT_MOST, REACH = 4, 5, 20, 0.01
COMPARISONS = 1000


def comparison(random: np.random.Generator) -> bool:
    """Whether a comparison of methods that are alike claims anything.

    Of each method the best of some rates on noisy validation scores is taken; that it is the best
    says nothing of its test scores. A seed moves all methods alike, and each a little by itself.
    """
    rate = {m: int(random.normal(0.8, 0.02, (RATES, 2)).mean(axis=1).argmax()) for m in METHODS}
    common = random.normal(0.8, 0.03, AT_MOST)
    scores = {m: common + random.normal(0, 0.012, (RATES, AT_MOST))[rate[m]] for m in METHODS}
    first = {method: some[:PILOT].tolist() for method, some in scores.items()}
    n = seeds_needed(first, "adf", REACH, AT_MOST)
    found = differences({m: some[:n].tolist() for m, some in scores.items()}, "adf", PILOT)
    return any(one.significant for one in found)


def test_methods_that_are_alike_are_told_apart_in_at_most_6_of_100_comparisons():
    random = np.random.default_rng(0)
    claimed = sum(comparison(random) for _ in range(COMPARISONS))
    assert 0.01 * COMPARISONS < claimed <= 0.06 * COMPARISONS


@pytest.mark.parametrize("reach", [0.005, 0.02])
def test_steins_intervals_are_as_short_as_was_asked_for(reach):
    random = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        apart = random.normal(0.03, 0.012, 1000)
        n = seeds_needed({"a": apart[:5].tolist(), "b": [0.0] * 5}, "a", reach, at_most=1000)
        (one,) = differences({"a": apart[:n].tolist(), "b": [0.0] * n}, "a", pilot=5)
        assert one.estimate.high - one.estimate.mean <= reach * (1 + 1e-9) or n == 5
        held += one.estimate.low <= 0.03 <= one.estimate.high
    assert held == pytest.approx(0.95 * 300, abs=12)
