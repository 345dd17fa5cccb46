"""The pictures of the web page: plotly figures as plain JSON values, with no colour of the page.

The page (templates/page.js) adds background, text and grid in the reader's light or dark scheme.
Everything is thinned out so that a page stays small: at most `MOST_POINTS` rounds on a line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from plait.experiments.significance import Difference, Estimate
from plait.figures import FIGURES, Figure
from plait.report.recorded_run import MOST_DRAWN, Track
from plait.report.series import (
    FILLS,
    LINE_STYLES,
    Said,
    Series,
    band,
    last_scores,
    over_rounds,
    phases,
    remark,
    sent_megabytes,
    started,
)

MOST_POINTS = 300

Chart = dict[str, Any]
"""What plotly.js takes: `data` and `layout`, and `alt`, which says in words what is drawn."""


def over_rounds_chart(groups: Mapping[str, Said], figure: Figure, metric: str) -> Chart:
    """A figure of every label over the rounds, with the range of its runs as a band."""
    traces: list[Chart] = []
    for (label, runs), (color, dash) in zip(groups.items(), cycle(LINE_STYLES), strict=False):
        traces += _banded(label, *over_rounds(runs, figure), color, dash)
    why, unit = remark(groups, figure), figure.unit.format(metric=metric)
    layout = {
        "xaxis": _axis("rounds done"),
        "yaxis": _axis(unit, log=figure.log and any(map(_positive, traces))),
        "annotations": [_remark(why)] if why else [],
    }
    return _chart(traces, layout, f"{figure.title} over the rounds")


def _banded(label: str, x: Series, values: Series, color: str, dash: str) -> list[Chart]:
    mean, low, high = band(values)
    keep = _thinned(len(x))
    x, mean, low, high = x[keep], mean[keep], low[keep], high[keep]
    traces = []
    if len(values) > 1:
        fill = {"fill": "toself", "fillcolor": color + "22", "line": {"width": 0}}
        there = ~np.isnan(mean)
        around = {"x": plain_numbers(np.concatenate([x[there], x[there][::-1]])),
                  "y": plain_numbers(np.concatenate([low[there], high[there][::-1]]))}  # fmt: skip
        quiet = {"hoverinfo": "skip", "showlegend": False, "legendgroup": label, "mode": "lines"}
        traces.append({"type": "scatter", "name": f"{label}, range", **around, **fill, **quiet})
    line = {"color": color, "dash": dash, "width": 2}
    return [*traces, _line(label, x, mean, line)]


def bytes_chart(groups: Mapping[str, Said], metric: str) -> Chart:
    """What was sent against what was reached."""
    traces = []
    for (label, runs), (color, dash) in zip(groups.items(), cycle(LINE_STYLES), strict=False):
        _, values = over_rounds(runs, FIGURES["accuracy_client_mean"])
        sent = sent_megabytes(runs)[: values.shape[1]]
        traces += _banded(label, sent, values, color, dash)
    layout = {"xaxis": _axis("sent by all clients, MB"),
              "yaxis": _axis(f"{metric}, client mean")}  # fmt: skip
    return _chart(traces, layout, f"{metric} against the megabytes sent")


def clients_chart(groups: Mapping[str, Said], metric: str) -> Chart:
    """The clients' last scores from the worst to the best, mean over the runs: who is left behind.

    Of more than a hundred clients the percentiles are drawn.
    """
    traces = []
    for (label, runs), (color, dash) in zip(groups.items(), cycle(LINE_STYLES), strict=False):
        shares, values = last_scores(runs)
        traces += _banded(label, shares, values, color, dash) if len(shares) else []
    layout = {"xaxis": _axis("clients from the worst to the best, %"),
              "yaxis": _axis(f"{metric} of a client")}  # fmt: skip
    return _chart(traces, layout, "Clients' last scores, sorted from the worst to the best")


def intervals_chart(estimates: Mapping[str, Estimate], unit: str, zero: bool) -> Chart:
    """Means with their intervals, one below the other."""
    labels = list(estimates)
    reach = [0.0 if one.high is None else one.high - one.mean for one in estimates.values()]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": plain_numbers([one.mean for one in estimates.values()]),
        "y": labels,
        "error_x": {"type": "data", "array": plain_numbers(reach), "thickness": 2, "width": 6},
        "marker": {"size": 11, "color": LINE_STYLES[0][0]},
        "name": unit,
        "hovertemplate": "%{y}: %{x:.4f}<extra></extra>",
    }
    line = {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"width": 1.5, "dash": "dash", "color": "#888888"}}  # fmt: skip
    layout = {
        "xaxis": _axis(unit),
        "yaxis": {"autorange": "reversed", "type": "category"},
        "showlegend": False,
        "shapes": [line] if zero else [],
        "height": 110 + 42 * len(labels),
    }
    return _chart([trace], layout, f"{unit} with 95% intervals")


def differences_chart(found: Sequence[Difference], reference: str, metric: str) -> Chart:
    """The reference minus each other method, paired over the seeds."""
    unit = f"{metric}, {reference} - other"
    return intervals_chart({one.rival: one.estimate for one in found}, unit, zero=True)


# -- one run


def fan_chart(track: Track, metric: str) -> Chart:
    """All clients of a run over the rounds: its percentiles and the worst client."""
    found = track.evaluations
    found = [found[i] for i in _thinned(len(found))]
    rounds = [float(one.round + 1) for one in found]
    levels = (0, 10, 50, 90, 100)
    low, ten, half, ninety, high = (
        np.array([np.percentile(one.scores, level) for one in found]) for level in levels
    )
    color, worst = LINE_STYLES[0][0], int(np.argmin(found[-1].scores))
    traces = [
        _area("all clients", rounds, low, high, color + "1A"),
        _area("middle 80% of clients", rounds, ten, ninety, color + "40"),
        _line("median client", rounds, half, {"color": color, "width": 2}),
        _line(f"worst client (now {worst})", rounds, low,
              {"color": LINE_STYLES[1][0], "width": 1.5, "dash": "dot"}),
        _line("averaged model", rounds, [one.averaged_score for one in found],
              {"color": LINE_STYLES[4][0], "width": 1.5, "dash": "dash"}),
    ]  # fmt: skip
    layout = {"xaxis": _axis("rounds done"), "yaxis": _axis(metric)}
    return _chart(traces, layout, f"{metric} of the clients over the rounds, as percentiles")


def own_rows_chart(track: Track, metric: str) -> Chart | None:
    """The clients' last scores on rows of their own and on those of all; None if not known."""
    found = [one for one in track.evaluations if one.own_scores]
    if not found:
        return None
    clients = list(range(len(found[-1].scores)))
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": clients,
            "y": plain_numbers(scores),
            "marker": {"size": 9, "color": color, "symbol": symbol},
        }
        for (color, _), symbol, name, scores in zip(
            LINE_STYLES,
            ("circle", "diamond"),
            ("on rows of its own", "on the rows that all are judged on"),
            (found[-1].own_scores, found[-1].scores),
            strict=False,
        )
    ]
    whole = {"dtick": 1} if len(clients) <= 24 else {}
    layout = {"xaxis": _axis("client") | whole, "yaxis": _axis(metric)}
    return _chart(traces, layout, f"{metric} of each client on its own rows and on those of all")


def consensus_chart(track: Track) -> Chart:
    """Consensus distance of A and of B and the cross term of a run, its phases shaded."""
    traces = []
    names = ("consensus_A", "consensus_B", "cross_term")
    for name, (color, _) in zip(names, LINE_STYLES, strict=False):
        rounds, values = over_rounds([track.events], FIGURES[name])
        keep = _thinned(len(rounds))
        dash = "dot" if name == "cross_term" else "solid"
        line = {"color": color, "width": 2, "dash": dash}
        traces.append(_line(FIGURES[name].title, rounds[keep], values[0][keep], line))
    stretches = phases(track.events)
    words = "shaded: A trains; not shaded: B trains"
    unknown = bool(stretches) and not any(one.after for one in track.rounds)
    words = "not known: a peer sees itself alone" if unknown else words
    alternates = 1 < len(stretches) <= MOST_POINTS
    layout = {
        "xaxis": _axis("rounds done"),
        "yaxis": _axis("after mixing, all layers", log=any(_positive(one) for one in traces)),
        "shapes": [_shade(*stretch) for stretch in stretches if stretch[2].startswith("A")]
        if alternates else [],
        "annotations": [_remark(words)] if alternates or unknown else [],
    }  # fmt: skip
    return _chart(traces, layout, "Consensus distance of A and B and the cross term over rounds")


def _shade(first: int, end: int, _factors: str) -> Chart:
    return {"type": "rect", "x0": first, "x1": end, "yref": "paper", "y0": 0, "y1": 1,
            "fillcolor": "#8888882E", "line": {"width": 0}, "layer": "below"}  # fmt: skip


def partition_chart(track: Track) -> Chart:
    """The rows of each class that each client holds; of many clients the first ones."""
    begun = started({"": [track.events]})
    assert begun is not None
    counts = np.array(begun.label_counts)
    shown = min(len(counts), 2 * MOST_DRAWN)
    names = begun.label_names or ("rows",)
    traces = [
        {
            "type": "bar",
            "name": name,
            "x": list(range(shown)),
            "y": counts[:shown, label].tolist(),
            "marker": {"color": color, "pattern": {"shape": shape, "fgopacity": 0.5}},
        }
        for label, (name, color, shape) in enumerate(
            zip(names, cycle(FILLS), cycle(("", "", "", "", "", "", "/", ".", "x")), strict=False)
        )
    ]
    cut = [_remark(f"the first {shown} of {len(counts)} clients")] if shown < len(counts) else []
    layout = {
        "barmode": "stack",
        "bargap": 0.15 if shown <= 60 else 0,
        "xaxis": _axis("client"),
        "yaxis": _axis("training rows"),
        "annotations": cut,
    }
    return _chart(traces, layout, "Rows of each class at each client")


# -- parts


def _chart(traces: list[Chart], layout: Chart, alt: str) -> Chart:
    return {"data": traces, "layout": layout, "alt": alt}


def _line(name: str, x: Any, y: Any, line: Chart) -> Chart:
    few = len(x) <= 40
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "marker": {"size": 4, "color": line["color"]},
        "name": name,
        "legendgroup": name,
        "x": plain_numbers(x),
        "y": plain_numbers(y),
        "line": line,
    }


def _area(name: str, x: Any, low: Series, high: Series, fill: str) -> Chart:
    around = {"x": plain_numbers([*x, *x[::-1]]), "y": plain_numbers([*low, *high[::-1]])}
    look = {"fill": "toself", "fillcolor": fill, "line": {"width": 0}, "mode": "lines"}
    return {"type": "scatter", "name": name, **around, **look, "hoverinfo": "skip"}


def _axis(title: str, log: bool = False) -> Chart:
    axis: Chart = {"title": {"text": title}}
    return axis | ({"type": "log", "exponentformat": "power"} if log else {})


def _remark(text: str) -> Chart:
    return {"text": text, "showarrow": False, "xref": "paper", "yref": "paper", "x": 1, "y": 1.02,
            "xanchor": "right", "yanchor": "bottom", "font": {"size": 12}}  # fmt: skip


def _positive(trace: Chart) -> bool:
    return any(value is not None for value in trace["y"])


def _thinned(count: int) -> list[int]:
    """At most about `MOST_POINTS` numbers below `count`, the first and the last among them."""
    if count <= MOST_POINTS:
        return list(range(count))
    return sorted({round(x) for x in np.linspace(0, count - 1, MOST_POINTS)})


def plain_numbers(values: Any) -> list[float | None]:
    """Five significant digits; None for a gap."""
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values]
