"""The table of a sweep as papers have it: methods down, tasks across, a block for the other axes.

A cell is the mean over seeds of the clients' mean score with its interval. Under the scores stand
the differences of the first line, or another one, to each of the others, over paired seeds. Both
are those of significance.py. In each column Holm's correction is for all comparisons made in it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.config import Config
from plait.experiments.significance import (
    STAR,
    Difference,
    Estimate,
    differences,
    estimate,
    stands_out,
)  # fmt: skip
from plait.markdown import markdown_table

if TYPE_CHECKING:
    import pandas as pd

SCORE = "accuracy_client_mean"
EDGE = "†"
MEAN = "mean"
"""The column of the mean over tasks."""
Scores = dict[int, float]
"""Seed -> score."""


@dataclass(frozen=True)
class Column:
    """One column: what each line scored.

    Attributes:
        name: The task, or `MEAN`.
        scores: Line -> its scores; a line that was not run, or has no figures, has none.
        reference: The line that is compared with the others.
        at_edge: The lines whose rate is the lowest or the highest of its search.
        pilot: How many seeds decided how many there are; None where their number was given.
    """

    name: str
    scores: dict[str, Scores]
    reference: str
    at_edge: frozenset[str] = frozenset()
    pilot: int | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that all lines with any scores have."""
        there = [set(scores) for scores in self.scores.values() if scores]
        return tuple(sorted(set.intersection(*there))) if there else ()

    @property
    def paired(self) -> dict[str, list[float]]:
        """Line -> (n,) scores of the seeds that all have; lines without scores are left out."""
        return {k: [v[seed] for seed in self.seeds] for k, v in self.scores.items() if v}

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Mean and interval of each line over its own seeds."""
        return {k: estimate([*v.values()], self.pilot) for k, v in self.scores.items() if v}

    @property
    def differences(self) -> dict[str, Difference]:
        """The reference against each other line, by the other."""
        if not self.seeds or self.reference not in self.paired:
            return {}
        return {one.rival: one for one in differences(self.paired, self.reference, self.pilot)}

    @property
    def best(self) -> str | None:
        """The line that is significantly better than every other."""
        complete = self.seeds and len(self.paired) == len(self.scores)
        return stands_out(self.paired, self.pilot) if complete else None


@dataclass(frozen=True)
class TableBlock:
    """The part of the table in which all axes but the task and T are the same.

    Attributes:
        title: The values of these axes, such as `p 0.1`.
        lines: The lines in order.
        columns: A column for each task, and their mean where there are several.
    """

    title: str
    lines: list[str]
    columns: list[Column]


def blocks(frame: pd.DataFrame, reference: str | None = None) -> list[TableBlock]:
    """The blocks of a sweep's rows, as `results.collect` makes them.

    Args:
        frame: The rows.
        reference: The line that is compared with the others; the first if not given.

    Raises:
        ValueError: There are no reported runs, or the reference is none of the lines.
    """
    shown = frame[frame["kind"] == "reported"]
    if shown.empty:
        raise ValueError("The sweep has no reported runs yet; the same `plait sweep` goes on.")
    axes = _axes(shown)
    apart = [name for name in axes if name not in ("task", "switch_every")]
    shown = shown.assign(line=_line_names(shown, axes))
    lines = list(dict.fromkeys(shown["line"]))
    if reference not in (None, *lines):
        raise ValueError(f"There is no line {reference!r}; there are: {', '.join(lines)}.")
    shown = shown.assign(at_edge=_at_edge(frame, shown))
    groups = shown.groupby(apart, sort=False, dropna=False) if apart else [((), shown)]
    return [
        _block(_title(apart, values), rows, lines, reference or lines[0]) for values, rows in groups
    ]


def _axes(shown: pd.DataFrame) -> list[str]:
    """The settings that differ between comparisons."""
    names = set(Config().to_json()) - {"method", "lr", "seed"}
    return [str(k) for k in shown.columns if k in names and shown[k].nunique(dropna=False) > 1]


def _line_names(shown: pd.DataFrame, axes: list[str]) -> list[str]:
    """The label of each row, with T where its runs depend on it."""
    others = [name for name in axes if name != "switch_every"]
    runs = shown.groupby(["label", *others, "seed"], dropna=False)["digest"].nunique()
    depends = runs.groupby("label").max() > 1
    return [
        f"{label} T={T}" if depends[label] else label
        for label, T in zip(shown["label"], shown["switch_every"], strict=True)
    ]


def _at_edge(frame: pd.DataFrame, shown: pd.DataFrame) -> list[bool]:
    """Whether each row's rate is the lowest or highest of those searched for its method and task.

    A control has no search: its rate follows from that of the method it controls.
    """
    tuning = frame[frame["kind"] == "tuning"]
    rates = tuning.groupby(["method", "task"])["lr"].agg(["min", "max"])
    edges = {key: (low, high) for key, low, high in rates.itertuples(name=None)}
    keys = shown[["label", "task", "lr"]].itertuples(index=False, name=None)
    return [lr in edges.get((label, task), ()) for label, task, lr in keys]


def _title(apart: Sequence[str], values: tuple[Any, ...]) -> str:
    pairs = zip(apart, values, strict=True)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in pairs)


def _block(title: str, rows: pd.DataFrame, lines: list[str], reference: str) -> TableBlock:
    tasks = list(dict.fromkeys(rows["task"]))
    scores: dict[str, dict[str, Scores]] = {task: {line: {} for line in lines} for task in tasks}
    finished = rows[rows["state"] == "finished"]
    for row in finished[["task", "line", "seed", SCORE]].itertuples(index=False, name=None):
        task, line, seed, score = row
        scores[task][line][seed] = score
    if len(tasks) > 1:
        scores[MEAN] = {line: _mean([scores[task][line] for task in tasks]) for line in lines}
    edges = rows[rows["at_edge"]].groupby("task")["line"].agg(frozenset)
    # An older plait's rows don't say.
    pilots: Iterable[int] = rows["pilot"].dropna() if "pilot" in rows else []
    pilot = max(map(int, pilots), default=None)
    columns = [
        Column(name, of, reference, edges.get(name, frozenset()), pilot)
        for name, of in scores.items()
    ]
    return TableBlock(title, lines, columns)


def _mean(of_tasks: list[Scores]) -> Scores:
    """The mean over tasks, for the seeds that all tasks have."""
    seeds = set.intersection(*map(set, of_tasks))
    return {seed: float(np.mean([scores[seed] for scores in of_tasks])) for seed in sorted(seeds)}


# -- as text

Grid = list[list[str]]
LATEX = (
    ("_", r"\_"), ("%", r"\%"), ("±", r"$\pm$"), (STAR, r"$^*$"), (EDGE, r"$^\dagger$")
)  # fmt: skip


def _grids(block: TableBlock, bold: str) -> list[Grid]:
    """The scores, and the differences of the reference to the others, if there are any."""
    head = [block.title, *(column.name for column in block.columns)]
    scores = [[line, *(_score(c, line, bold) for c in block.columns)] for line in block.lines]
    reference = block.columns[0].reference
    rivals = [line for line in block.lines if line != reference]
    against = [[f"{reference} - {k}", *(_difference(c, k) for c in block.columns)] for k in rivals]
    return [[head, *scores], *([[["", *head[1:]], *against]] if against else [])]


def _score(column: Column, line: str, bold: str) -> str:
    if not column.scores[line]:
        return "-"
    text = column.estimates[line].shown() + EDGE * (line in column.at_edge)
    return bold.format(text) if column.best == line else text


def _difference(column: Column, rival: str) -> str:
    return column.differences[rival].shown if rival in column.differences else "-"


def table_notes(blocks: Sequence[TableBlock]) -> list[str]:
    """What has to be known to read the table."""
    columns = [column for block in blocks for column in block.columns]
    counts = sorted({len(v) for column in columns for v in column.scores.values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    found = [
        f"Mean over {seeds} seeds of the clients' mean score; ±: 95 % t interval, of differences "
        "over pairs with the same seed."
    ]
    if any(column.differences for column in columns):
        found.append(
            "*: significant at .05 after Holm's correction for the rivals in the column. Bold: "
            "better than every other line, after Holm's correction for all pairs of lines in the "
            "column."
        )
    if len(columns) > 1:
        found.append(f"There are {len(columns)} columns; nothing is corrected across them.")
    if any(column.at_edge for column in columns):
        found.append(f"{EDGE}: at the edge of the rates searched; one beyond it may be better.")
    missing = [c for c in columns if any(len(v) < counts[-1] for v in c.scores.values())]
    if missing:
        found.append("Runs are missing: differences are over the seeds that all lines have.")
    return found


def as_text(blocks: Sequence[TableBlock]) -> str:
    """For a terminal."""
    parts = [_aligned(grid) for block in blocks for grid in _grids(block, "**{}**")]
    return "\n".join([*parts, *table_notes(blocks)]) + "\n"


def _aligned(grid: Grid) -> str:
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    rows = [
        row[0].ljust(widths[0])
        + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in grid
    ]
    return "\n".join(rows) + "\n"


def as_markdown(blocks: Sequence[TableBlock]) -> str:
    """For a page."""
    grids = [grid for block in blocks for grid in _grids(block, "**{}**")]
    parts = [markdown_table(head, rows, numbers=True) for head, *rows in grids]
    return "\n\n".join([*parts, *table_notes(blocks)]) + "\n"


def as_latex(blocks: Sequence[TableBlock]) -> str:
    """For a paper; needs the package booktabs."""
    parts = []
    for block in blocks:
        for head, *rows in _grids(block, r"\textbf{{{}}}"):
            lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (head, *rows)]
            columns = "l" + "r" * (len(head) - 1)
            parts.append("\n".join([
                rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule",
                *lines[1:], r"\bottomrule", r"\end{tabular}",
            ]))  # fmt: skip
    return "\n\n".join([*parts, *(f"% {note}" for note in table_notes(blocks))]) + "\n"


def _escaped(cell: str) -> str:
    for plain, escaped in LATEX:
        cell = cell.replace(plain, escaped)
    return cell


def as_csv(blocks: Sequence[TableBlock]) -> str:
    """Every figure, a line for each cell of the table."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for block in blocks:
        for column in block.columns:
            for line, one in column.estimates.items():
                own = [len(column.scores[line]), one.mean, one.low, one.high, column.best == line]
                row = [block.title, column.name, line, *own, *_against(column, line)]
                writer.writerow(row)
    return out.getvalue()


CSV_HEAD = (
    "block", "column", "line", "seeds", "mean", "low", "high", "best", "reference", "difference",
    "difference_low", "difference_high", "p", "p_holm", "significant",
)  # fmt: skip


def _against(column: Column, line: str) -> list[Any]:
    one = column.differences.get(line)
    if one is None:
        return [""] * 7
    of = one.estimate
    return [column.reference, of.mean, of.low, of.high, of.p, one.p_holm, one.significant]


FORMATS: dict[str, Callable[[Sequence[TableBlock]], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
}
