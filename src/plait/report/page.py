"""The web page of a study: one file that opens offline, and the same page kept fresh by a server.

`payload` turns a study into plain JSON values: pieces of HTML (made by Jinja from templates/) and
charts. A report holds the payloads of all its studies; the dashboard sends a new one whenever a
run has said something. templates/page.js shows a payload, wherever it came from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from plait.events import Started
from plait.experiments.comparison import Conclusion, Outcome, verdict
from plait.experiments.significance import Difference, estimate
from plait.figures import FIGURES, class_table, taken
from plait.report import charts
from plait.report.charts import Chart
from plait.report.comparison_report import cells, notes
from plait.report.meetings import topology
from plait.report.recorded_run import Track
from plait.report.series import Said, started
from plait.report.study import Study, settings

if TYPE_CHECKING:
    from jinja2 import Environment

Payload = dict[str, Any]

COLUMNS = {name: one for name, one in FIGURES.items() if one.head}
PLOTLY = "vendor/plotly-cartesian-4.1.1.min.js"


def html_report(studies: Sequence[Study]) -> str:
    """One HTML file with everything in it.

    Raises:
        ValueError: jinja2 is not installed.
    """
    return render([payload(study) for study in studies])


def render(payloads: Sequence[Payload], live: bool = False) -> str:
    """The page of some payloads.

    Args:
        payloads: What is in the page from the start.
        live: The page listens to the server that it came from, which also serves plotly.js.

    Raises:
        ValueError: jinja2 is not installed.
    """
    # `<` can't end the script element that the values stand in.
    values = json.dumps(payloads, separators=(",", ":")).replace("<", "\\u003c")
    return _environment().get_template("page.html").render(
        title=payloads[0]["title"] if payloads else "plait",
        payloads=payloads,
        values=values,
        live=live,
        plotly="" if live else plotly_js(),
        css=_text("page.css"),
        js=_text("page.js"),
    )  # fmt: skip


@cache
def plotly_js() -> str:
    """The library that draws: plotly.js without maps and 3D, a third of the whole.

    It lies beside the templates as npm's `plotly.js-cartesian-dist-min` has it, so that nothing is
    fetched.
    """
    # The escape is for what would end the script element that it stands in.
    return _text(PLOTLY).replace("</script", "<\\/script")


def payload(study: Study) -> Payload:
    """Everything that the page shows of a study, as plain JSON values."""
    said = study.said
    begun = started(said)
    metric = begun.metric if begun else "score"
    conclusion = study.conclusion()
    outcomes = conclusion.outcomes if conclusion else study.outcomes()
    against = conclusion.differences if conclusion else study.differences()
    context = {
        "study": study,
        "begun": begun,
        "metric": metric,
        "facts": _facts(study, begun),
        "headline": _headline(study, conclusion),
        "table": _results(outcomes, against),
        "notes": notes(conclusion)[1:] if conclusion else [],
        "runs": _runs(study, metric),
        "samples": [(label, found) for label, track in study.tracks if (found := track.samples)],
        "settings": settings(*study.configs),
        "commands": study.commands(),
    }
    pieces = ("head", "results", "samples", "runs", "settings")
    return {
        "title": study.title,
        "finished": study.finished,
        "pieces": {name: _piece(name, context) for name in pieces},
        "charts": _charts(said, metric, outcomes, against),
        "runs": [_run(key, track, metric) for key, track in _keys(study).items()],
    }


def _keys(study: Study) -> dict[str, Track]:
    """The runs that have been evaluated, each under a name of its own."""
    keys: dict[str, Track] = {}
    for label, track in study.tracks:
        key = name = f"{label}, seed {track.config.seed}"
        while key in keys:
            key = f"{name} ({track.path.name})" if key == name else f"{key}'"
        if track.evaluations:
            keys[key] = track
    return keys


# -- the words and the tables


def _facts(study: Study, begun: Started | None) -> list[tuple[str, str]]:
    values = {name: value for name, value, _ in settings(*study.configs)}
    seeds = sorted({*study.seeds, *(study.plan.seeds if study.plan else ())})
    found = [
        ("task", begun.task if begun else values["task"]),
        *((name, values[name]) for name in ("clients", "topology", "rounds")),
        ("seeds" if len(seeds) > 1 else "seed", ", ".join(map(str, seeds))),
        ("backbone", values["backbone"]),
    ]
    if begun:
        found += [("rho of W", f"{begun.rho:.3f}"), ("device", begun.device)]
        found += [("majority class", f"{begun.majority:.3f}")] if begun.majority else []
    return found


def _headline(study: Study, conclusion: Conclusion | None) -> str:
    if conclusion:
        return verdict(conclusion)
    done = sum(len(track.rounds) for _, track in study.tracks)
    if study.plan:
        planned = study.plan.config.rounds * sum(study.plan.planned.values())
    else:
        planned = sum(track.config.rounds for _, track in study.tracks)
    if not study.finished:
        return f"{done} of {planned} rounds are done."
    runs = len(study.tracks)
    return f"{runs} run{'s' if runs > 1 else ''}, {done} rounds, all done."


def _results(outcomes: Sequence[Outcome], found: Sequence[Difference]) -> list[list[str]]:
    if not outcomes:
        return []
    lines = list(cells(outcomes, found).values())
    if not found:  # nothing to subtract
        lines = [line[:5] + line[6:] for line in lines]
    return lines


def _runs(study: Study, metric: str) -> list[list[str]]:
    """The table of all runs, its head first, without the figures that no run has."""
    head = ["run", "seed", "rounds", *(one.head.format(metric=metric) for one in COLUMNS.values())]
    rows = [_run_row(label, track) for label, track in study.tracks]
    known = [at for at in range(len(head)) if any(row[at] for row in rows)]
    return [[row[at] for at in known] for row in (head, *rows)]


def _run_row(label: str, track: Track) -> list[str]:
    """The figures of a run as in its `summary.json`; those so far, and known, until it is there."""
    found = track.summary or taken(track.events)
    shown = [one.shown(found.get(name, math.nan)) for name, one in COLUMNS.items()]
    done = f"{len(track.rounds)}/{track.config.rounds}"
    return [label, str(track.config.seed), done, *shown]


# -- the charts


def _charts(
    said: dict[str, Said], metric: str, outcomes: Sequence[Outcome], against: Sequence[Difference]
) -> dict[str, Chart]:
    found: dict[str, Chart] = {}
    scores = {one.entry.label: one.values("accuracy_client_mean") for one in outcomes}
    if len(outcomes) > 1:
        ranked = {label: (estimate(values), values) for label, values in scores.items()}
        found["estimates"] = charts.scores_chart(ranked, metric)
    if against:
        reference = outcomes[0].entry.label
        pairs = {one.rival: zip(scores[reference], scores[one.rival], strict=True)
                 for one in against}  # fmt: skip
        apart = {one.rival: (one.estimate, [mine - other for mine, other in pairs[one.rival]])
                 for one in against}  # fmt: skip
        found["differences"] = charts.differences_chart(apart, reference, metric)
    for name, figure in FIGURES.items():
        if figure.unit:
            found[name] = charts.over_rounds_chart(said, figure, metric)
    found["bytes"] = charts.bytes_chart(said, metric)
    found["clients"] = charts.clients_chart(said, metric)
    return found


def _run(key: str, track: Track, metric: str) -> Payload:
    own = charts.own_rows_chart(track, metric)
    return {
        "key": key,
        "finished": track.finished,
        "charts": {
            "fan": charts.fan_chart(track, metric),
            "consensus": charts.consensus_chart(track),
            "partition": charts.partition_chart(track),
            **({"own": own} if own else {}),
        },
        "topology": topology(track),
        "classes": class_table(track.events),
    }


# -- the templates


@cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ValueError("The page needs jinja2: pip install 'plait[report]'.") from error
    return Environment(
        loader=PackageLoader("plait.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _piece(name: str, context: dict[str, Any]) -> str:
    return _environment().get_template(f"{name}.html").render(context)


def _text(name: str) -> str:
    return resources.files("plait.report").joinpath("templates", name).read_text("utf-8")
