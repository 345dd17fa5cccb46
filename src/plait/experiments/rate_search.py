"""The search for a method's learning rate: a grid, and beyond it while the best is at its edge.

Rates run on the validation split with seeds that aren't reported. What is searched next follows
from the folders of what has ended, so that a search that was cut off goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from plait.experiments.cell_state import state
from plait.experiments.plan import Cell
from plait.runs.run_folder import load_summary

MOST_WIDENINGS = 3
"""Rates beyond the grid, at most."""


def searched_cells(grid: Sequence[float], cells_at: Callable[[float], list[Cell]]) -> list[Cell]:
    """The runs of a search as far as it is known: of the grid, and of rates beyond.

    Args:
        grid: The rates to begin with.
        cells_at: The runs that try a rate.
    """
    cells = [cell for lr in grid for cell in cells_at(lr)]
    for _ in range(MOST_WIDENINGS):
        if (lr := rate_beyond(cells)) is None:
            break
        cells += cells_at(lr)
    return cells


def rate_beyond(cells: Sequence[Cell]) -> float | None:
    """The rate to try next: one further where the best is the lowest or highest of those tried.

    None where it lies between others, runs have yet to end, or a single rate leaves no distance.
    """
    rates, found = sorted({cell.config.lr for cell in cells}), qualities(cells)
    if len(rates) < 2 or any(state(cell)[0] in ("missing", "failed") for cell in cells):
        return None
    best = max(found, key=found.__getitem__, default=rates[0])  # where all diverged, lower
    beyond = {rates[0]: rates[0] ** 2 / rates[1], rates[-1]: rates[-1] ** 2 / rates[-2]}.get(best)
    return None if beyond is None else float(f"{beyond:.3g}")


def best_rate(method: str, cells: Sequence[Cell]) -> float:
    """The rate with the best mean score on the validation split, of those that never diverged.

    Args:
        method: For the message.
        cells: The runs of its search.

    Raises:
        ValueError: All diverged.
    """
    found = qualities(cells)
    if not found:
        raise ValueError(
            f"{method} diverged at every rate of the grid (--lr-grid); give lower ones."
        )
    return max(found, key=found.__getitem__)


def is_at_edge(cells: Iterable[Cell], lr: float) -> bool:
    """Whether a rate is the lowest or highest of those that were tried."""
    rates = [cell.config.lr for cell in cells]
    return lr in (min(rates), max(rates))


def qualities(cells: Iterable[Cell]) -> dict[float, tuple[float, float]]:
    """Rate -> its mean score and less its mean loss, of rates whose runs all finished."""
    by_rate: dict[float, list[Cell]] = {}
    for cell in cells:
        by_rate.setdefault(cell.config.lr, []).append(cell)
    return {
        lr: _quality([load_summary(cell.folder) for cell in some])
        for lr, some in by_rate.items()
        if all(state(cell)[0] == "finished" for cell in some)
    }


def _quality(summaries: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    score, loss = (
        float(np.mean([one[key] for one in summaries]))
        for key in ("accuracy_client_mean", "loss_client_mean")
    )
    return score, -loss
