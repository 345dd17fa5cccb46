"""The command `plait runs`: the run folders that there are, a line each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from plait.cli.arguments import Names, parts
from plait.cli.lists import print_table

if TYPE_CHECKING:
    from plait.runs.listing import Listed


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the run folders below a folder, the latest last."""

    dir: tyro.conf.Positional[Path] = Path("runs")
    """Where to look."""
    filter: Names = ()
    """Only runs with this setting, state, name or tag, such as `method=adf` or `tag=paper`; several
    with commas."""


def runs(args: list[str]) -> None:
    """`plait runs`."""
    given = tyro.cli(Runs, prog="plait runs", args=args)
    from plait.runs.listing import chosen, listed

    rows = [_row(one, given.dir) for one in chosen(listed(given.dir), parts(given.filter))]
    head = ("run", "name", "tags", "task", "method", "seed", "rounds", "score", "state", "date")
    shown = [key for key in head if key not in ("name", "tags") or any(row[key] for row in rows)]
    print_table(shown, [[row[key] for key in shown] for row in rows])


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
