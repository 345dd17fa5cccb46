"""What a person gets from a comparison: a table, and the same for machines.

Everything here comes from recorded events and summaries alone. The pictures are those of
paper_figures.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from plait.experiments.comparison import Conclusion, Outcome, significance, table_figures, verdict
from plait.experiments.significance import STAR, Difference
from plait.figures import FIGURES
from plait.machine.files import write_atomically
from plait.markdown import markdown_table
from plait.report.paper_figures import curves
from plait.report.series import started

EDGE = "†"


def write_report(conclusion: Conclusion, draws: bool = True) -> None:
    """Write `summary.json`, `table.md` and perhaps `curves.png` into the comparison's folder."""
    out = conclusion.plan.out
    write_atomically(out / "summary.json", json.dumps(to_json(conclusion), indent=2) + "\n")
    write_atomically(out / "table.md", markdown(conclusion))
    if draws:
        curves({one.entry.label: one.events for one in conclusion.outcomes}, out / "curves.png")


# -- the table


def cells(outcomes: Sequence[Outcome], differences: Sequence[Difference]) -> dict[str, list[str]]:
    """Label -> its line of the table; the head is the line of the empty label."""
    reference, metric = outcomes[0].entry.label, outcomes[0].summaries[0]["metric"]
    against = {one.rival: one for one in differences}
    names = list(table_figures(outcomes[0]))
    heads = [FIGURES[name].head.format(metric=metric) for name in names]
    lines = {"": ["method", metric, *heads[:2], "lr", f"{reference} - this", *heads[2:]]}
    for outcome in outcomes:
        label, lr = outcome.entry.label, outcome.entry.lr
        found = table_figures(outcome)
        shown = [FIGURES[name].shown(found.get(name, math.nan)) for name in names]
        lines[label] = [
            label,
            outcome.score.shown(),
            *shown[:2],
            f"{lr:g}{EDGE if outcome.at_grid_edge else ''}",
            against[label].shown if label in against else "",
            *shown[2:],
        ]
    return lines


def notes(conclusion: Conclusion) -> list[str]:
    """What has to be known to read the table; the verdict comes first."""
    plan, outcomes = conclusion.plan, conclusion.outcomes
    begun = started({"": outcomes[0].events})
    assert begun is not None
    seeds = ", ".join(f"{seed:g}" for seed in outcomes[0].values("seed"))
    found = [
        verdict(conclusion),
        f"{begun.task}, {plan.config.clients} clients, {plan.config.topology}, "
        f"{plan.config.rounds} rounds; seeds {seeds}, paired"
        + (f"; majority class {begun.majority:.3f}." if begun.majority else "."),
    ]
    if len(outcomes[0].folders) > 1:
        found.append("±: 95% t interval over seeds; of differences, over pairs with the same seed.")
    if any(one.significant for one in conclusion.differences):
        found.append(f"{STAR.strip()}: significant at .05 after Holm's correction.")
    if any(one.at_grid_edge for one in outcomes):
        found.append(f"{EDGE}: at the edge of --lr-grid; a rate beyond it may be better.")
    labels = [one.entry.label for one in outcomes]
    return found + [
        f"{method}'s matched control, {control.method} at {control.lr_factor:g} times its rate, is "
        "a line already."
        for label, (method, control) in plan.controls.items()
        if label not in labels
    ]


def rich_tables(conclusion: Conclusion) -> list[Table]:
    """The table for a terminal: the scores, and under them the rest, each 80 columns wide."""
    head, *lines = cells(conclusion.outcomes, conclusion.differences).values()
    return [_rich(head, lines, part) for part in (slice(1, 6), slice(6, None))]


def _rich(head: list[str], lines: list[list[str]], part: slice) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column(head[0], no_wrap=True)
    for name in head[part]:
        shown.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        shown.add_row(line[0], *line[part])
    return shown


def markdown(conclusion: Conclusion) -> str:
    """The table and its notes as Markdown."""
    head, *lines = cells(conclusion.outcomes, conclusion.differences).values()
    return "\n\n".join([markdown_table(head, lines, numbers=True), *notes(conclusion)]) + "\n"


def to_json(conclusion: Conclusion) -> dict[str, Any]:
    """Everything in the table, and each run's own summary, as plain JSON values."""
    plan = conclusion.plan
    rival = conclusion.best_rival
    return {
        "config": plan.config.to_json(),
        "metric": conclusion.metric,
        "seeds": [int(seed) for seed in conclusion.outcomes[0].values("seed")],
        "reference": plan.methods[0],
        "best_rival": rival.rival if rival else None,
        "verdict": verdict(conclusion),
        "methods": [
            {
                "label": one.entry.label,
                "method": one.entry.method,
                "lr": one.entry.lr,
                "lr_at_grid_edge": one.at_grid_edge,
                "accuracy_client_mean": one.score.mean,
                "interval": [one.score.low, one.score.high],
                **table_figures(one),
                "runs": one.summaries,
            }
            for one in conclusion.outcomes
        ],
        "differences": [
            {
                "rival": one.rival,
                "difference": one.estimate.mean,
                "interval": [one.estimate.low, one.estimate.high],
                "p": one.estimate.p,
                "p_holm": one.p_holm,
                "significant": one.significant,
                "in_words": significance(one, len(conclusion.outcomes[0].folders)),
            }
            for one in conclusion.differences
        ],
    }
