"""The commands of many experiments: `plait sweep` and `plait table`."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from plait.cli.arguments import check_first
from plait.config import Config
from plait.machine.extras import need
from plait.presets import as_settings, changed

if TYPE_CHECKING:
    from plait.experiments.plan import Cell
    from plait.experiments.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class SweepCommand:
    """Run a grid of experiments; called again, it goes on where it was."""

    file: tyro.conf.Positional[Path]
    """The TOML file with methods, axes and settings."""
    out: Path
    """The folder of the sweep."""
    plugin: str | None = None
    """A Python file of yours that adds methods and other rows; `plugin` in the file's settings."""
    jobs: int = 0
    """Runs at a time, each in a process of its own, on a graphics card all in one stack; 1 for one
    by one in this process, 0 for as many as there are cores, or sixteen on a card."""


@dataclass(frozen=True, kw_only=True)
class TableCommand:
    """Print a sweep's table: means over seeds, paired differences, what is significant."""

    dir: tyro.conf.Positional[Path]
    """The folder of the sweep."""
    format: Literal["text", "markdown", "latex", "csv"] = "text"
    """How to print it; `csv` has every figure with its interval and p-value."""
    reference: str | None = None
    """The line that is compared with the others, such as `adf T=5`; the first if not given."""


def sweep(args: list[str]) -> int:
    """`plait sweep`: 1 if runs failed, which are then listed."""
    given = tyro.cli(SweepCommand, prog="plait sweep", args=args)
    need("pyarrow", "sweep", "A sweep's table of results")
    print(f"preparing {given.out}: {given.file} ...", flush=True)
    from plait.experiments.grid_file import read_grid

    values, config, machine = read_grid(given.file, given.plugin)
    axes = {k: row for k, row in values.get("axes", {}).items() if isinstance(row, list) and row}
    first = {name: row[0] for name, row in axes.items()}
    check_first(changed(config, first, f"{given.file}: axes"), machine)
    from plait.experiments.sweep import load_sweep

    grid = load_sweep(given.file, given.out, given.plugin)
    left_out = math.prod(map(len, grid.axes.values())) - len(grid.plans)
    if left_out:
        print(
            f"{left_out} combination{'s' * (left_out > 1)} of the axes would run what another one "
            "does, as a setting makes no difference there: left out."
        )
    return int(carry_out(grid, given.file, given.jobs))


def carry_out(grid: Sweep, file: Path, jobs: int) -> bool:
    """Run a sweep, or go on with it; whether runs failed, which are then listed.

    Args:
        grid: The sweep.
        file: What it was read from.
        jobs: Runs at a time.
    """
    from plait.experiments import results
    from plait.experiments.executors import executor_for, num_jobs
    from plait.experiments.sweep import claim

    context = executor_for(num_jobs(grid.machine.device, jobs), machine=grid.machine)
    claim(grid, file)
    progress = Progress(grid)
    try:
        with context as executor:
            for stage in grid.stages:
                for turn in stage.turns():
                    for cell in results.carried_out(turn, executor):
                        progress.show(cell)
    finally:
        frame = results.collect(grid)
        results.save(frame, grid.out)
    failed = results.failures(grid)
    for line in failed:
        print(f"failed: {as_settings(line)}", file=sys.stderr)
    print(f"{grid.out}: {len(frame)} rows in {results.RESULTS}; `plait table {grid.out}`")
    return bool(failed)


class Progress:
    """Says of each run that it has ended, and how long the others will take."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.begin = time.monotonic()
        self.done = 0

    def show(self, cell: Cell) -> None:
        """Print a line about a run that has ended."""
        from plait.experiments.cell_state import state, waiting
        from plait.runs.run_folder import load_summary

        cells = self.sweep.expected
        left = waiting(cells)
        self.done += work(cell.config)
        seconds = sum(work(c.config) for c in left) * (time.monotonic() - self.begin) / self.done
        ended, said = state(cell)
        if ended == "finished":
            summary = load_summary(cell.folder)
            said = f"{summary['metric']} {summary['accuracy_client_mean']:.3f}"
        axes = "".join(f", {name} {getattr(cell.config, name)}" for name in self.sweep.axes)
        print(
            f"{len(cells) - len(left)}/{len(cells)}  {cell.label}, seed {cell.config.seed}{axes}: "
            f"{said}  left {timedelta(seconds=round(seconds))}",
            flush=True,
        )


def work(config: Config) -> int:
    """What a run costs, compared with others: rows that are trained on."""
    return config.rounds * config.clients * config.local_steps * config.batch_size


def table(args: list[str]) -> None:
    """`plait table`."""
    given = tyro.cli(TableCommand, prog="plait table", args=args)
    from plait.experiments.paper_table import FORMATS, blocks
    from plait.experiments.results import load

    print(FORMATS[given.format](blocks(load(given.dir), given.reference)), end="")
