"""What a sweep found, as one table: a row for each line of each comparison and each seed.

Runs that serve several rows, such as FFA-LoRA for all T, have the same digest in each of them; the
settings of a row are those of its comparison. Runs of the search are rows of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.engines.fingerprints import fingerprints
from plait.experiments.cell_state import FAILURE, keep_failure, state, waiting
from plait.experiments.executors import CellEnded, Executor
from plait.experiments.plan import Cell
from plait.experiments.sweep import Sweep
from plait.figures import FIGURES
from plait.machine.files import atomically, read_json, write_atomically
from plait.runs.made_by import code_version
from plait.runs.run_folder import MADE_BY, RunFolder, load_summary

if TYPE_CHECKING:
    import pandas as pd

RESULTS = "results.parquet"
IN_SUMMARY = tuple(name for name, one in FIGURES.items() if one.take)


def carried_out(cells: list[Cell], executor: Executor) -> Iterator[Cell]:
    """Carry out the cells that have not ended; failed ones are tried again, diverged ones not.

    Yields:
        Each when it has ended; its folder then says how.

    Raises:
        ValueError: What a finished run read has changed since: the others would read other things.
    """
    for cell in cells:
        if state(cell)[0] == "finished":
            folder = RunFolder(cell.folder, cell.config.rounds)
            folder.check(partial(fingerprints, cell.config))
    todo = waiting(cells)
    for cell in todo:
        (cell.folder / FAILURE).unlink(missing_ok=True)
    for cell, said in executor(todo):
        if not isinstance(said, CellEnded):
            continue
        if said.failure:
            keep_failure(cell, said.failure)
        elif not (cell.folder / MADE_BY).is_file():  # begun by an older plait
            text = json.dumps({"version": code_version()}) + "\n"
            write_atomically(cell.folder / MADE_BY, text)
        yield cell


def failures(sweep: Sweep) -> list[str]:
    """Why runs have no figures, a line for each; a search may have rates that diverge."""
    states = [(cell, *state(cell)) for cell in (*sweep.search, *sweep.reported)]
    search = {cell.folder for cell in sweep.search}
    lines = [
        f"{cell.folder}: {reason}"
        for cell, name, reason in states
        if name == "failed" or (name == "diverged" and cell.folder not in search)
    ]
    lost = {method: None for plan in sweep.plans for method in sweep.lost(plan)}
    return lines + [f"{method}: its search found no learning rate" for method in lost]


# -- the table


def collect(sweep: Sweep) -> pd.DataFrame:
    """The rows of all runs that the sweep's folder has, and of those that it should have.

    Columns: `kind` (`tuning` or `reported`), `label` (the line), `digest` (of the run's config),
    `pilot` (`Plan.pilot`),
    `version` (of the code that finished the run), `state`, `reason`, `folder`; then the settings
    of the comparison with the run's method, lr, seed and eval_split, and the figures of the run.
    """
    import pandas as pd

    rows = []
    for plan in sweep.plans:
        tuning = [cell for m in plan.searched for cell in sweep.tuning_cells(plan, m)]
        rows += [_row(cell, cell.config.to_json(), "tuning", sweep) for cell in tuning]
        settings = plan.config.to_json() | {"pilot": plan.pilot}
        reported = sweep.reported_cells(plan)
        rows += [_row(cell, settings, "reported", sweep) for cell in reported]
    frame = pd.DataFrame(rows)
    # The runs of a search serve many comparisons.
    return frame[(frame["kind"] != "tuning") | ~frame["folder"].duplicated()].reset_index(drop=True)


def _row(cell: Cell, settings: dict[str, Any], kind: str, sweep: Sweep) -> dict[str, Any]:
    made_by = cell.folder / MADE_BY
    name, reason = state(cell)
    summary = load_summary(cell.folder) if name == "finished" else {}
    own = {k: getattr(cell.config, k) for k in ("method", "lr", "seed", "eval_split")}
    return {
        "kind": kind,
        "label": cell.label,
        "digest": cell.config.digest(),
        "version": read_json(made_by).get("version") if made_by.is_file() else None,
        "state": name,
        "reason": reason,
        "folder": str(cell.folder.relative_to(sweep.out)),
        **settings,
        **own,
        **{key: summary.get(key) for key in ("metric", *IN_SUMMARY)},
    }


def save(frame: pd.DataFrame, out: Path) -> None:
    """Write the rows into a sweep's folder.

    Raises:
        ValueError: pyarrow is missing.
        OSError: It can't be written; what was there stays.
    """
    _with_pyarrow(
        lambda: atomically(out / RESULTS, lambda path: frame.to_parquet(path, index=False))
    )


def load(out: Path) -> pd.DataFrame:
    """The rows of a sweep's folder.

    Raises:
        ValueError: It has none, one that can't be read, or pyarrow is missing.
    """
    import pandas as pd

    if not (out / RESULTS).is_file():
        raise ValueError(f"{out} has no {RESULTS}; `plait sweep FILE --out {out}` makes it.")
    try:
        frame: pd.DataFrame = _with_pyarrow(lambda: pd.read_parquet(out / RESULTS))
    except (ValueError, OSError) as error:
        raise ValueError(f"{out / RESULTS} can't be read: {error}") from error
    return frame


def _with_pyarrow(do: Callable[[], Any]) -> Any:
    try:
        return do()
    except ImportError as error:
        raise ValueError("Results need pyarrow: pip install 'plait[sweep]'.") from error
