"""How a run of a comparison or a sweep stands, by what is in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from plait.experiments.plan import Cell
from plait.machine.files import read_json, write_atomically

FAILURE = "failure.json"


@dataclass(frozen=True)
class Failure:
    """Why a run has no result.

    Attributes:
        reason: In words.
        diverged: Training diverged: it would again, so the run is not tried again.
        out_of_memory: There was too little memory, perhaps for several runs at once.
    """

    reason: str
    diverged: bool = False
    out_of_memory: bool = False


def state(cell: Cell) -> tuple[str, str]:
    """`finished`, `diverged`, `failed` or `missing`, and the reason of a failure.

    Raises:
        ValueError: What says so is damaged.
    """
    if (cell.folder / "summary.json").is_file():
        return "finished", ""
    if (cell.folder / FAILURE).is_file():
        said = read_json(cell.folder / FAILURE)
        return "diverged" if said.get("diverged") else "failed", str(said.get("reason", ""))
    return "missing", ""


def keep_failure(cell: Cell, failure: Failure) -> None:
    """Write into a run's folder why it has no result."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(cell.folder / FAILURE, json.dumps(vars(failure)) + "\n")


def waiting(cells: Iterable[Cell]) -> list[Cell]:
    """The cells that are to be carried out: those with neither figures nor a diverged training."""
    return [cell for cell in cells if state(cell)[0] in ("missing", "failed")]


def in_turns(runs: Callable[[], Iterable[Cell]]) -> Iterator[list[Cell]]:
    """Runs of which the next follow from what has ended: those that are new, as long as any are.

    Args:
        runs: All that are known by now.
    """
    tried: set[Path] = set()
    while cells := [cell for cell in runs() if cell.folder not in tried]:
        yield cells
        tried |= {cell.folder for cell in cells}
