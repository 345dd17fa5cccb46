"""The page of a benchmark: each claim with its verdict, then the tables that these come from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plait.config import Config
from plait.experiments.claims import MARGIN, Finding
from plait.experiments.paper_table import as_markdown, blocks
from plait.markdown import markdown_table
from plait.topology import TOPOLOGIES

if TYPE_CHECKING:
    import pandas as pd

PAGE, PICTURE = "benchmark.md", "claims.png"

RULE = f"""A claim **holds** if the difference is as claimed and its p-value, adjusted for all
claims of this page (Holm), is at most .05; it **is contradicted** if it is the other way round at
that level; it **makes no odds** if the 95 % interval lies within ±{MARGIN:g}; else it **is
undecided**. Seeds are paired: one fixes partition, graphs and batches for all lines. Learning rates
were searched for each line and setting on validation rows with two seeds that aren't reported, and
beyond the grid where its edge was the best. Where seeds were added until intervals were short
enough, interval and test are Stein's, of the first seeds' spread. *Rows too* is the bootstrap
interval over seeds and test rows both; *d* the mean difference in standard deviations over seeds.
Figures in the claims are as others report them."""


SHOWN = (
    "backbone", "clients", "label_skew", "topology", "rounds", "local_steps", "batch_size",
    "max_length", "rank",
)  # fmt: skip
"""Settings that the page names for each part, at their defaults, too."""


def benchmark_page(size: str, frame: pd.DataFrame, found: Sequence[Finding], picture: bool) -> str:
    """The page as Markdown.

    Args:
        size: Of the benchmark.
        frame: Its rows, as `benchmark.collect` has them.
        found: What they say of the claims.
        picture: Whether `PICTURE` lies beside it.
    """
    head = [
        "claim", "first", "second", "difference", "rows too", "d", "p (Holm)", "seeds", "verdict",
    ]  # fmt: skip
    sections = [
        f"# Benchmark, size {size}",
        RULE,
        "## The claims",
        markdown_table(head, [_line(one) for one in found]),
        *([f"![The differences with their intervals]({PICTURE})"] if picture else []),
        *itertools.chain.from_iterable(_section(one) for one in found),
        "## The tables",
        *itertools.chain.from_iterable(_tables(frame)),
        "## What it took",
        _cost(frame),
        f"`plait benchmark --size {size} --out DIR` runs it, or goes on with it; `plait benchmark "
        f"page --size {size} --out DIR` draws this page from the recorded runs alone.",
    ]
    return "\n\n".join(sections) + "\n"


def _line(one: Finding) -> list[str]:
    rows = "" if one.rows is None else f"{one.rows[0]:+.3f} to {one.rows[1]:+.3f}"
    effect = "" if one.effect is None else f"{one.effect:+.1f}"
    p = "" if one.p_holm is None else f"{one.p_holm:.2g}"
    means = [f"{mean:.3f}" for mean in one.means]
    return [
        one.name, *means, one.apart.shown("+"), rows, effect, p, str(len(one.values)),
        f"**{one.verdict}**",
    ]  # fmt: skip


def _section(one: Finding) -> list[str]:
    a, b = one.claim.ours, one.claim.theirs
    sides = [
        " ".join([side.label, *(f"{k.replace('_', ' ')} {v}" for k, v in side.where.items())])
        + ("" if side.figure.startswith("accuracy") else f" ({side.figure.replace('_', ' ')})")
        for side in (a, b)
    ]
    better = "lower is better" if one.claim.lower else "higher is better"
    return [
        f"### {one.name}: {one.verdict}",
        f"{one.claim.says}. Source: {one.claim.source}. Part `{one.claim.part}`: {sides[0]} "
        f"against {sides[1]}; {better}.",
        markdown_table(
            ["task", "first", "second", "difference"],
            [[task, f"{ours:.3f}", f"{theirs:.3f}", apart.shown("+")]
             for task, (ours, theirs, apart) in one.tasks.items()],
            numbers=True,
        ),
    ]  # fmt: skip


def _tables(frame: pd.DataFrame) -> list[list[str]]:
    found = []
    for part, rows in frame.groupby("part", sort=False):
        before = rows[rows["state"] == "finished"].groupby("task")["before"].mean()
        base = ", ".join(f"{task} {score:.3f}" for task, score in before.items())
        there = (rows["kind"] == "reported").any()
        table = (
            as_markdown(blocks(rows.drop(columns=["size", "part"]))).strip()
            if there
            else "No rate ended."
        )
        what = f"Settings: {', '.join(_settings(rows))}. Before training: {base}."
        found.append([f"### {part}", what, table])
    return found


def _settings(rows: pd.DataFrame) -> list[str]:
    """The settings that all reported runs of a part share: `SHOWN`, what their topology uses, and
    what isn't at its default.
    """
    reported = rows[rows["kind"] == "reported"]
    used = {name for topology in set(reported["topology"]) for name in TOPOLOGIES[topology].uses}
    shared = []
    for field in dataclasses.fields(Config):
        values = set(reported[field.name].dropna()) if field.name in reported else set()
        if len(values) != 1 or field.name in ("seed", "lr"):
            continue
        (value,) = values
        if value != field.default or field.name in (*SHOWN, *used):
            text = f"{value:g}" if isinstance(value, float) else str(value)
            shared.append(f"`{field.name}` {text}")
    return shared


def _cost(frame: pd.DataFrame) -> str:
    done = frame[frame["state"] == "finished"].drop_duplicates(["part", "folder"])
    hours = done["wall_seconds"].sum() / 3600
    machines = sorted(done["processor"].fillna("a machine unknown").unique())
    where = " and ".join(machines)
    return f"{len(done)} runs, {hours:.1f} hours of them one after another, on {where}."


def draw(found: Sequence[Finding], path: Path) -> None:
    """Draw the differences with their intervals, each in units of its own spread over seeds."""
    from matplotlib.figure import Figure

    shown = [
        one for one in reversed(found) if one.apart.high is not None and one.effect is not None
    ]
    figure = Figure(figsize=(7, 0.9 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for height, one in enumerate(shown):
        assert one.effect is not None
        assert one.apart.high is not None
        reach = (one.apart.high - one.apart.mean) / one.spread
        colour = {"holds": "C2", "is contradicted": "C3"}.get(one.verdict, "0.45")
        axes.errorbar(one.effect, height, xerr=reach, fmt="o", color=colour, capsize=3)
    axes.axvline(0, color="0.7", linewidth=1)
    axes.set_yticks(range(len(shown)), [one.name for one in shown])
    axes.set_xlabel("difference in standard deviations over seeds; right of 0: as claimed")
    figure.savefig(path, dpi=150)
