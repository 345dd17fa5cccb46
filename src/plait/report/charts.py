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

from plait.data.tasks import span_of
from plait.experiments.significance import Estimate
from plait.figures import FIGURES, Figure
from plait.report.recorded_run import MOST_DRAWN, Track
from plait.report.series import (
    AVERAGED,
    FILLS,
    LINE_STYLES,
    MAJORITY,
    UNKNOWN,
    Said,
    Series,
    band,
    last_scores,
    over_rounds,
    phases,
    remark,
    sent_megabytes,
    started,
    styles,
)

MOST_POINTS = 300

Chart = dict[str, Any]
"""What plotly.js takes: `data` and `layout`; `alt` says in words what is drawn, `note` what else is
to be said of it; `table` has its numbers where they aren't the points of its lines. Without `data`
there is the note alone."""


def over_rounds_chart(groups: Mapping[str, Said], figure: Figure, metric: str) -> Chart:
    """A figure of every label over the rounds, with the range of its runs as a band."""
    traces: list[Chart] = []
    for label, (color, dash) in styles(groups).items():
        traces += _banded(label, *over_rounds(groups[label], figure), color, dash)
    scored = "{metric}" in figure.unit
    traces += _majority(groups, traces) if scored else []
    unit = figure.unit.format(metric=metric)
    layout = {
        "xaxis": _rounds_axis(traces),
        "yaxis": _scores_axis(unit, metric)
        if scored
        else _log_axis(unit, traces)
        if figure.log
        else _axis(unit),
    }
    many = any(len(runs) > 1 for runs in groups.values())
    said = ["line: mean over seeds; band: their range"] * many + [remark(groups, figure)]
    return _chart(traces, layout, f"{figure.title} over the rounds", "; ".join(filter(None, said)))


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
    traces: list[Chart] = []
    for label, (color, dash) in styles(groups).items():
        _, values = over_rounds(groups[label], FIGURES["accuracy_client_mean"])
        sent = sent_megabytes(groups[label])[: values.shape[1]]
        traces += _banded(label, sent, values, color, dash)
    traces += _majority(groups, traces)
    layout = {"xaxis": _axis("sent by all clients, MB") | {"rangemode": "tozero"},
              "yaxis": _scores_axis(f"{metric}, client mean", metric)}  # fmt: skip
    return _chart(traces, layout, f"{metric} against the megabytes sent")


def clients_chart(groups: Mapping[str, Said], metric: str) -> Chart:
    """The clients' last scores from the worst to the best, mean over the runs: who is left behind.

    Of more than a hundred clients the percentiles are drawn; of a single one nothing.
    """
    traces: list[Chart] = []
    for label, (color, dash) in styles(groups).items():
        shares, values = last_scores(groups[label])
        traces += _banded(label, shares, values, color, dash) if len(shares) > 1 else []
    traces += _majority(groups, traces)
    layout = {"xaxis": _axis("clients from the worst to the best, %") | {"range": [0, 100]},
              "yaxis": _scores_axis(f"{metric} of a client", metric)}  # fmt: skip
    alt = "Clients' last scores, sorted from the worst to the best"
    return _chart(traces, layout, alt, "" if traces else UNKNOWN)


Ranked = Mapping[str, tuple[Estimate, Sequence[float]]]
"""Label -> the mean over the seeds, and each seed's own value."""


def scores_chart(found: Ranked, metric: str) -> Chart:
    """The score of each label, in the range that the metric has."""
    looks = styles(found)
    layout = {"xaxis": _scores_axis(f"{metric}, client mean", metric)}
    return _intervals_chart(found, looks, span_of(metric), layout)


def differences_chart(found: Ranked, reference: str, metric: str) -> Chart:
    """The reference minus each other label, paired over the seeds."""
    looks = styles([reference, *found])
    least, most = span_of(metric)
    line = {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"width": 1.5, "dash": "dash", "color": "#888888"}}  # fmt: skip
    layout = {"xaxis": _axis(f"{metric}, {reference} - other"), "shapes": [line]}
    return _intervals_chart(found, looks, (least - most, most - least), layout)


def _intervals_chart(
    found: Ranked, looks: Mapping[str, tuple[str, str]], span: tuple[float, float], layout: Chart
) -> Chart:
    """Means with their intervals, one below the other, and a dot for each seed.

    An interval ends where its values do: no accuracy is above 1.
    """
    traces: list[Chart] = []
    rows = []
    for label, (one, seeds) in found.items():
        low, high = (one.mean if end is None else end for end in (one.low, one.high))
        low, high = max(low, span[0]), min(high, span[1])
        traces += _interval(label, one.mean, low, high, seeds, looks[label][0])
        rows.append([label, *plain_numbers([one.mean, low, high, *seeds])])
    most = max((len(seeds) for _, seeds in found.values()), default=0)
    title = layout["xaxis"]["title"]["text"]
    axis = {"autorange": "reversed", "type": "category", "categoryarray": list(found)}
    layout |= {"yaxis": axis, "showlegend": False, "height": 110 + 42 * len(found)}
    head = ["", "mean", "from", "to", *[f"seed {k}" for k in range(1, most + 1)]]
    chart = _chart(traces, layout, f"{title} with 95% intervals and a dot for each seed")
    return chart | {"table": [head, *rows]}


def _interval(
    label: str, mean: float, low: float, high: float, seeds: Sequence[float], color: str
) -> list[Chart]:
    reach = {"array": plain_numbers([high - mean]), "arrayminus": plain_numbers([mean - low])}
    both = {"type": "scatter", "mode": "markers", "name": label, "cliponaxis": False}
    hover = {"hovertemplate": "%{y}: %{x:.4f}<extra></extra>"}
    whole = {"x": plain_numbers([mean]), "y": [label], "marker": {"size": 11, "color": color},
             "error_x": {"type": "data", "symmetric": False, **reach, "thickness": 2, "width": 6,
                         "color": color}}  # fmt: skip
    rings = {"size": 8, "color": color, "symbol": "circle-open", "line": {"width": 1.5}}
    dots = {"x": plain_numbers(seeds), "y": [label] * len(seeds), "marker": rings}
    return [both | hover | whole, *([both | hover | dots] if len(seeds) > 1 else [])]


# -- one run


def fan_chart(track: Track, metric: str) -> Chart:
    """All clients of a run over the rounds: its percentiles and the worst client.

    Of a peer's part of a run its own line.
    """
    found = track.evaluations
    kept = _thinned(len(found))
    found, scored = [found[i] for i in kept], track.scored[-1]
    rounds = [float(one.round + 1) for one in found]
    levels = (0, 10, 50, 90, 100)
    low, ten, half, ninety, high = (
        np.array([np.percentile(one.scores, level) for one in found]) for level in levels
    )
    ((color, _),) = styles([track.config.method]).values()
    worst = track.name_of(scored[int(np.argmin(found[-1].scores))])
    whole = [
        _area("all clients", rounds, low, high, color + "1A"),
        _area("middle 80% of clients", rounds, ten, ninety, color + "40"),
        _line("median client", rounds, half, {"color": color, "width": 2}),
        _line(f"worst client (now {worst})", rounds, low,
              {"color": color, "width": 1.5, "dash": "dot"}),
        _line("averaged model", rounds, [one.averaged_score for one in found],
              {"color": AVERAGED, "width": 1.5, "dash": "dash"}),
    ]  # fmt: skip
    alone = [_line(worst, rounds, half, {"color": color, "width": 2})]
    traces = [one for one in (whole if len(scored) > 1 else alone) if _has_points(one)]
    traces += _majority({"": [track.events]}, traces)
    layout = {"xaxis": _rounds_axis(traces), "yaxis": _scores_axis(metric, metric)}
    words = "the run's clients as percentiles" if len(scored) > 1 else f"{worst} alone"
    return _chart(traces, layout, f"{metric} of the clients over the rounds", words)


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
    alternates = 1 < len(stretches) <= MOST_POINTS
    layout = {
        "xaxis": _rounds_axis(traces),
        "yaxis": _log_axis("after mixing, all layers", traces),
        "shapes": [_shade(*stretch) for stretch in stretches if stretch[2].startswith("A")]
        if alternates else [],
    }  # fmt: skip
    words = "shaded: A trains; not shaded: B trains" if alternates else ""
    if not any(map(_has_points, traces)):
        words = remark({"": [track.events]}, FIGURES["apart"])
    alt = "Consensus distance of A and B and the cross term over rounds"
    return _chart(traces, layout, alt, words)


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
            "x": [track.name_of(client) for client in range(shown)],
            "y": counts[:shown, label].tolist(),
            "marker": {"color": color, "pattern": {"shape": shape, "fgopacity": 0.5}},
        }
        for label, (name, color, shape) in enumerate(
            zip(names, cycle(FILLS), cycle(("", "", "", "", "", "", "/", ".", "x")), strict=False)
        )
    ]
    cut = f"the first {shown} of {len(counts)} clients" if shown < len(counts) else ""
    layout = {
        "barmode": "stack",
        "bargap": 0.15 if shown <= 60 else 0,
        "xaxis": _axis("client") | {"type": "category"},
        "yaxis": _axis("training rows"),
    }
    return _chart(traces, layout, "Rows of each class at each client", cut)


# -- parts


def _chart(traces: list[Chart], layout: Chart, alt: str, note: str = "") -> Chart:
    there = traces if any(map(_has_points, traces)) else []
    return {"data": there, "layout": layout, "alt": alt, "note": note}


def _majority(groups: Mapping[str, Said], traces: Sequence[Chart]) -> list[Chart]:
    """The score of always giving the same answer, as a line below the others."""
    begun = started(groups)
    if not traces or begun is None or not begun.majority:
        return []
    end = _last(traces) or 1
    line = {"color": MAJORITY, "width": 1.5, "dash": "dot"}
    level = plain_numbers([begun.majority] * 2)
    return [{"type": "scatter", "mode": "lines", "name": "majority class", "x": [0.0, end],
             "y": level, "line": line}]  # fmt: skip


def _last(traces: Sequence[Chart]) -> float:
    return max((float(x) for trace in traces for x in trace["x"]), default=0.0)


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
        "cliponaxis": False,
    }


def _area(name: str, x: Any, low: Series, high: Series, fill: str) -> Chart:
    around = {"x": plain_numbers([*x, *x[::-1]]), "y": plain_numbers([*low, *high[::-1]])}
    look = {"fill": "toself", "fillcolor": fill, "line": {"width": 0}, "mode": "lines"}
    return {"type": "scatter", "name": name, **around, **look, "hoverinfo": "skip"}


def _axis(title: str) -> Chart:
    return {"title": {"text": title}}


def _log_axis(title: str, traces: Sequence[Chart]) -> Chart:
    """Numbers at 1, 2 and 5 of each decade, or at 1 alone where there are many."""
    there = [y for trace in traces for y in trace["y"] if y is not None]
    decades = math.log10(max(there) / min(there)) if there else 0
    ticks = {"dtick": "D2" if decades <= 3 else 1} if decades >= 1 else {}
    return _axis(title) | {"type": "log", "tickformat": "~g", **ticks}


def _rounds_axis(traces: Sequence[Chart]) -> Chart:
    """From the start to the last round that is drawn, whole rounds alone."""
    end = _last(traces) or 1
    ticks = {"dtick": 1} if end <= 12 else {"tickformat": "d"}
    return _axis("rounds done") | {"range": [0, end], **ticks}


def _scores_axis(title: str, metric: str) -> Chart:
    """Never beyond what the metric can be."""
    least, most = span_of(metric)
    if math.isinf(most):
        return _axis(title)
    return _axis(title) | {"autorangeoptions": {"clipmin": least, "clipmax": most}}


def _has_points(trace: Chart) -> bool:
    return any(value is not None for value in trace["y"])


def _thinned(count: int) -> list[int]:
    """At most about `MOST_POINTS` numbers below `count`, the first and the last among them."""
    if count <= MOST_POINTS:
        return list(range(count))
    return sorted({round(x) for x in np.linspace(0, count - 1, MOST_POINTS)})


def plain_numbers(values: Any) -> list[float | None]:
    """Five significant digits; None for a gap."""
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values]
