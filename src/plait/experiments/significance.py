"""Is the difference real? Means with intervals, paired over seeds, corrected for many looks.

Two methods that run on the same seed share the partition, the graphs and the batches, so their
difference on a seed has much less spread than either score. With n seeds and differences d_k,

    mean(d) +- t_{n-1} s / sqrt(n),    p = P(|T_{n-1}| >= |mean(d)| sqrt(n) / s)

and the p-values of all comparisons made in one table are adjusted by Holm (1979).

Where seeds are added until intervals are short enough, n follows from the spread s of the first m
of them alone, and s and m - 1 degrees stay what they were (Stein 1945, A two-sample test for a
linear hypothesis whose power is independent of the variance). As mean and spread of normal
differences are independent, the error rates hold exactly, however many were added. Looking again
after each seed would not have that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

STAR = " *"
LEVEL = 0.95
"""Confidence of every interval; a difference is significant when its adjusted p <= 1 - LEVEL."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with what can be said about its error.

    `low` and `high` bound the confidence interval; they are None for a single seed. `p` is the
    two-sided t-test of the mean against 0, None where the seeds show no spread to test against.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None

    def shown(self, sign: str = "") -> str:
        """The mean to three digits with the reach of its interval; `sign` is `+` or nothing."""
        reach = "" if self.high is None else f" ± {self.high - self.mean:.3f}"
        return f"{self.mean:{sign}.3f}{reach}"


def estimate(values: Sequence[float], pilot: int | None = None) -> Estimate:
    """The mean of `values` (n,), its t interval, and the t-test against zero.

    Args:
        values: Of a seed each.
        pilot: From the spread of how many of them, the first, their number followed; their number
            was given if None.

    Example:
        >>> estimate([1.0, 2.0, 3.0])  # doctest: +ELLIPSIS
        Estimate(mean=2.0, low=-0.484..., high=4.484..., p=0.074...)
    """
    from scipy.stats import t as student  # half a second to import

    mean = float(np.mean(values))
    first = values[:pilot]
    if len(first) < 2:
        return Estimate(mean, None, None, None)
    degrees = len(first) - 1
    error = float(np.std(first, ddof=1)) / math.sqrt(len(values))
    reach = float(student.ppf((1 + LEVEL) / 2, degrees)) * error
    # Rounding leaves a spread of 1e-17 between equal differences; that is no spread.
    spread = error > 1e-12 * max(1.0, abs(mean))
    p = 2 * float(student.sf(abs(mean) / error, degrees)) if spread else None
    return Estimate(mean, mean - reach, mean + reach, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject those at most alpha, with family-wise error alpha.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Difference:
    """The reference method's score minus a rival's, over paired seeds.

    `p_holm` is adjusted for all comparisons of the table.
    """

    rival: str
    estimate: Estimate
    p_holm: float | None

    @property
    def significant(self) -> bool:
        """Whether chance is an unlikely explanation of the difference."""
        return self.p_holm is not None and self.p_holm <= 1 - LEVEL

    @property
    def shown(self) -> str:
        """It as a cell of a table, starred where it is significant."""
        return self.estimate.shown("+") + STAR * self.significant


def differences(
    scores: Mapping[str, Sequence[float]], reference: str, pilot: int | None = None
) -> list[Difference]:
    """The reference against every other method.

    Args:
        scores: Label -> (n,) scores, the same seeds in the same order for all.
        reference: The label that is compared with the others.
        pilot: As for `estimate`.
    """
    mine = np.array(scores[reference])
    found = {
        label: estimate((mine - np.array(theirs)).tolist(), pilot)
        for label, theirs in scores.items()
        if label != reference
    }
    tested = {label: one.p for label, one in found.items() if one.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return [Difference(label, one, adjusted.get(label)) for label, one in found.items()]


def seeds_needed(
    scores: Mapping[str, Sequence[float]], reference: str, reach: float, at_most: int
) -> int:
    """How many seeds it takes until each difference's interval reaches no further (Stein 1945).

    Args:
        scores: Label -> (m,) scores of the first seeds.
        reference: The label that is compared with the others.
        reach: Half of the interval's length.
        at_most: Not more than these.

    Example:
        >>> seeds_needed({"a": [0.9, 0.8, 0.9], "b": [0.7, 0.7, 0.8]}, "a", 0.1, at_most=20)
        7
    """
    m = len(scores[reference])
    found = (one.estimate for one in differences(scores, reference))
    reaches = (one.high - one.mean for one in found if one.high is not None)
    needed = max((math.ceil(m * (one / reach) ** 2 - 1e-9) for one in reaches), default=m)
    return max(m, min(needed, at_most))


def rows_interval(apart: Sequence[np.ndarray], draws: int = 2000) -> tuple[float, float]:
    """A bootstrap interval of a mean difference over seeds *and* test rows, both drawn anew.

    The t interval is of other seeds on the same test rows; this one is of other rows, too
    (Owen 2007, The pigeonhole bootstrap, arXiv 0712.1111).

    Args:
        apart: For each task (n, rows), the difference on each test row with each of n seeds; the
            mean over tasks is what counts.
        draws: How many times to draw.

    Returns:
        Its percentiles (1 - LEVEL) / 2 and (1 + LEVEL) / 2.
    """
    random, seeds = np.random.default_rng(0), len(apart[0])
    of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    means = np.zeros(draws)
    for task in apart:
        rows = task.shape[1]
        of_rows = random.multinomial(rows, np.full(rows, 1 / rows), draws) / rows
        means += ((of_seeds @ task) * of_rows).sum(axis=1) / len(apart)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def stands_out(scores: Mapping[str, Sequence[float]], pilot: int | None = None) -> str | None:
    """The label with the best mean, if it is significantly better than each of the others.

    Which one is best is known only after looking, so the p-values of all pairs are adjusted.

    Args:
        scores: Label -> (n,) scores, the same seeds in the same order for all.
        pilot: As for `estimate`.
    """
    if len(scores) < 2:
        return None
    best = max(scores, key=lambda label: float(np.mean(scores[label])))
    pairs = list(itertools.combinations(scores, 2))
    tests = [
        estimate((np.array(scores[a]) - np.array(scores[b])).tolist(), pilot).p for a, b in pairs
    ]
    tested = [(pair, p) for pair, p in zip(pairs, tests, strict=True) if p is not None]
    adjusted = holm([p for _, p in tested])
    beaten = [pair for (pair, _), p in zip(tested, adjusted, strict=True) if p <= 1 - LEVEL]
    return best if sum(best in pair for pair in beaten) == len(scores) - 1 else None
