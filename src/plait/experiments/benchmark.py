"""The benchmark: sweeps on fixed settings that together answer the claims of claims.py.

    DIR/main/, DIR/switching/, ...   a sweep for each part (sweep.py)
    DIR/results.parquet              the rows of all parts, and all that the page needs
    DIR/benchmark.md, claims.png     the page (report/benchmark_page.py)

A part that was run elsewhere is in results.parquet alone.

A size is a folder of sweep files: S takes minutes and what is installed, M hours of two cores and
the GLUE archive, L the published protocol, a card and the hub.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.config import Config
from plait.events import Evaluated, RoundDone
from plait.experiments import results
from plait.experiments.cell_state import state
from plait.experiments.claims import SUITES
from plait.experiments.curves import CURVES, curve_figures
from plait.experiments.plan import Cell
from plait.experiments.sweep import Sweep, load_sweep
from plait.figures import summarize
from plait.machine.files import read_json
from plait.runs.run_folder import MADE_BY, load_config, load_events, load_finished, load_summary

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
        ValueError: There is no such part, a bound on seeds that nothing adds, or the folder's
            results are of another size.
        OSError: A file can't be read.
    """
    if at_most is not None and (until is None or at_most < 1):
        raise ValueError("at_most bounds the seeds that `until` adds: give both, at_most above 0.")
    files = {file.stem: file for file in sorted((SUITES / size).glob("*.toml"))}
    if unknown := [name for name in only if name not in files]:
        raise ValueError(f"Size {size} has no part {unknown[0]!r}; there are: {', '.join(files)}.")
    _recorded(size, out)
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


def _recorded(size: str, out: Path) -> pd.DataFrame | None:
    """The rows that the folder's results have, of parts that were run elsewhere, too."""
    if not (out / results.RESULTS).is_file():
        return None
    rows = results.load(out)
    sizes = set(rows["size"]) if {"size", "part", "state"} <= set(rows.columns) else set()
    if sizes == {size}:
        return rows
    what = f"of size {', '.join(sorted(sizes))}" if sizes else "no benchmark's results"
    raise ValueError(
        f"{out / results.RESULTS} is {what}: give size {size} a folder of its own (--out)."
    )


def collect(parts: dict[str, Sweep], size: str, out: Path | None = None) -> pd.DataFrame:
    """The rows of all parts, as `results.collect` has them, and what a page needs besides.

    Columns: those of `results.collect` but `glue_dir`, a path; `size`; `part`; `CURVES`;
    `processor`, which carried the run out; `hits`, of a reported run what each test row adds to the
    sum of its clients' scores: how many were right there.

    Args:
        parts: The parts.
        size: One of `SIZES`, that of the parts.
        out: The folder of the benchmark: what its results have of a part is kept if there is no
            folder of it, or one with fewer finished runs.
    """
    import pandas as pd

    frames = {}
    for name, one in parts.items():
        if one.out.is_dir() or out is None:
            rows = results.collect(one).drop(columns="glue_dir").assign(size=size, part=name)
            frames[name] = _with_events(rows, one.out)
    if out is not None and (known := _recorded(size, out)) is not None:
        for name in known["part"].unique():
            before = known[known["part"] == name]
            if name not in frames or _finished(before) > _finished(frames[name]):
                frames[name] = before
    found = [frames[name] for name in sorted(frames) if len(frames[name])]
    if not found:
        raise ValueError(f"{out} has no part of this benchmark; `plait benchmark` runs them.")
    return pd.concat(found, ignore_index=True)


def _finished(frame: pd.DataFrame) -> int:
    return int((frame["state"] == "finished").sum())


def _with_events(frame: pd.DataFrame, out: Path) -> pd.DataFrame:
    """The rows of one part with what its runs' folders say of curves, test rows and machine."""
    import pandas as pd

    empty: dict[str, Any] = dict.fromkeys([*CURVES, "hits", "processor"])
    known: dict[str, dict[str, Any]] = {}
    for folder in frame.loc[frame["state"] == "finished", "folder"].unique():
        events = load_finished(out / folder)
        end = next(one for one in reversed(events) if isinstance(one, Evaluated))
        made_by = read_json(out / folder / MADE_BY)
        known[folder] = curve_figures(events) | {
            "hits": weighted_hits(end), "processor": made_by.get("processor")
        }  # fmt: skip
    more = pd.DataFrame([known.get(folder, empty) for folder in frame["folder"]])
    more.loc[frame["kind"] != "reported", "hits"] = None  # of a search nobody asks
    return pd.concat([frame, more], axis=1)


def weighted_hits(end: Evaluated) -> list[float]:
    """(rows,) how many clients were right, or of tokens as much that the mean is the same."""
    tokens = np.mean(end.asked) if end.asked else 1
    return [float(hits / tokens) for hits in end.hits]


def faults(parts: dict[str, Sweep], size: str, out: Path) -> list[str]:
    """What doesn't agree in a benchmark's folder, a line each: for one who is given it.

    Every run that the files ask for is there with its own settings and as many rounds, its summary
    follows from its events, and the table from the runs.
    """
    found = []
    for name, sweep in parts.items():
        try:
            found += _faults_of_part(sweep)
        except (ValueError, KeyError, TypeError) as error:  # whatever somebody has put there
            found.append(f"part {name} can't be read: {error!r}")
    if found:
        return found
    with TemporaryDirectory() as scratch:  # a file has types of its own
        results.save(collect(parts, size), Path(scratch))
        here, there = (_comparable(results.load(one), parts) for one in (Path(scratch), out))
    return [] if here.equals(there) else [f"{out / results.RESULTS}: isn't what the runs say"]


def _comparable(frame: pd.DataFrame, parts: Collection[str]) -> pd.DataFrame:
    """The rows of some parts, whatever types those of others make of their columns."""
    rows = frame[frame["part"].isin(list(parts))].reset_index(drop=True).astype(object)
    return rows.where(rows.notna(), None)


def _faults_of_part(sweep: Sweep) -> list[str]:
    found = []
    for cell in (*sweep.search, *sweep.reported):
        name, _ = state(cell)
        if name == "missing":
            found.append(f"{cell.folder}: the run is missing")
        elif name == "finished":
            found += [f"{cell.folder}: {what}" for what in _faults_of_run(cell)]
    return found + results.failures(sweep)


def _faults_of_run(cell: Cell) -> list[str]:
    try:
        config, events = load_config(cell.folder), load_events(cell.folder)
        summary, now = load_summary(cell.folder), summarize(config, events)
        wrong = [name for name, value in now.items() if not _same(summary.get(name), value)]
        read_json(cell.folder / MADE_BY)["version"]
    except Exception as error:  # whatever somebody has put there
        return [f"its files can't be read: {type(error).__name__}: {error}"]
    found = [f"its summary has another {name} than its events" for name in wrong]
    rounds = [event.round for event in events if isinstance(event, RoundDone)]
    if rounds != list(range(cell.config.rounds)):
        found.append(f"its events are not those of its {cell.config.rounds} rounds")
    if config.digest() != cell.config.digest():
        found.append("it has other settings than the benchmark")
    return found


def _same(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.isclose(a, b, rtol=1e-9, equal_nan=True))
    return a == b
