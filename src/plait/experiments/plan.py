"""What a comparison will run: methods by seeds, and before them the search for learning rates.

plan.json    the plan, in the comparison's folder
adf-seed0/   the run folder of a line of the table and a seed
tuning/      the run folders of the search
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.config import THIS_MACHINE, Config, Machine
from plait.lookup import lookup
from plait.machine.files import read_json, write_atomically
from plait.methods import METHODS, Control
from plait.plugins import load_plugins
from plait.presets import PresetRow

PLAN = "plan.json"
KEPT = ("methods", "seeds", "until", "at_most", "lrs", "lr_grid", "matched_control")
FIRST_TUNING_SEED, TUNING_SEEDS = 1000, 2


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
        until: If given, seeds are added until the interval of the first method's difference to each
            other line reaches no further to either side.
        at_most: But no more than these.
        out: The folder of all runs.
        lrs: Learning rates by method; `config.lr` for methods that are not here.
        lr_grid: If there are any, the rates to search for methods without one in `lrs`.
        matched_control: Add the control of each method that has one.
        resume: Reuse finished runs, go on with begun ones.
        machine: Where and how fast.

    Raises:
        ValueError: A method or rate twice, one unknown, no seeds, a rate for one not compared.
    """

    config: Config
    methods: tuple[str, ...] = tuple(PresetRow.methods.split(","))
    seeds: tuple[int, ...] = (0, 1, 2)
    until: float | None = None
    at_most: int = 20
    out: Path
    lrs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lr_grid: tuple[float, ...] = ()
    matched_control: bool = True
    resume: bool = False
    machine: Machine = THIS_MACHINE

    def __post_init__(self) -> None:
        """Refuse what can't be compared before anything is computed."""
        load_plugins(self.config.plugin)
        for method in self.methods:
            lookup(METHODS, method, "method")
        for what, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{what} are {list(values)}; give each once, and at least one.")
        if len(set(self.lr_grid)) < len(self.lr_grid):
            raise ValueError(f"lr_grid is {list(self.lr_grid)}; give each rate once.")
        if self.until is not None and not (self.until > 0 and len(self.seeds) > 1):
            raise ValueError(
                f"until is {self.until:g} with {len(self.seeds)} seeds; give a width above 0, and "
                "at least two seeds to see the spread, better five."
            )
        for method in self.lrs:
            if method not in self.methods:
                raise ValueError(f"There is a learning rate for {method}, which isn't compared.")

    def to_json(self) -> dict[str, Any]:
        """What to compare as plain JSON values; where it is, and whether to resume, is left out."""
        kept = {name: getattr(self, name) for name in KEPT}
        return {"config": self.config.to_json(), **json.loads(json.dumps(kept))}

    @property
    def pilot(self) -> int | None:
        """How many seeds decide how many there are; None where their number is given."""
        return None if self.until is None else len(self.seeds)

    def first_seeds(self, count: int) -> tuple[int, ...]:
        """The plan's seeds and, if they are fewer, others after them."""
        first = max(self.seeds) + 1
        more = (seed for seed in itertools.count(first) if seed not in tuning_seeds(self.seeds))
        return (*self.seeds, *itertools.islice(more, count - len(self.seeds)))

    @property
    def labels(self) -> tuple[str, ...]:
        """The lines of the table."""
        return (*self.methods, *self.controls)

    @property
    def controls(self) -> dict[str, tuple[str, Control]]:
        """Label -> the compared method that this line is the control of, and the control."""
        found: dict[str, tuple[str, Control]] = {}
        for method in self.methods if self.matched_control else ():
            if control := METHODS[method](self.config).control:
                label = f"{control.method} (matched)"
                label = f"{control.method} (matched-{method})" if label in found else label
                found[label] = method, control
        return found

    @property
    def searched(self) -> tuple[str, ...]:
        """The methods whose learning rate has to be found first."""
        return tuple(m for m in self.methods if self.lr_grid and m not in self.lrs)

    @property
    def untuned(self) -> tuple[str, ...]:
        """The methods whose learning rate nobody gave or searches."""
        return tuple(m for m in self.methods if not self.lr_grid and m not in self.lrs)

    @property
    def planned(self) -> dict[str, int]:
        """Label -> its number of runs, those of the search first, without rates beyond the grid."""
        tuning = Counter(
            cell.label
            for method in self.searched
            for lr in self.lr_grid
            for cell in tuning_cells(self, method, lr)
        )
        return dict(tuning) | dict.fromkeys(self.labels, len(self.seeds))


def load_plan(out: Path) -> Plan:
    """The plan of a comparison's folder.

    Raises:
        ValueError: It isn't one.
    """
    if not (out / PLAN).is_file():
        raise ValueError(f"{out} holds no comparison: there is no {PLAN} in it.")
    values = read_json(out / PLAN)
    return Plan(config=Config.from_json(values.pop("config")), out=out, **as_given(values))


def as_given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `Plan` that a file has, its lists as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in KEPT}


def save_plan(plan: Plan) -> None:
    """Write the plan into the comparison's folder."""
    plan.out.mkdir(parents=True, exist_ok=True)
    write_atomically(plan.out / PLAN, json.dumps(plan.to_json(), indent=2) + "\n")


def reported_cell(plan: Plan, entry: Entry, seed: int) -> Cell:
    """The run of a line of the table with a seed."""
    config = dataclasses.replace(at_rate(plan.config, entry.lr), method=entry.method, seed=seed)
    return Cell(entry.label, config, run_folder(plan, entry.label, seed))


def at_rate(config: Config, lr: float) -> Config:
    """The config at another learning rate, which ends in the same proportion to it."""
    end = None if config.lr_end is None else config.lr_end * (lr / config.lr)
    return dataclasses.replace(config, lr=lr, lr_end=end)


def run_folder(plan: Plan, label: str, seed: int) -> Path:
    """Where the run of a line of the table with a seed is kept."""
    return plan.out / f"{slug(label)}-seed{seed}"


def slug(label: str) -> str:
    """A label as a folder name.

    Example:
        >>> slug("dec-lora (matched)")
        'dec-lora-matched'
    """
    return label.replace(" (", "-").replace(")", "")


# -- the search for a learning rate


def tuning_seeds(seeds: Sequence[int]) -> list[int]:
    """Seeds that are not reported, so that the search has not seen what is reported."""
    free = (seed for seed in itertools.count(FIRST_TUNING_SEED) if seed not in seeds)
    return list(itertools.islice(free, TUNING_SEEDS))


def tuning_cells(plan: Plan, method: str, lr: float) -> list[Cell]:
    """The runs that try a learning rate for a method, one for each tuning seed."""
    base = dataclasses.replace(plan.config, method=method, eval_split="validation")
    return [
        Cell(
            f"{method}, lr {lr:g}",
            at_rate(dataclasses.replace(base, seed=seed), lr),
            plan.out / "tuning" / f"{slug(method)}-lr{lr:g}-seed{seed}",
        )
        for seed in tuning_seeds(plan.seeds)
    ]
