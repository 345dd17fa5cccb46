"""What papers claim of these methods, and the rule by which a benchmark says whether it holds.

A claim names two sides, each a line of the benchmark's table with some settings, and says that the
first one is better. It is tested on the mean over the tasks of its part, over paired seeds; the
p-values of all claims of a benchmark are adjusted together (Holm). The rule, in this order:

    holds            adjusted p at most .05, and the difference is as claimed
    is contradicted  adjusted p at most .05, and it is the other way round
    makes no odds    the interval lies within +-MARGIN: whatever there is, is smaller
    is undecided     anything else: more seeds would be needed; the interval says how many
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.experiments.paper_table import MEAN
from plait.experiments.significance import LEVEL, Estimate, estimate, holm, rows_interval

if TYPE_CHECKING:
    import pandas as pd

SCORE = "accuracy_client_mean"
SUITES = Path(__file__).parent / "suites"
MARGIN = 0.01
"""A difference of scores that is too small to matter."""


@dataclass(frozen=True)
class Side:
    """One side of a claim.

    Attributes:
        label: The line of the table.
        where: Setting -> its value, where the part has several.
        figure: The column that is compared.
    """

    label: str
    where: Mapping[str, Any] = field(default_factory=dict)
    figure: str = SCORE

    def of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Its finished runs, of the rows of a part."""
        chosen = (frame["label"] == self.label) & (frame["state"] == "finished")
        for name, value in self.where.items():
            chosen &= frame[name] == value
        found = frame[chosen & (frame["kind"] == "reported")]
        return found.drop_duplicates(["task", "seed", "digest"])  # a run may serve several rows


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A table of suites/claims.toml.

    Attributes:
        says: What is claimed, with the published figures; they are second-hand.
        source: Who does.
        part: The part of the benchmark that tests it.
        ours: The side that is claimed to be better.
        theirs: The other one.
        lower: Whether the lower figure is the better one.
    """

    says: str
    source: str
    part: str
    ours: Side
    theirs: Side
    lower: bool = False


def _read(values: dict[str, Any]) -> Claim:
    ours, theirs = (Side(**values.pop(name)) for name in ("ours", "theirs"))
    return Claim(**values, ours=ours, theirs=theirs)


CLAIMS = {
    name: _read(values)
    for name, values in tomllib.loads((SUITES / "claims.toml").read_text()).items()
}
"""By name."""


@dataclass(frozen=True)
class Finding:
    """What a benchmark found of a claim.

    Attributes:
        name: The claim's key.
        claim: The claim.
        apart: The difference, above zero where it is as claimed, over seeds.
        values: Of each paired seed, the difference.
        p_holm: Adjusted for all claims of the benchmark.
        rows: The bootstrap interval over seeds and test rows, where those are known.
        means: The means of both sides.
        tasks: Task -> the means of both sides, and the difference there; not corrected.
    """

    name: str
    claim: Claim
    apart: Estimate
    values: tuple[float, ...]
    p_holm: float | None
    rows: tuple[float, float] | None
    means: tuple[float, float]
    tasks: Mapping[str, tuple[float, float, Estimate]]

    @property
    def spread(self) -> float:
        """The standard deviation of the difference over seeds; 0 of a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def effect(self) -> float | None:
        """The mean difference in standard deviations over seeds (Cohen's d for pairs)."""
        return self.apart.mean / self.spread if self.spread > 0 else None

    @property
    def verdict(self) -> str:
        """What the rule says."""
        one = self.apart
        if self.p_holm is not None and self.p_holm <= 1 - LEVEL:
            return "holds" if one.mean > 0 else "is contradicted"
        if one.low is not None and one.high is not None and -MARGIN < one.low <= one.high < MARGIN:
            return "makes no odds"
        return "is undecided"


def judged(frame: pd.DataFrame) -> list[Finding]:
    """What a benchmark's rows say of the claims that they can test.

    Args:
        frame: The rows, as `benchmark.collect` has them.
    """
    found = {name: _compared(name, one, frame) for name, one in CLAIMS.items()}
    there = [one for one in found.values() if one is not None]
    tested = {one.name: one.apart.p for one in there if one.apart.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return [dataclasses.replace(one, p_holm=adjusted.get(one.name)) for one in there]


def _compared(name: str, claim: Claim, frame: pd.DataFrame) -> Finding | None:
    part = frame[frame["part"] == claim.part]
    if part.empty:
        return None
    sides = [side.of(part) for side in (claim.ours, claim.theirs)]
    columns = (claim.ours.figure, claim.theirs.figure)
    if any(
        side.empty or side[name].isna().all() for side, name in zip(sides, columns, strict=True)
    ):
        return None
    tables = [s.pivot(index="seed", columns="task", values=c)
              for s, c in zip(sides, columns, strict=True)]  # fmt: skip
    seeds = [seed for seed in tables[0].index if all(_complete(table, seed) for table in tables)]
    if not seeds:
        return None
    pilots = part["pilot"].dropna()
    pilot = int(pilots.max()) if len(pilots) else None
    both = [table.loc[seeds].assign(**{MEAN: table.loc[seeds].mean(axis=1)}) for table in tables]
    found = {str(task): _apart(claim, both[0][task], both[1][task], pilot) for task in both[0]}
    ours, theirs, apart, values = found.pop(MEAN)
    rows = _over_rows(sides, seeds) if set(columns) == {SCORE} else None
    tasks = {task: one[:3] for task, one in found.items()}
    return Finding(name, claim, apart, values, None, rows, (ours, theirs), tasks)


def _apart(
    claim: Claim, ours: pd.Series[float], theirs: pd.Series[float], pilot: int | None
) -> tuple[float, float, Estimate, tuple[float, ...]]:
    """The means of both sides, their difference, above zero where it is as claimed, and by seed."""
    values = tuple(((theirs - ours) if claim.lower else (ours - theirs)).tolist())
    return float(ours.mean()), float(theirs.mean()), estimate(values, pilot), values


def _complete(table: pd.DataFrame, seed: int) -> bool:
    return seed in table.index and bool(table.loc[seed].notna().all())


def _over_rows(sides: Sequence[pd.DataFrame], seeds: Sequence[int]) -> tuple[float, float] | None:
    """The interval over rows and seeds, if all runs say which rows they got right."""
    apart = []
    for task in dict.fromkeys(sides[0]["task"]):
        of_sides = []
        for side in sides:
            runs = side[side["task"] == task].set_index("seed").loc[seeds]
            right = [
                np.array(hits) / clients
                for hits, clients in zip(runs["hits"], runs["clients"], strict=True)
            ]
            if len({one.shape for one in right}) != 1 or not right[0].size:
                return None
            of_sides.append(np.stack(right))
        apart.append(of_sides[0] - of_sides[1])
    return rows_interval(apart)
