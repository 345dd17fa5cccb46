"""What a person gets from a comparison: a table, a picture, and the same for machines.

Everything here is drawn from recorded events and summaries alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from plait.comparison import Conclusion, figures, significance, verdict
from plait.events import Evaluated, Event, RoundDone, Started
from plait.files import write_atomically
from plait.paired import Difference, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, np.dtype[Any]]
Cells = Mapping[str, Sequence[Sequence[Event]]]
"""Label -> the events of each of its runs."""

STAR, EDGE = " *", "†"

FLOOR = 1e-9
"""Distances below this are rounding: a factor that all clients hold in common."""


def write_report(conclusion: Conclusion) -> None:
    """Write `summary.json`, `table.md` and `curves.png` into the comparison's folder."""
    out = conclusion.plan.out
    write_atomically(out / "summary.json", json.dumps(to_json(conclusion), indent=2) + "\n")
    write_atomically(out / "table.md", markdown(conclusion))
    curves({one.entry.label: one.events for one in conclusion.outcomes}, out / "curves.png")


# -- the table


def table(conclusion: Conclusion) -> dict[str, list[str]]:
    """Label -> its line of the table; the head is the line of the empty label."""
    reference = conclusion.plan.methods[0]
    against = {one.rival: one for one in conclusion.differences}
    head = ["method", conclusion.metric, "worst", "averaged", "lr", f"{reference} - this"]
    lines = {"": [*head, "loss", "cross term", "MB sent", "seconds"]}
    for outcome in conclusion.outcomes:
        label, lr, shown = outcome.entry.label, outcome.entry.lr, figures(outcome)
        lines[label] = [
            label,
            _with_reach(outcome.score, "0.3f"),
            f"{shown['accuracy_client_min']:.3f}",
            f"{shown['accuracy_averaged_model']:.3f}",
            f"{lr:g}{EDGE if outcome.at_grid_edge else ''}",
            _against(against[label]) if label in against else "",
            f"{shown['loss_client_mean']:.3f}",
            f"{shown['cross_term']:.2g}",
            f"{shown['sent_bytes'] / 1e6:.1f}",
            f"{shown['wall_seconds']:.0f}",
        ]
    return lines


def _with_reach(one: Estimate, form: str) -> str:
    reach = "" if one.high is None else f" ± {one.high - one.mean:.3f}"
    return f"{one.mean:{form}}{reach}"


def _against(one: Difference) -> str:
    return _with_reach(one.estimate, "+.3f") + (STAR if one.significant else "")


def notes(conclusion: Conclusion) -> list[str]:
    """What has to be known to read the table; the verdict comes first."""
    plan, outcomes = conclusion.plan, conclusion.outcomes
    started = _started({"": outcomes[0].events})
    seeds = ", ".join(map(str, plan.seeds))
    found = [
        verdict(conclusion),
        f"{started.task}, {plan.config.clients} clients, {plan.config.topology}, "
        f"{plan.config.rounds} rounds; seeds {seeds}, paired; majority class "
        f"{started.majority:.3f}.",
    ]
    if len(plan.seeds) > 1:
        found.append("±: 95% t interval over seeds; of differences, over pairs with the same seed.")
    if any(one.significant for one in conclusion.differences):
        found.append(f"{STAR.strip()}: significant at .05 after Holm's correction.")
    if any(one.at_grid_edge for one in outcomes):
        found.append(f"{EDGE}: at the edge of --lr-grid; a rate beyond it may be better.")
    if len(outcomes) < len(plan.labels):
        found.append("dec-lora's rate is half of adf's: it is its own matched control.")
    return found


def rich_tables(conclusion: Conclusion) -> list[Table]:
    """The table for a terminal: the scores, and under them the rest, each 80 columns wide."""
    head, *lines = table(conclusion).values()
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
    head, *lines = table(conclusion).values()
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([text, *notes(conclusion)]) + "\n"


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

    figure = Figure(figsize=(11, 5.5), layout="constrained", dpi=150)
    panels = figure.subplot_mosaic([["scores", "apart"], ["scores", "cross"]], width_ratios=[3, 2])
    _draw_scores(panels["scores"], runs)
    _draw_distances(panels["apart"], runs, _disagreement, "squared norm, all layers")
    panels["apart"].set_title(r"Disagreement after mixing, $\Xi_A + \Xi_B$", loc="left")
    _draw_distances(panels["cross"], runs, _cross_term, "norm, all layers")
    panels["cross"].set_title(r"Cross term after mixing, $\|C\|_F$", loc="left")
    for panel in panels.values():
        _dress(panel)
    handles, labels = panels["scores"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _draw_scores(axes: Axes, runs: Cells) -> None:
    started = _started(runs)
    for (label, events), (color, dashes) in zip(runs.items(), cycle(STYLES), strict=False):
        rounds, scores = _series(events, Evaluated, _mean_score)
        low, high = scores.min(axis=0), scores.max(axis=0)
        axes.fill_between(rounds, low, high, color=color, alpha=0.08, linewidth=0)
        axes.plot(rounds, scores.mean(axis=0), dashes, color=color, label=label, linewidth=2)
    if started.majority:
        axes.axhline(
            started.majority,
            color="#666666",
            linewidth=1.2,
            linestyle=(0, (1, 2)),
            label="majority class",
        )
    seeds = len(next(iter(runs.values())))
    band = f"  (mean of {seeds} seeds, band: their range)" if seeds > 1 else ""
    axes.set_title(f"Clients' own models{band}", loc="left")
    axes.set_ylabel(f"{started.metric}, mean over clients")


def _draw_distances(axes: Axes, runs: Cells, value: Callable[[Any], float], unit: str) -> None:
    zero = []
    for (label, events), (color, dashes) in zip(runs.items(), cycle(STYLES), strict=False):
        rounds, values = _series(events, RoundDone, value)
        mean = values.mean(axis=0)
        # A log scale has no zero: rounds in which nobody differs leave a gap.
        shown = np.where(mean < FLOOR, np.nan, mean)
        axes.plot(rounds, shown, dashes, color=color, linewidth=1.6, marker=".", markersize=4)
        zero += [label] if np.isnan(shown).all() else []
    axes.set_yscale("log")
    axes.set_ylabel(unit)
    if zero:
        axes.annotate(
            f"0 throughout: {', '.join(zero)}", (0.99, 0.03), xycoords="axes fraction", ha="right"
        )


def _dress(axes: Axes) -> None:
    axes.set_xlabel("rounds done")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def _started(runs: Cells) -> Started:
    return next(event for event in next(iter(runs.values()))[0] if isinstance(event, Started))


def _series(
    runs: Sequence[Sequence[Event]], kind: type[Event], value: Callable[[Any], float]
) -> tuple[Array, Array]:
    """Rounds done (R,) and a figure (seeds, R) of all events of a kind."""
    chosen = [[event for event in events if isinstance(event, kind)] for events in runs]
    rounds = [event.round + 1 for event in chosen[0] if not isinstance(event, Started)]
    return np.array(rounds), np.array([[value(event) for event in events] for events in chosen])


def _mean_score(event: Evaluated) -> float:
    return float(np.mean(event.scores))


def _disagreement(event: RoundDone) -> float:
    return sum(layer.consensus_A + layer.consensus_B for layer in event.after)


def _cross_term(event: RoundDone) -> float:
    return float(np.sqrt(sum(layer.cross_term**2 for layer in event.after)))
