"""How learning rates change from round to round; within a round they stay.

They rise through the rounds of the warm-up, have their full value in the round after it, and go
from there to their end in the last one. A trained head's rate keeps its proportion to the factors'.

Source: FlowerTune and OpenFedLLM (Ye et al. 2024, arXiv 2402.06954), cosine over rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi

from plait.config import Config
from plait.lookup import lookup

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _done: 0.0,
    "linear": lambda done: done,
    "cosine": lambda done: (1 - cos(pi * done)) / 2,
}
"""Name -> from the share of the rounds that is done to the share of the way to the end that is."""

END = 0.1
"""Where a rate ends without `lr_end`, as a share of it."""


def lr_factor(config: Config, round_: int) -> float:
    """What learning rates are multiplied by in a round, counted from 0.

    Example:
        >>> config = Config(lr=1e-3, lr_schedule="linear", lr_end=0, rounds=5)
        >>> [lr_factor(config, t) for t in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warm = config.warmup_rounds
    if round_ < warm:
        return (round_ + 1) / (warm + 1)
    done = (round_ - warm) / max(1, config.rounds - 1 - warm)
    end = END if config.lr_end is None else config.lr_end / config.lr
    return 1 - (1 - end) * lookup(SCHEDULES, config.lr_schedule, "learning-rate schedule")(done)
