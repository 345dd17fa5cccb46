"""What a person gets from a comparison: a table, a picture, and the same for machines.

Everything here is drawn from recorded events and summaries alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from plait.compare import Conclusion, Outcome, figures, significance, verdict
from plait.events import Evaluated, Event, RoundDone, Started
from plait.paired import Difference, Estimate
from plait.runs import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = Mapping[str, Sequence[Sequence[Event]]]
"""Label -> the events of each of its runs."""

FLOOR = 1e-9
"""Distances below this are rounding: a factor that all clients hold in common."""


def write_report(conclusion: Conclusion) -> None:
    """Write `summary.json`, `table.md` and `curves.png` into the comparison's folder."""
    out = conclusion.plan.out
    write_atomically(out / "summary.json", json.dumps(to_json(conclusion), indent=2) + "\n")
    write_atomically(out / "table.md", markdown(conclusion))
    curves({one.entry.label: one.events for one in conclusion.outcomes}, out / "curves.png")


# -- the table


def columns(conclusion: Conclusion) -> list[str]:
    """The table's head."""
    return [
        "method", conclusion.metric, "95% interval", "worst client", "averaged model", "loss",
        "cross term", "MB sent", "seconds", "lr", f"{conclusion.plan.methods[0]} minus this",
    ]  # fmt: skip


def cells(conclusion: Conclusion, outcome: Outcome) -> list[str]:
    """A line of the table."""
    shown = figures(outcome)
    against = {one.rival: one for one in conclusion.differences}.get(outcome.entry.label)
    return [
        outcome.entry.label,
        f"{outcome.score.mean:.3f}",
        _interval(outcome.score),
        f"{shown['accuracy_client_min']:.3f}",
        f"{shown['accuracy_averaged_model']:.3f}",
        f"{shown['loss_client_mean']:.3f}",
        f"{shown['cross_term']:.2g}",
        f"{shown['sent_bytes'] / 1e6:.1f}",
        f"{shown['wall_seconds']:.0f}",
        f"{outcome.entry.lr:g}" + ("*" if outcome.at_grid_edge else ""),
        _against(against) if against else "",
    ]


def _interval(one: Estimate, sign: str = "") -> str:
    if one.low is None or one.high is None:
        return "one seed"
    return f"{one.low:{sign}.3f} .. {one.high:{sign}.3f}"


def _against(one: Difference) -> str:
    interval = "" if one.estimate.low is None else f" ({_interval(one.estimate, '+')})"
    return f"{one.estimate.mean:+.3f}{interval}{' *' if one.significant else ''}"


def notes(conclusion: Conclusion) -> list[str]:
    """What has to be known to read the table; the verdict comes first."""
    plan, outcomes = conclusion.plan, conclusion.outcomes
    started = next(event for event in outcomes[0].events[0] if isinstance(event, Started))
    seeds = ", ".join(map(str, plan.seeds))
    found = [
        verdict(conclusion),
        f"{started.task}, {plan.config.clients} clients, {plan.config.topology}, "
        f"{plan.config.rounds} rounds; seeds {seeds}, paired; majority class "
        f"{started.majority:.3f}.",
    ]
    if any(one.significant for one in conclusion.differences):
        found.append("* beside a difference: significant at .05 after Holm's correction.")
    if any(one.at_grid_edge for one in outcomes):
        found.append("* beside a rate: at the edge of --lr-grid, a wider one may be better.")
    return found


def rich_table(conclusion: Conclusion) -> Table:
    """The table for a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(columns(conclusion)):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for outcome in conclusion.outcomes:
        table.add_row(*cells(conclusion, outcome))
    return table


def markdown(conclusion: Conclusion) -> str:
    """The table and its notes as Markdown."""
    head = columns(conclusion)
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    rows += [cells(conclusion, outcome) for outcome in conclusion.outcomes]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        table + "\n\n" + "\n\n".join(note.replace("*", r"\*") for note in notes(conclusion)) + "\n"
    )


def to_json(conclusion: Conclusion) -> dict[str, Any]:
    """Everything in the table, and each run's own summary, as plain JSON values."""
    plan = conclusion.plan
    rival = conclusion.best_rival
    return {
        "config": plan.config.to_json(),
        "metric": conclusion.metric,
        "seeds": list(plan.seeds),
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
                **figures(one),
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
                "in_words": significance(one, len(plan.seeds)),
            }
            for one in conclusion.differences
        ],
    }


# -- the picture

# Okabe and Ito's colours: told apart with any kind of colour vision.
STYLES = (
    ("#0072B2", "-"),
    ("#D55E00", "-"),
    ("#009E73", "-"),
    ("#CC79A7", "-"),
    ("#000000", ":"),
    ("#E69F00", "--"),
    ("#56B4E9", "--"),
    ("#888888", "-."),
)


def curves(runs: Cells, path: Path) -> None:
    """Draw accuracy, disagreement and cross term over the rounds.

    Args:
        runs: Label -> the events of each of its runs.
        path: The PNG to write.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("The picture needs matplotlib: pip install 'plait[report]'.") from error

    figure = Figure(figsize=(11, 5), layout="constrained", dpi=150)
    grid = figure.add_gridspec(2, 2, width_ratios=[1.35, 1])
    scores = figure.add_subplot(grid[:, 0])
    apart = figure.add_subplot(grid[0, 1])
    cross = figure.add_subplot(grid[1, 1], sharex=apart)
    _draw_scores(scores, runs)
    _draw_distances(apart, runs, _disagreement, "disagreement  $\\Xi_A + \\Xi_B$")
    _draw_distances(cross, runs, _cross_term, "cross term  $\\|C\\|_F$")
    apart.tick_params(labelbottom=False)
    cross.set_xlabel("rounds done")
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _draw_scores(axes: Axes, runs: Cells) -> None:
    started = next(e for e in next(iter(runs.values()))[0] if isinstance(e, Started))
    for (label, events), (color, dashes) in zip(runs.items(), _styles(len(runs)), strict=True):
        rounds, scores = _series(events, Evaluated, _mean_score)
        rounds = rounds + 1
        axes.plot(rounds, scores.mean(axis=0), dashes, color=color, label=label, linewidth=2)
        axes.fill_between(
            rounds, scores.min(axis=0), scores.max(axis=0), color=color, alpha=0.15, linewidth=0
        )
    if started.majority:
        axes.axhline(started.majority, color="#666666", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            "majority class", (1, started.majority), (0, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", color="#666666", fontsize=9,
        )  # fmt: skip
    seeds = len(next(iter(runs.values())))
    band = f" (line: mean of {seeds} seeds, band: their range)" if seeds > 1 else ""
    axes.set_title(f"Mean {started.metric} of the clients' own models{band}", fontsize=10)
    axes.set_xlabel("rounds done")
    axes.set_ylabel(f"{started.metric}, mean over clients")
    axes.legend(loc="lower right", frameon=False)
    _plain(axes)


def _draw_distances(axes: Axes, runs: Cells, value: Any, name: str) -> None:
    zero = []
    for (label, events), (color, dashes) in zip(runs.items(), _styles(len(runs)), strict=True):
        rounds, values = _series(events, RoundDone, value)
        mean = values.mean(axis=0)
        if (mean < FLOOR).all():
            zero.append(label)
            continue
        axes.plot(
            rounds + 1, np.where(mean < FLOOR, np.nan, mean), dashes, color=color, linewidth=1.5
        )
    axes.set_yscale("log")
    note = f", exactly 0: {', '.join(zero)}" if zero else ""
    axes.set_title(f"{name} after mixing{note}", fontsize=10)
    _plain(axes)


def _styles(count: int) -> list[tuple[str, str]]:
    return [STYLES[index % len(STYLES)] for index in range(count)]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def _series(
    runs: Sequence[Sequence[Event]], kind: type[Event], value: Any
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The rounds (R,) and a figure (seeds, R) of all events of a kind."""
    chosen = [[event for event in events if isinstance(event, kind)] for events in runs]
    rounds = np.array([event.round for event in chosen[0]])  # type: ignore[union-attr]
    return rounds, np.array([[value(event) for event in events] for events in chosen])


def _mean_score(event: Evaluated) -> float:
    return float(np.mean(event.scores))


def _disagreement(event: RoundDone) -> float:
    return sum(layer.consensus_A + layer.consensus_B for layer in event.after)


def _cross_term(event: RoundDone) -> float:
    return float(np.sqrt(sum(layer.cross_term**2 for layer in event.after)))
