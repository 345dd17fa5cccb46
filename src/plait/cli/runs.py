"""The command `plait runs`: the run folders that there are, a line each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from plait.cli.arguments import Names, parts
from plait.cli.lists import print_table
from plait.lookup import lookup

if TYPE_CHECKING:
    from plait.runs.listing import Listed


SORTS: dict[str, Callable[[Listed], Any]] = {
    "run": lambda one: one.path,
    "name": lambda one: one.name,
    "task": lambda one: one.config.task,
    "method": lambda one: one.config.method,
    "seed": lambda one: one.config.seed,
    "rounds": lambda one: one.rounds_done,
    "score": lambda one: -math.inf if one.score is None else one.score,
    "state": lambda one: one.state,
    "date": lambda one: one.changed_s,
}
"""Column -> what to sort by."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the run folders below a folder, the latest last."""

    dir: tyro.conf.Positional[Path] = Path("runs")
    """Where to look."""
    filter: Names = ()
    """Only runs with this setting, state, name or tag, such as `method=adf` or `tag=paper`; several
    with commas."""
    sort: str = "date"
    """The column to sort by, such as `score`: the highest last."""


def runs(args: list[str]) -> None:
    """`plait runs`."""
    given = tyro.cli(Runs, prog="plait runs", args=args)
    from plait.runs.listing import chosen, listed

    key = lookup(SORTS, given.sort, "column to sort by")
    there, unread = listed(given.dir)
    found = sorted(chosen(there, parts(given.filter)), key=key)
    rows = [_row(one, given.dir) for one in found]
    head = ("run", "name", "tags", "task", "method", "seed", "rounds", "score", "state", "date")
    shown = [key for key in head if key not in ("name", "tags") or any(row[key] for row in rows)]
    print_table(shown, [[row[key] for key in shown] for row in rows])
    for reason in unread:
        print(f"not listed: {reason}")


def _row(one: Listed, top: Path) -> dict[str, str]:
    config = one.config
    run = str(one.path.relative_to(top)) if one.path != top else one.path.resolve().name
    score = "" if one.score is None else f"{one.metric} {one.score:.3f}"
    date = datetime.fromtimestamp(one.changed_s).strftime("%Y-%m-%d %H:%M")
    rounds = f"{one.rounds_done}/{config.rounds}"
    return {
        "run": run, "name": one.name, "tags": ", ".join(one.tags), "task": config.task,
        "method": config.method, "seed": str(config.seed), "rounds": rounds, "score": score,
        "state": one.state, "date": date,
    }  # fmt: skip
