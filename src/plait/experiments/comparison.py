"""Methods against each other, so that the answer can be believed.

Every method runs on the same seeds, and a seed fixes partition, graphs and batches, so methods are
compared pair by pair. Each gets a learning rate of its own, given or searched on the validation
split with a seed that isn't reported. Beside a method that has a control runs that one too, at a
rate at which it moves as far: a gain that the control shows as well isn't the method's.

A plan says what to run, `compare` runs it and yields what the runs say, `conclude` reads the run
folders and works out the figures; comparison_report.py writes them down.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from plait.events import Event
from plait.experiments.executors import CellEnded, CellSaid, Executor, executor_for, num_jobs
from plait.experiments.plan import PLAN, Cell, Entry, Plan, reported_cell, save_plan, tuning_cells
from plait.experiments.significance import Difference, Estimate, differences, estimate
from plait.methods import build_method
from plait.runs.loggers import require
from plait.runs.run_folder import load_events, load_summary

SHOWN = (
    "accuracy_client_min", "accuracy_averaged_model", "loss_client_mean", "perplexity_client_mean",
    "accuracy_base", "perplexity_base", "cross_term", "sent_bytes", "wall_seconds",
    "accuracy_own_mean",
)  # fmt: skip
"""The figures in the table beside the score, where the runs have them."""


@dataclass(frozen=True)
class Outcome:
    """What came out for one line of the table, each figure over all seeds in the plan's order."""

    entry: Entry
    folders: list[Path]
    summaries: list[dict[str, Any]]
    at_grid_edge: bool = False

    @cached_property
    def events(self) -> list[list[Event]]:
        """What each run said."""
        return [load_events(folder) for folder in self.folders]

    def values(self, key: str) -> list[float]:
        """One figure of every seed's summary."""
        return [float(summary[key]) for summary in self.summaries]

    @property
    def score(self) -> Estimate:
        """Mean over seeds of the clients' mean score, with its interval."""
        return estimate(self.values("accuracy_client_mean"))


@dataclass(frozen=True)
class Conclusion:
    """The comparison's result.

    Attributes:
        plan: What was compared.
        metric: What the scores measure.
        outcomes: A line for each label, the reference first.
        differences: The reference against each other line.
    """

    plan: Plan
    metric: str
    outcomes: list[Outcome]
    differences: list[Difference]

    @property
    def best_rival(self) -> Difference | None:
        """The other line with the highest mean score."""
        return min(self.differences, key=lambda one: one.estimate.mean, default=None)


def compare(plan: Plan, jobs: int = 1, loggers: Sequence[str] = ()) -> Iterator[tuple[Cell, Event]]:
    """Run everything in the plan; `conclude` then has the result.

    Args:
        plan: What to compare.
        jobs: Runs at a time, each in a process of its own, on a graphics card all in one stack; 1
            for one by one in this process, 0 for what suits the machine. Other processes import
            the main module, so what it does besides belongs under `if __name__ == "__main__"`.
        loggers: Keys of `plait.runs.loggers.LOGGERS`; each run is written to each of them.

    Yields:
        Each event with the run that it comes from.

    Raises:
        ValueError: The folder is used, the config can't run, training diverged, or a logger isn't
            there.
        OSError: The folder can't be written.
    """
    if not plan.resume and plan.out.exists() and (plan.out.is_file() or any(plan.out.iterdir())):
        raise ValueError(f"{plan.out} is not an empty folder; take another --out, or --resume.")
    if not (plan.out / PLAN).is_file() and any(path.is_file() for path in plan.out.glob("*")):
        # A run's own summary would be overwritten.
        raise ValueError(f"{plan.out} holds no comparison; take another --out.")
    for method in plan.methods:
        build_method(dataclasses.replace(plan.config, method=method))
    require(loggers)
    jobs = num_jobs(plan.machine.device, jobs, sum(plan.planned.values()))
    with executor_for(jobs, loggers, plan.machine) as executor:
        for number, said in enumerate(_said(plan, executor)):
            if number == 0:
                # Only now: a comparison that can't run leaves nothing behind.
                save_plan(plan)
            yield said


def _said(plan: Plan, executor: Executor) -> Iterator[tuple[Cell, Event]]:
    search = [cell for method in plan.searched for cell in tuning_cells(plan, method)]
    # A rate that is too high diverges: an answer, not a failure.
    yield from _events(executor(search), may_diverge=True)
    # All methods of a seed, then the next: they share its data and its model.
    lines = itertools.product(plan.seeds, entries(plan))
    yield from _events(executor([reported_cell(plan, entry, seed) for seed, entry in lines]))


def _events(said: Iterable[CellSaid], may_diverge: bool = False) -> Iterator[tuple[Cell, Event]]:
    for cell, one in said:
        if not isinstance(one, CellEnded):
            yield cell, one
        elif one.failure and not (may_diverge and one.failure.diverged):
            raise ValueError(f"{cell.label}, seed {cell.config.seed}: {one.failure.reason}")


def entries(plan: Plan) -> list[Entry]:
    """The lines of the table with their learning rates; searched ones are read from their runs."""
    rates = {m: best_rate(m, tuning_cells(plan, m)) for m in plan.searched}
    # A control that comes out as a line that is there already runs once.
    once: dict[tuple[str, float], Entry] = {}
    for one in entries_at(plan, rates):
        once.setdefault((one.method, one.lr), one)
    return list(once.values())


def entries_at(plan: Plan, searched: Mapping[str, float]) -> list[Entry]:
    """The lines of the table, with the rates that the search gave."""
    rates = {m: searched.get(m, plan.lrs.get(m, plan.config.lr)) for m in plan.methods}
    found = [Entry(method, method, rate) for method, rate in rates.items()]
    return found + [
        Entry(label, control.method, rates[method] * control.lr_factor)
        for label, (method, control) in plan.controls.items()
    ]


def best_rate(method: str, cells: Iterable[Cell]) -> float:
    """The rate with the best score on the validation split, of those that did not diverge.

    Args:
        method: For the message.
        cells: The runs of its search.

    Raises:
        ValueError: All diverged.
    """
    finished = [cell for cell in cells if (cell.folder / "summary.json").exists()]
    if not finished:
        raise ValueError(
            f"{method} diverged at every rate of the grid (--lr-grid); give lower ones."
        )
    summaries = {cell.config.lr: load_summary(cell.folder) for cell in finished}
    return max(summaries, key=lambda lr: _quality(summaries[lr]))


def _quality(summary: Mapping[str, Any]) -> tuple[float, float]:
    return summary["accuracy_client_mean"], -summary["loss_client_mean"]


# -- the result


def conclude(plan: Plan) -> Conclusion:
    """Work out the result from the folders of the finished runs."""
    outcomes = [_outcome(plan, entry) for entry in entries(plan)]
    scores = {one.entry.label: one.values("accuracy_client_mean") for one in outcomes}
    return Conclusion(
        plan=plan,
        metric=outcomes[0].summaries[0]["metric"],
        outcomes=outcomes,
        differences=differences(scores, plan.methods[0]),
    )


def _outcome(plan: Plan, entry: Entry) -> Outcome:
    folders = [reported_cell(plan, entry, seed).folder for seed in plan.seeds]
    edges = (min(plan.lr_grid, default=0.0), max(plan.lr_grid, default=0.0))
    return Outcome(
        entry=entry,
        folders=folders,
        summaries=[load_summary(folder) for folder in folders],
        at_grid_edge=entry.label in plan.searched and entry.lr in edges,
    )


def verdict(conclusion: Conclusion) -> str:
    """One line that claims no more than the figures do."""
    reference, rival = conclusion.outcomes[0], conclusion.best_rival
    name, score = reference.entry.label, reference.score.mean
    if rival is None:
        return f"{name}: {conclusion.metric} {score:.3f}; there is nothing to compare it with."
    verb = "leads" if rival.estimate.mean > 0 else "ties with"
    verb = "trails" if rival.estimate.mean < 0 else verb
    line = f"{name} {verb} {rival.rival}, its best rival, by {abs(rival.estimate.mean):.3f}"
    line = f"{line}: {significance(rival, len(conclusion.plan.seeds))}."
    for one in conclusion.differences:
        of, _ = conclusion.plan.controls.get(one.rival, ("", None))
        if of == name and one is not rival:
            words = "significant" if one.significant else "not significant"
            line += f" Over the matched control: {one.estimate.mean:+.3f}, {words}."
    return line


def significance(one: Difference, num_seeds: int) -> str:
    """Whether a difference can be told from chance, in words."""
    if num_seeds < 2:
        return "one seed, so it may be chance (no interval; give more --seeds)"
    if one.p_holm is None:
        return "not significant (the seeds show no spread to test against)"
    word = "significant" if one.significant else "not significant"
    return f"{word} over {num_seeds} paired seeds (p = {one.p_holm:.2g}, Holm)"


def table_figures(outcome: Outcome) -> dict[str, float]:
    """Means over seeds of what the table shows beside the score, as far as the runs have it."""
    there = [key for key in SHOWN if all(key in one for one in outcome.summaries)]
    return {key: float(np.mean(outcome.values(key))) for key in there}
