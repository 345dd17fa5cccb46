"""Figures of a run's whole course: not where it ended, but how it got there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from plait.events import Evaluated, Event

Scores = list[tuple[int, float]]
"""(round, mean score of the clients) of each evaluation, the one before the first round -1."""


def _before(scores: Scores) -> float:
    """Before the first round: what the base says."""
    return scores[0][1]


def _area(scores: Scores) -> float:
    """The mean over evaluations between the first and the last."""
    return float(np.mean([score for _, score in scores[1:-1]])) if len(scores) > 2 else np.nan


def _roughness(scores: Scores) -> float:
    """How unevenly it changes: the standard deviation of the changes between evaluations."""
    changes = np.diff([score for _, score in scores])
    return float(np.std(changes, ddof=1)) if len(changes) > 1 else np.nan


def _at_half(scores: Scores) -> float:
    """After half of the rounds, and so of the bytes: of the first evaluation from there on."""
    half = (scores[-1][0] + 1) / 2
    return next(score for round_, score in scores if round_ + 1 >= half)


CURVES: dict[str, Callable[[Scores], float]] = {
    "before": _before,
    "area": _area,
    "roughness": _roughness,
    "at_half": _at_half,
}


def curve_figures(events: Sequence[Event]) -> dict[str, float]:
    """The `CURVES` of a finished run's events."""
    scores = [(e.round, float(np.mean(e.scores))) for e in events if isinstance(e, Evaluated)]
    return {name: value(scores) for name, value in CURVES.items()}
