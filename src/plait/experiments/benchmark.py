"""The benchmark: sweeps on fixed settings that together answer the claims of claims.py.

    DIR/main/, DIR/switching/, ...   a sweep for each part (sweep.py)
    DIR/results.parquet              the rows of all parts
    DIR/benchmark.md, claims.png     the page (report/benchmark_page.py)

A size is a folder of sweep files: S takes minutes and what is installed, M hours of two cores and
the GLUE archive, L the published protocol, a card and the hub.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.config import Config
from plait.events import Evaluated
from plait.experiments import results
from plait.experiments.cell_state import state
from plait.experiments.claims import SUITES, Finding, judged
from plait.experiments.curves import CURVES, curve_figures
from plait.experiments.plan import Cell
from plait.experiments.sweep import Sweep, load_sweep
from plait.figures import summarize
from plait.runs.run_folder import load_config, load_events, load_summary

if TYPE_CHECKING:
    import pandas as pd

SIZES = ("S", "M", "L")


def parts_of(
    size: str,
    out: Path,
    only: Sequence[str] = (),
    until: float | None = None,
    at_most: int | None = None,
    glue_dir: str | None = None,
) -> dict[str, Sweep]:
    """The parts of a benchmark, by name.

    Args:
        size: One of `SIZES`.
        out: The folder of the benchmark.
        only: Some parts alone; all if empty.
        until: In the place of what the files say: `Plan.until`.
        at_most: Likewise.
        glue_dir: The setting of this name.

    Raises:
        ValueError: There is no such part.
        OSError: A file can't be read.
    """
    files = {file.stem: file for file in sorted((SUITES / size).glob("*.toml"))}
    if unknown := [name for name in only if name not in files]:
        raise ValueError(f"Size {size} has no part {unknown[0]!r}; there are: {', '.join(files)}.")
    given = {"until": until, "at_most": at_most}
    changes = {name: value for name, value in given.items() if value is not None}
    return {
        name: _changed(load_sweep(file, out / name), changes, glue_dir)
        for name, file in files.items()
        if not only or name in only
    }


def _changed(sweep: Sweep, changes: Mapping[str, Any], glue_dir: str | None) -> Sweep:
    """The sweep with other rules for how many seeds there are, and the place of GLUE."""

    def at(config: Config) -> Config:
        return dataclasses.replace(config, glue_dir=glue_dir)

    plans = [dataclasses.replace(one, config=at(one.config), **changes) for one in sweep.plans]
    return dataclasses.replace(sweep, config=at(sweep.config), plans=plans)


def collect(parts: dict[str, Sweep]) -> pd.DataFrame:
    """The rows of all parts, as `results.collect` has them, with `part`, `path` and `CURVES`."""
    import pandas as pd

    frames = [results.collect(sweep).assign(part=name) for name, sweep in parts.items()]
    frame = pd.concat(frames, ignore_index=True)
    outs = {name: sweep.out for name, sweep in parts.items()}
    paths = [
        outs[part] / folder for part, folder in zip(frame["part"], frame["folder"], strict=True)
    ]
    known: dict[Path, dict[str, float]] = {}
    for path, ended in zip(paths, frame["state"], strict=True):
        if ended == "finished" and path not in known:
            known[path] = curve_figures(load_events(path))
    empty = dict.fromkeys(CURVES, np.nan)
    curves = pd.DataFrame([known.get(path, empty) for path in paths])
    return pd.concat([frame.assign(path=list(map(str, paths))), curves], axis=1)


def hits_of(folder: Path) -> np.ndarray:
    """(rows,) the share of a run's clients that were right on each test row; empty if not known."""
    ends = [event for event in load_events(folder) if isinstance(event, Evaluated)]
    return np.array(ends[-1].hits) / len(ends[-1].scores)


def findings(frame: pd.DataFrame) -> list[Finding]:
    """What the rows of a benchmark say of the claims."""
    return judged(frame, cache(hits_of))  # a run serves many claims


def faults(parts: dict[str, Sweep], out: Path) -> list[str]:
    """What doesn't agree in a benchmark's folder, a line each: for one who is given it.

    Every run that the files ask for is there with its own settings and as many rounds, its summary
    follows from its events, and the table from the runs.
    """
    found = []
    for sweep in parts.values():
        for cell in (*sweep.search, *sweep.reported):
            name, reason = state(cell)
            if name in ("missing", "failed"):
                found.append(f"{cell.folder}: the run is {name}. {reason}".strip())
            elif name == "finished":
                found += [f"{cell.folder}: {what}" for what in _faults_of_run(cell)]
    if found:
        return found
    with TemporaryDirectory() as scratch:  # a file has types of its own
        results.save(collect(parts).drop(columns="path"), Path(scratch))
        same = results.load(Path(scratch)).equals(results.load(out))
    return [] if same else [f"{out / results.RESULTS}: isn't what the runs say"]


def _faults_of_run(cell: Cell) -> list[str]:
    config, events = load_config(cell.folder), load_events(cell.folder)
    summary, now = load_summary(cell.folder), summarize(config, events)
    wrong = [name for name, value in now.items() if not _same(summary.get(name), value)]
    found = [f"its summary has another {name} than its events" for name in wrong]
    if config.resolved() != cell.config.resolved():
        found.append("it has other settings than the benchmark")
    return found


def _same(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.isclose(a, b, rtol=1e-9, equal_nan=True))
    return a == b
