"""Methods against each other, so that the answer can be believed.

Every method runs on the same seeds, and a seed fixes partition, graphs and batches, so methods are
compared pair by pair. Each gets a learning rate of its own, given or searched on the validation
split with a seed that isn't reported. Beside ADF-LoRA runs Dec-LoRA at half its rate: each of ADF's
factors moves half as often, and a gain that this control shows too isn't ADF's.

A plan says what to run, `compare` runs it and yields what the runs say, `conclude` reads the run
folders and works out the figures; report.py writes them down.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plait.config import Config
from plait.events import Event, Started
from plait.methods import METHODS, build_method
from plait.names import lookup
from plait.paired import Difference, Estimate, differences, estimate
from plait.runs import load_run, run

MATCHED = "dec-lora (matched)"
FIRST_TUNING_SEED = 1000
FIGURES = (
    "accuracy_client_min",
    "accuracy_averaged_model",
    "loss_client_mean",
    "cross_term",
    "sent_bytes",
    "wall_seconds",
)
"""What the table shows of a summary beside the score."""


@dataclass(frozen=True)
class Entry:
    """A line of the comparison: a method at a learning rate."""

    label: str
    method: str
    lr: float


@dataclass(frozen=True)
class Cell:
    """One run of the comparison and the folder it is in."""

    label: str
    config: Config
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compare.

    Attributes:
        config: The settings that all runs share; its method, seed and lr give way.
        methods: The first one is compared with each of the others.
        seeds: One run of each method for each.
        out: The folder of all runs.
        lrs: Learning rates by method; `config.lr` for methods that are not here.
        lr_grid: If there are any, the rates to search for methods without one in `lrs`.
        matched_control: Add Dec-LoRA at half of ADF's learning rate.
        resume: Reuse finished runs, go on with begun ones.

    Raises:
        ValueError: A method twice, an unknown one, no seeds, a rate for a method not compared.
    """

    config: Config
    methods: tuple[str, ...] = ("adf", "dec-lora", "ffa", "rolora")
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path
    lrs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lr_grid: tuple[float, ...] = ()
    matched_control: bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse what can't be compared before anything is computed."""
        for method in self.methods:
            lookup(METHODS, method, "method")
        for what, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{what} are {list(values)}; give each once, and at least one.")
        for method in self.lrs:
            if method not in self.methods:
                raise ValueError(f"There is a learning rate for {method}, which isn't compared.")

    @property
    def labels(self) -> tuple[str, ...]:
        """The lines of the table."""
        matched = self.matched_control and "adf" in self.methods
        return (*self.methods, MATCHED) if matched else self.methods

    @property
    def searched(self) -> tuple[str, ...]:
        """The methods whose learning rate has to be found first."""
        return tuple(m for m in self.methods if self.lr_grid and m not in self.lrs)

    @property
    def planned(self) -> dict[str, int]:
        """Label -> its number of runs, those of the search first."""
        tuning = {cell.label: 1 for m in self.searched for cell in tuning_cells(self, m)}
        return tuning | dict.fromkeys(self.labels, len(self.seeds))


@dataclass(frozen=True)
class Outcome:
    """What came out for one line of the table, each figure over all seeds in the plan's order."""

    entry: Entry
    summaries: list[dict[str, Any]]
    events: list[list[Event]]
    at_grid_edge: bool = False

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


def compare(plan: Plan) -> Iterator[tuple[Cell, Event]]:
    """Run everything in the plan; `conclude` then has the result.

    Yields:
        Each event with the run that it comes from.

    Raises:
        ValueError: The folder is used, the config can't run, or training diverged.
        OSError: The folder can't be written.
    """
    if not plan.resume and plan.out.exists() and (plan.out.is_file() or any(plan.out.iterdir())):
        raise ValueError(f"{plan.out} is not an empty folder; take another --out, or --resume.")
    for method in plan.methods:
        build_method(dataclasses.replace(plan.config, method=method))
    for method in plan.searched:
        yield from _search(plan, method)
    # All methods of a seed, then the next: they share its data and its model.
    for seed, entry in itertools.product(plan.seeds, entries(plan)):
        cell = reported_cell(plan, entry, seed)
        try:
            for event in run(cell.config, cell.folder, resume=plan.resume):
                yield cell, event
        except ValueError as error:
            raise ValueError(f"{entry.label}, seed {seed}: {error}") from error


def entries(plan: Plan) -> list[Entry]:
    """The lines of the table with their learning rates; searched ones are read from their runs."""
    rates = {m: plan.lrs.get(m, plan.config.lr) for m in plan.methods}
    rates |= {m: _best_rate(plan, m) for m in plan.searched}
    found = [Entry(method, method, rate) for method, rate in rates.items()]
    matched = MATCHED in plan.labels and rates["adf"] / 2
    # Where the search gave Dec-LoRA just that rate, it is its own control.
    if matched and rates.get("dec-lora") != matched:
        found.append(Entry(MATCHED, "dec-lora", matched))
    return found


def reported_cell(plan: Plan, entry: Entry, seed: int) -> Cell:
    """The run of a line of the table with a seed."""
    config = dataclasses.replace(plan.config, method=entry.method, lr=entry.lr, seed=seed)
    return Cell(entry.label, config, plan.out / f"{slug(entry.label)}-seed{seed}")


def slug(label: str) -> str:
    """A label as a folder name.

    Example:
        >>> slug("dec-lora (matched)")
        'dec-lora-matched'
    """
    return label.replace(" (", "-").replace(")", "")


# -- the search for a learning rate


def tuning_seed(seeds: Sequence[int]) -> int:
    """A seed that is not reported, so that the search has not seen what is reported."""
    return next(seed for seed in itertools.count(FIRST_TUNING_SEED) if seed not in seeds)


def tuning_cells(plan: Plan, method: str) -> list[Cell]:
    """The runs that find a method's learning rate."""
    seed = tuning_seed(plan.seeds)
    base = dataclasses.replace(plan.config, method=method, seed=seed, eval_split="validation")
    return [
        Cell(
            f"{method}, lr {lr:g}",
            dataclasses.replace(base, lr=lr),
            plan.out / "tuning" / f"{slug(method)}-lr{lr:g}",
        )
        for lr in plan.lr_grid
    ]


def _search(plan: Plan, method: str) -> Iterator[tuple[Cell, Event]]:
    for cell in tuning_cells(plan, method):
        began = False
        try:
            for event in run(cell.config, cell.folder, resume=plan.resume):
                began = began or isinstance(event, Started)
                yield cell, event
        except ValueError:
            # A rate that is too high diverges: an answer, not a failure. Anything else that
            # can't run is found before the first event.
            if not began:
                raise


def _best_rate(plan: Plan, method: str) -> float:
    """The rate with the best score on the validation split, of those that did not diverge."""
    finished = [c for c in tuning_cells(plan, method) if (c.folder / "summary.json").exists()]
    if not finished:
        raise ValueError(f"{method} diverged at every rate of --lr-grid; give lower ones.")
    summaries = {cell.config.lr: load_run(cell.folder)[2] for cell in finished}
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
    runs = [load_run(reported_cell(plan, entry, seed).folder) for seed in plan.seeds]
    edges = (min(plan.lr_grid, default=0.0), max(plan.lr_grid, default=0.0))
    return Outcome(
        entry=entry,
        summaries=[summary for _, _, summary in runs],
        events=[events for _, events, _ in runs],
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
    matched = {one.rival: one for one in conclusion.differences}.get(MATCHED)
    if matched and matched is not rival:
        words = "significant" if matched.significant else "not significant"
        line += f" Over the matched control: {matched.estimate.mean:+.3f}, {words}."
    return line


def significance(one: Difference, num_seeds: int) -> str:
    """Whether a difference can be told from chance, in words."""
    if num_seeds < 2:
        return "one seed, so it may be chance (no interval; give more --seeds)"
    if one.p_holm is None:
        return "not significant (the seeds show no spread to test against)"
    word = "significant" if one.significant else "not significant"
    return f"{word} over {num_seeds} paired seeds (p = {one.p_holm:.2g}, Holm)"


def figures(outcome: Outcome) -> dict[str, float]:
    """Means over seeds of what the table shows beside the score."""
    return {key: float(np.mean(outcome.values(key))) for key in FIGURES}
