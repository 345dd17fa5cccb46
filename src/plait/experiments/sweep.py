"""A grid of experiments: one comparison (plan.py) for every combination of the axes of a file.

    DIR/sweep.toml        the file
    DIR/tuning/, runs/    a run folder for each run, named by method, seed and digest of its config
    DIR/results.parquet   a row for each line of each comparison and each seed (results.py)

A run is known by its config. Settings that make no difference to it are put back first: FFA-LoRA
does not alternate, so one run of it serves all T. Run folders are resumed as `plait run` does, so a
sweep that was killed goes on where it was, and a finished run is never run again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from plait.config import Config, Machine, TopologySettings, names_of
from plait.engines.job import MATERIAL
from plait.experiments.cell_state import in_turns, state
from plait.experiments.comparison import entries_at, seeds_of
from plait.experiments.grid_file import read_grid
from plait.experiments.plan import KEPT, Cell, Plan, as_given, reported_cell, slug, tuning_cells
from plait.experiments.rate_search import best_rate, qualities, searched_cells
from plait.machine.files import write_atomically
from plait.machine.text_files import read_text
from plait.methods import build_method, settled
from plait.plugins import load_plugins
from plait.presets import as_settings, changed
from plait.topology import TOPOLOGIES, build_schedule

FILE = "sweep.toml"
KEYS = ("preset", *KEPT, "settings", "axes", "search_at")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to run.

    Attributes:
        config: The settings that all runs share.
        axes: Setting -> its values.
        search_at: Values of axes at which learning rates are searched; they hold for all values
            of these axes. For each value of the other axes there is a search of its own.
        plans: A comparison for each combination of the axes, the last one changing fastest.
        out: The folder of everything.
        machine: Where and how fast.
    """

    config: Config
    axes: Mapping[str, tuple[Any, ...]]
    search_at: Mapping[str, Any]
    plans: Sequence[Plan]
    out: Path
    machine: Machine

    def tuning_cells(self, plan: Plan, method: str) -> list[Cell]:
        """The runs that find a method's learning rate for a comparison, as far as is known."""
        at = dataclasses.replace(plan, config=dataclasses.replace(plan.config, **self.search_at))
        return searched_cells(
            plan.lr_grid,
            lambda lr: [self._placed(cell, "tuning") for cell in tuning_cells(at, method, lr)],
        )

    def rates(self, plan: Plan) -> dict[str, float]:
        """What the searches of a comparison have found.

        Left out are methods that found nothing, or of whose search a run failed: with it another
        rate may be the best.
        """
        searches = {method: self.tuning_cells(plan, method) for method in plan.searched}
        return {
            method: best_rate(method, cells)
            for method, cells in searches.items()
            if qualities(cells) and not any(state(cell)[0] == "failed" for cell in cells)
        }

    def lost(self, plan: Plan) -> list[str]:
        """The methods of a comparison without a learning rate, once the searches are done."""
        return [method for method in plan.searched if method not in self.rates(plan)]

    def reported_cells(self, plan: Plan) -> list[Cell]:
        """The runs of a comparison once the searches are done, those of lost methods left out."""
        lost = self.lost(plan)
        methods = tuple(method for method in plan.methods if method not in lost)
        return self._lines(dataclasses.replace(plan, methods=methods)) if methods else []

    def _lines(self, plan: Plan) -> list[Cell]:
        lines = entries_at(plan, self.rates(plan))
        place = partial(self._placed, kind="runs")
        pairs = itertools.product(seeds_of(plan, lines, place), lines)
        return [place(reported_cell(plan, entry, seed)) for seed, entry in pairs]

    def _placed(self, cell: Cell, kind: str) -> Cell:
        config = effective(cell.config, self.config)
        name = f"{slug(config.method)}-seed{config.seed}-{config.digest()}"
        return Cell(cell.label, config, self.out / kind / name)

    @property
    def stages(self) -> list[Sweep]:
        """The sweep in parts that share data and model, so that each is loaded once."""
        parts: dict[tuple[str, ...], list[Plan]] = {}
        for plan in self.plans:
            parts.setdefault(
                tuple(str(getattr(plan.config, n)) for n in sorted(MATERIAL)), []
            ).append(plan)
        return [dataclasses.replace(self, plans=plans) for plans in parts.values()]

    @property
    def search(self) -> list[Cell]:
        """All runs that find learning rates, each once."""
        return _each_once(
            cell
            for plan in self.plans
            for m in plan.searched
            for cell in self.tuning_cells(plan, m)
        )

    def turns(self) -> Iterator[list[Cell]]:
        """All runs, the searches' first, in turns: what is next follows from what has ended."""
        yield from in_turns(lambda: self.search)
        yield from in_turns(lambda: self.reported)

    @property
    def reported(self) -> list[Cell]:
        """All runs that are reported, each once, when the searches are done."""
        return _each_once(cell for plan in self.plans for cell in self.reported_cells(plan))

    @property
    def expected(self) -> list[Cell]:
        """All runs, as far as is known before the searches are done."""
        return self.search + _each_once(cell for plan in self.plans for cell in self._lines(plan))


def _each_once(cells: Iterable[Cell]) -> list[Cell]:
    """Cells by folder, each at the place where it came first."""
    once: dict[Path, Cell] = {}
    for cell in cells:
        once.setdefault(cell.folder, cell)
    return list(once.values())


def effective(config: Config, base: Config) -> Config:
    """The config, with settings that make no difference to its run as they are in `base`.

    Example:
        >>> effective(Config(topology="ring", p=0.5), Config()).p
        0.1
    """
    like = dataclasses.replace(config, lr=base.lr, eval_split=base.eval_split)
    return dataclasses.replace(
        config, **{name: getattr(base, name) for name in _unused(like, base)}
    )


@cache
def _unused(config: Config, base: Config) -> tuple[str, ...]:
    """The settings that make no difference, among those that a method or a topology may ignore."""
    method, rounds, clients = build_method(config), range(config.rounds), config.clients
    unused = ["glue_dir"]
    for name in ("switch_every", "switch_scale"):
        other = build_method(dataclasses.replace(config, **{name: getattr(base, name)}))
        if all(method.plan(t, clients) == other.plan(t, clients) for t in rounds):
            unused.append(name)
    if not method.picks:
        unused.append("switch_below")
    if not method.base_rank:
        unused += ["base_rank", "base_change"]
    silent = not any(method.share(t) for t in rounds)
    unused += [name for name in ("topology", "weights") if silent or getattr(method, name)]
    unused += ["wire", "frozen_every"] if silent else []
    used = () if silent else ("gossip_step", *TOPOLOGIES[settled(config).topology].uses)
    unused += names_of(TopologySettings) - {"topology", "weights", *used}
    return (*unused, *(name for name, of in ONLY.items() if not of(config)))


ONLY: dict[str, Callable[[Config], object]] = {
    "objective": lambda config: config.task == "file",
    "options": lambda config: config.task == "chat",
    "max_new_tokens": lambda config: config.generate_rows,
    "dp_delta": lambda config: config.dp_clip,
}
"""Settings that other settings give a meaning -> whether they do."""


# -- the file


def load_sweep(file: Path, out: Path, plugin: str | None = None) -> Sweep:
    """The sweep of a TOML file.

    Args:
        file: What to run.
        out: The folder of everything.
        plugin: The setting of this name, in the place of the file's.

    Raises:
        ValueError: The file asks for what can't be; the message has the file and the fix.
        OSError: It can't be read.
    """
    values, config, machine = read_grid(file, plugin)
    try:
        sweep = _from_values(values, config, machine, out)
        for plan in sweep.plans:
            for method in plan.methods:
                build_schedule(settled(dataclasses.replace(plan.config, method=method)))
    except (ValueError, TypeError) as error:
        raise ValueError(as_settings(f"{file}: {error}")) from error
    return sweep


def _from_values(values: dict[str, Any], config: Config, machine: Machine, out: Path) -> Sweep:
    unknown = sorted(set(values) - set(KEYS))
    if unknown:
        raise ValueError(f"Unknown keys: {', '.join(unknown)}. There are: {', '.join(KEYS)}.")
    axes, search_at = (values.get(key, {}) for key in ("axes", "search_at"))
    load_plugins(config.plugin)
    for name, row in axes.items():
        if not isinstance(row, list) or not row or len(set(row)) < len(row):
            raise ValueError(f"axes: {name} is {row!r}; give a list, each value once.")
        for value in row:
            changed(config, {name: value}, "axes")
    for name, value in search_at.items():
        if value not in axes.get(name, []):
            raise ValueError(f"search_at: {name} is {value!r}, which is not on that axis.")
    plans = [
        Plan(
            config=dataclasses.replace(config, **dict(zip(axes, combination, strict=True))),
            out=out,
            machine=machine,
            **as_given(values),
        )
        for combination in itertools.product(*axes.values())
    ]
    sweep = Sweep(
        config=config,
        axes={name: tuple(row) for name, row in axes.items()},
        search_at=search_at,
        plans=plans,
        out=out,
        machine=machine,
    )
    _check_axes(sweep)
    return dataclasses.replace(sweep, plans=list(_by_runs(sweep).values()))


def _check_axes(sweep: Sweep) -> None:
    """Refuse an axis that changes no run: its blocks of the table would be one another's copies."""
    for name, row in sweep.axes.items():
        at_first = [
            dataclasses.replace(plan, config=dataclasses.replace(plan.config, **{name: row[0]}))
            for plan in sweep.plans
        ]
        pairs = zip(sweep.plans, at_first, strict=True)
        if len(row) > 1 and all(_runs(sweep, a) == _runs(sweep, b) for a, b in pairs):
            raise ValueError(
                f"axes: {name} makes no difference to any run here, such as p to a topology "
                "without chance; leave it out."
            )


def _by_runs(sweep: Sweep) -> dict[tuple[Config, ...], Plan]:
    """The comparisons by what they run: one whose runs are all another's says nothing new."""
    found: dict[tuple[Config, ...], Plan] = {}
    for plan in sweep.plans:
        found.setdefault(_runs(sweep, plan), plan)
    return found


def _runs(sweep: Sweep, plan: Plan) -> tuple[Config, ...]:
    """What tells a comparison's runs, whatever their seeds and learning rates will be."""
    entries = entries_at(plan, {})
    return tuple(
        effective(reported_cell(plan, entry, plan.seeds[0]).config, sweep.config)
        for entry in entries
    )


def claim(sweep: Sweep, file: Path) -> None:
    """Take the sweep's folder; one that holds a sweep goes on, with what the file has now.

    Raises:
        ValueError: The folder holds something else.
        OSError: It can't be written.
    """
    out = sweep.out
    if out.exists() and not (out / FILE).exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder and holds no sweep; take another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / FILE, read_text(file))
