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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from plait.events import Event
from plait.experiments.cell_state import in_turns, keep_failure, state
from plait.experiments.executors import CellEnded, CellSaid, Executor, executor_for, num_jobs
from plait.experiments.plan import PLAN, Cell, Entry, Plan, reported_cell, save_plan, tuning_cells
from plait.experiments.rate_search import best_rate, is_at_edge, searched_cells
from plait.experiments.significance import Difference, Estimate, differences, estimate, seeds_needed
from plait.methods import build_method
from plait.runs.loggers import require
from plait.runs.run_folder import load_finished, load_summary

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
    pilot: int | None = None

    @cached_property
    def events(self) -> list[list[Event]]:
        """What each run said."""
        return [load_finished(folder) for folder in self.folders]

    def values(self, key: str) -> list[float]:
        """One figure of every seed's summary."""
        return [float(summary[key]) for summary in self.summaries]

    @property
    def score(self) -> Estimate:
        """Mean over seeds of the clients' mean score, with its interval."""
        return estimate(self.values("accuracy_client_mean"), self.pilot)


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
    for search in in_turns(lambda: search_cells(plan)):
        # A rate that is too high diverges: an answer, not a failure.
        unless_diverged = [cell for cell in search if state(cell)[0] != "diverged"]
        yield from _events(executor(unless_diverged), may_diverge=True)
    lines = entries(plan)
    for reported in in_turns(lambda: _reported(plan, lines)):
        yield from _events(executor(reported))


def _reported(plan: Plan, lines: Sequence[Entry]) -> list[Cell]:
    """All methods of a seed, then the next: they share its data and its model."""
    return [reported_cell(plan, entry, seed) for seed in seeds_of(plan, lines) for entry in lines]


def _events(said: Iterable[CellSaid], may_diverge: bool = False) -> Iterator[tuple[Cell, Event]]:
    for cell, one in said:
        if not isinstance(one, CellEnded):
            yield cell, one
        elif one.failure and may_diverge and one.failure.diverged:
            keep_failure(cell, one.failure)
        elif one.failure:
            raise ValueError(f"{cell.label}, seed {cell.config.seed}: {one.failure.reason}")


def search_cells(plan: Plan) -> list[Cell]:
    """The runs of all searches, as far as they are known."""
    return [cell for method in plan.searched for cell in search_of(plan, method)]


def search_of(plan: Plan, method: str) -> list[Cell]:
    """The runs of the search for a method's rate, as far as they are known."""
    return searched_cells(plan.lr_grid, partial(tuning_cells, plan, method))


def seeds_of(
    plan: Plan, lines: Sequence[Entry], place: Callable[[Cell], Cell] = lambda cell: cell
) -> tuple[int, ...]:
    """The seeds of each line: the plan's, and what `until` adds once the runs of these are done.

    Args:
        plan: The comparison.
        lines: Its lines.
        place: A line's run with a seed -> where it lies.
    """
    if plan.until is None:
        return plan.seeds
    cells = {e.label: [place(reported_cell(plan, e, seed)) for seed in plan.seeds] for e in lines}
    if any(state(cell)[0] != "finished" for some in cells.values() for cell in some):
        return plan.seeds
    scores = {
        label: [float(load_summary(cell.folder)["accuracy_client_mean"]) for cell in some]
        for label, some in cells.items()
    }
    reference = lines[0].label
    return plan.first_seeds(seeds_needed(scores, reference, plan.until, plan.at_most))


def entries(plan: Plan) -> list[Entry]:
    """The lines of the table with their learning rates; searched ones are read from their runs."""
    rates = {method: best_rate(method, search_of(plan, method)) for method in plan.searched}
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


# -- the result


def conclude(plan: Plan) -> Conclusion:
    """Work out the result from the folders of the finished runs."""
    lines = entries(plan)
    seeds = seeds_of(plan, lines)
    outcomes = [_outcome(plan, entry, seeds) for entry in lines]
    scores = {one.entry.label: one.values("accuracy_client_mean") for one in outcomes}
    return Conclusion(
        plan=plan,
        metric=outcomes[0].summaries[0]["metric"],
        outcomes=outcomes,
        differences=differences(scores, plan.methods[0], plan.pilot),
    )


def _outcome(plan: Plan, entry: Entry, seeds: Sequence[int]) -> Outcome:
    folders = [reported_cell(plan, entry, seed).folder for seed in seeds]
    searched = entry.label in plan.searched
    return Outcome(
        entry=entry,
        folders=folders,
        summaries=[load_summary(folder) for folder in folders],
        pilot=plan.pilot,
        at_grid_edge=searched and is_at_edge(search_of(plan, entry.label), entry.lr),
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
    line = f"{line}: {significance(rival, len(reference.folders))}."
    for one in conclusion.differences:
        of, _ = conclusion.plan.controls.get(one.rival, ("", None))
        if of == name and one is not rival:
            words = "significant" if one.significant else "not significant"
            line += f" Over the matched control: {one.estimate.mean:+.3f}, {words}."
    untuned = ", ".join(conclusion.plan.untuned)
    return line + (f" No learning rate was tuned for {untuned}." if untuned else "")


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
