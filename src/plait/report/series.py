"""From what runs said to lines over the rounds: what every picture of a run is drawn from.

`over_rounds` takes a figure (figures.py) from all runs of a label and lays the runs side by side; a
run that is still going has gaps where it has not come yet.

Legend: S runs (seeds) of a label, R rounds, N clients.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, cycle
from typing import Any

import numpy as np

from plait.events import Evaluated, Event, RoundDone, Started
from plait.figures import FIGURES, Figure
from plait.methods import METHODS

Series = np.ndarray[Any, np.dtype[np.float64]]
Said = Sequence[Sequence[Event]]
"""The events of each run of a label."""

# Okabe and Ito's colours: told apart with any kind of colour vision. The dashes tell the lines
# apart without any.
LINE_STYLES = (
    ("#0072B2", "solid"),
    ("#D55E00", "dash"),
    ("#009E73", "dashdot"),
    ("#CC79A7", "dot"),
    ("#E69F00", "dash"),
    ("#56B4E9", "dashdot"),
    ("#000000", "solid"),
    ("#888888", "dot"),
    ("#D55E00", "solid"),
    ("#009E73", "dash"),
    ("#CC79A7", "dashdot"),
    ("#0072B2", "dot"),
    ("#56B4E9", "solid"),
    ("#888888", "dash"),
    ("#E69F00", "dashdot"),
    ("#000000", "dot"),
    ("#0072B2", "dash"),
    ("#009E73", "dot"),
    ("#888888", "dashdot"),
    ("#D55E00", "dot"),
    ("#CC79A7", "dash"),
    ("#E69F00", "solid"),
    ("#56B4E9", "dot"),
    ("#000000", "dashdot"),
    ("#D55E00", "dashdot"),
    ("#CC79A7", "solid"),
    ("#E69F00", "dot"),
    ("#000000", "dash"),
    ("#888888", "solid"),
    ("#0072B2", "dashdot"),
    ("#009E73", "solid"),
    ("#56B4E9", "dash"),
)

AVERAGED, MAJORITY = "#000000", "#666666"
"""The colours of the averaged model, and of always giving the same answer."""

FILLS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""The colours of areas, where black would weigh too much."""

UNKNOWN = "not known (a peer sees itself alone)"

FLOOR = 1e-9
"""Distances below this are rounding: a factor that all clients hold in common."""


def styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Label -> colour and dash: a method's own, the same in every picture.

    A label begins with its method's name. Where a method has more than one, all but the first take
    what is left over, first what is no method's.
    """
    own = dict(zip(METHODS, LINE_STYLES, strict=False))
    found: dict[str, tuple[str, str]] = {}
    labels = list(labels)
    for label in labels:
        style = own.get(re.split(r"[ ,']", label)[0])
        if style and style not in found.values():
            found[label] = style
    free = [one for one in chain(LINE_STYLES[len(own) :], LINE_STYLES) if one not in found.values()]
    left = cycle(dict.fromkeys(free or LINE_STYLES))
    return {label: found.get(label) or next(left) for label in labels}


def over_rounds(runs: Said, figure: Figure) -> tuple[Series, Series]:
    """Rounds done (R,) and the figure of each run (S, R), NaN where a run has not come yet."""
    chosen = [[event for event in events if isinstance(event, figure.kinds)] for events in runs]
    longest = max(chosen, key=len, default=[])
    rounds = np.array([_done(event) for event in longest], dtype=float)
    values = np.full((len(chosen), len(rounds)), np.nan)
    for row, events in zip(values, chosen, strict=True):
        row[: len(events)] = [figure.value(event) for event in events]
    if figure.log:
        # A log scale has no zero: rounds in which nobody differs leave a gap.
        values[values < FLOOR] = np.nan
    return rounds, values


def remark(groups: Mapping[str, Said], figure: Figure) -> str:
    """Why a label has no line where there is a log scale: it is zero, or nobody knows it."""
    if not figure.log:
        return ""
    words: dict[str, list[str]] = {"0 throughout": [], UNKNOWN: []}
    for label, runs in groups.items():
        found = [figure.value(e) for run in runs for e in run if isinstance(e, figure.kinds)]
        if found and np.isnan(found).all():
            words[UNKNOWN].append(label)
        elif found and max(found) < FLOOR:
            words["0 throughout"].append(label)
    return "; ".join(
        f"{what}: {', '.join(labels)}" if len(groups) > 1 else what
        for what, labels in words.items()
        if labels
    )


def band(values: Series) -> tuple[Series, Series, Series]:
    """Mean, lowest and highest (R,) of the runs (S, R) that have come to each round."""
    there = ~np.isnan(values)
    any_there = there.any(axis=0)
    count = np.maximum(there.sum(axis=0), 1)
    mean = np.where(any_there, np.where(there, values, 0.0).sum(axis=0) / count, np.nan)
    low = np.where(any_there, np.where(there, values, np.inf).min(axis=0, initial=np.inf), np.nan)
    high = np.where(
        any_there, np.where(there, values, -np.inf).max(axis=0, initial=-np.inf), np.nan
    )
    return mean, low, high


def sent_megabytes(runs: Said) -> Series:
    """(R,) what all clients of one run had sent up to each evaluation, mean over the runs, in MB.

    The first is before the first round.
    """
    rounds, sent = over_rounds(runs, FIGURES["sent_bytes"])
    done, _ = over_rounds(runs, FIGURES["accuracy_client_mean"])
    total = np.concatenate([[0.0], np.cumsum(band(sent)[0])]) / 1e6
    return np.array(total[np.searchsorted(rounds, done, side="right")])


def last_scores(runs: Said) -> tuple[Series, Series]:
    """The clients' last scores from the worst to the best, of each run that has any.

    Returns:
        Percent of the clients (P,) and the score (S, P) at it; percentiles of more than a hundred.
    """
    chosen = [[event for event in events if isinstance(event, Evaluated)] for events in runs]
    last = [np.sort(events[-1].scores) for events in chosen if events]
    shares = np.linspace(0, 100, min(101, len(last[0]))) if last else np.zeros(0)
    return shares, np.array([np.percentile(scores, shares) for scores in last])


def phases(events: Sequence[Event]) -> list[tuple[int, int, str]]:
    """(first round, round after the last, factors) of each stretch that trains the same factors.

    Rounds are counted as done: the first round lies between 0 and 1.
    """
    found: list[tuple[int, int, str]] = []
    for event in events:
        if not isinstance(event, RoundDone):
            continue
        if found and found[-1][2] == event.active:
            found[-1] = (found[-1][0], event.round + 1, event.active)
        else:
            found.append((event.round, event.round + 1, event.active))
    return found


def started(runs: Mapping[str, Said]) -> Started | None:
    """What the first of the runs said first."""
    said = (event for events in runs.values() for run in events for event in run[:1])
    return next((event for event in said if isinstance(event, Started)), None)


def _done(event: Event) -> int:
    assert not isinstance(event, Started)
    return event.round + 1
