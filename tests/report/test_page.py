"""Reading folders back, putting runs into groups, and what the page says and draws of them."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import shlex
import sys

import numpy as np
import plotly
import plotly.graph_objects as go
import pytest

from fake_folders import CONFIG, NAMES, begin_run, write_comparison, write_peer, write_run
from fake_runs import events, pairs_apart
from plait.cli import main as cli
from plait.cli import report as cli_report
from plait.cli.arguments import defaults, parse
from plait.cli.main import main
from plait.events import RoundDone, from_line, to_line
from plait.experiments.plan import load_plan
from plait.experiments.significance import estimate
from plait.figures import FIGURES, summarize
from plait.methods import METHODS
from plait.report import charts
from plait.report.meetings import topology
from plait.report.page import COLUMNS, PLOTLY, _run_row, _text, html_report, payload, plotly_js
from plait.report.paper_figures import PICTURES
from plait.report.recorded_run import MOST_DRAWN, Track, meetings
from plait.report.series import (
    FILLS,
    LINE_STYLES,
    band,
    over_rounds,
    phases,
    remark,
    sent_megabytes,
    styles,
)
from plait.report.study import (
    compare_command,
    find_studies,
    read_studies,
    run_command,
    settings,
)


def read(*paths):
    return read_studies(list(paths))


def described(html: str) -> list[list[str]]:
    """The cells of the table of results."""
    table = re.search(r'<table id="results">.*?</table>', html, re.DOTALL).group()
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


# -- a track


def test_a_track_reads_on_where_it_stopped(tmp_path):
    go_on = begin_run(tmp_path / "run")
    track = Track.open(tmp_path / "run")
    assert not track.read()
    for _ in range(3):
        go_on()
    assert track.read()
    assert len(track.events) == 3
    assert not track.read()
    while go_on():
        pass
    assert track.read()
    assert len(track.rounds) == CONFIG.rounds
    assert len(track.meetings) == CONFIG.rounds
    assert track.rounds[0].edges == []


def test_half_a_line_waits_for_its_other_half(tmp_path):
    go_on = begin_run(tmp_path / "run")
    go_on()
    file = tmp_path / "run" / "events.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:20])
    track = Track.open(tmp_path / "run")
    track.read()
    assert len(track.events) == 1
    with file.open("a") as rest:
        rest.write(whole[20:])
    track.read()
    assert len(track.events) == 2


def test_a_resumed_run_is_read_anew(tmp_path):
    folder = write_run(tmp_path / "run")
    track = Track.open(folder)
    track.read()
    file = folder / "events.jsonl"
    kept = file.read_text().splitlines(keepends=True)[:4]
    (folder / "new").write_text("".join(kept))
    (folder / "new").replace(file)
    track.read()
    assert len(track.events) == 4
    assert len(track.meetings) == len(track.rounds) == 1


def test_kinds_of_events_from_elsewhere_are_passed_over(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "Sung", "round": 3}\n')
    track = Track.open(folder)
    track.read()
    assert len(track.rounds) == CONFIG.rounds


def test_what_a_language_model_writes_stands_side_by_side(tmp_path):
    folder = write_run(tmp_path / "run")
    (study,) = read(folder)
    made = payload(study)
    assert not made["pieces"]["samples"].strip()
    assert "perplexity" not in made["pieces"]["runs"]
    events = (folder / "events.jsonl").read_text()
    as_language = events.replace('"objective": "classification"', '"objective": "language"')
    (folder / "events.jsonl").write_text(as_language)
    (folder / "summary.json").unlink()
    sample = {"prompt": "1 < 2?", "before": "old", "after": "new", "reference": "yes"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (study,) = read(folder)
    pieces = payload(study)["pieces"]
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", pieces["samples"])
    assert cells[4:] == ["1 &lt; 2?", "old", "new", "yes"]
    assert '<th scope="col">base perplexity</th>' in pieces["runs"]


def test_a_run_that_goes_on_shows_what_is_known_of_it(tmp_path):
    go_on = begin_run(tmp_path / "run")
    track = Track.open(tmp_path / "run")
    assert _run_row("", track)[3:] == [""] * len(COLUMNS)
    go_on(), go_on()
    track.read()
    assert _run_row("", track)[3:7] == ["0.500", "0.400", "0.520", "0.500"]
    while go_on():
        pass
    track.read()
    so_far = _run_row("", track)
    unknown = {name for name, cell in zip(COLUMNS, so_far[3:], strict=True) if not cell}
    assert unknown == {name for name, one in COLUMNS.items() if one.only or one.sometimes}
    assert track.summary is None
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summarize(CONFIG, track.events)))
    assert track.finished
    assert _run_row("", track) == so_far


def test_meetings_forget_the_direction_and_the_clients_that_are_not_drawn():
    said = next(e for e in events(CONFIG, 0.8) if isinstance(e, RoundDone))
    edges = [(0, 1, 0.5), (1, 0, 0.25), (MOST_DRAWN, 2, 0.1), (2, 0, 0.1)]
    apart = [(0, 2, 4.0), (1, MOST_DRAWN, 9.0)]
    found = meetings(dataclasses.replace(said, edges=edges, pairs_apart=apart), MOST_DRAWN + 1)
    assert found.pairs.tolist() == [[0, 1], [0, 2]]
    assert found.weights.tolist() == pytest.approx([0.5, 0.1])
    assert found.count == 3
    assert found.apart.shape == (MOST_DRAWN, MOST_DRAWN)
    assert found.apart[0, 2] == found.apart[2, 0] == 4
    assert np.isfinite(found.apart).sum() == 2
    nobody = meetings(dataclasses.replace(said, edges=[], pairs_apart=[]), 4)
    assert (nobody.count, nobody.pairs.shape) == (0, (0, 2))


def test_events_of_before_there_were_distances_are_read(tmp_path):
    line = next(to_line(e) for e in events(CONFIG, 0.8) if isinstance(e, RoundDone))
    values = json.loads(line)
    del values["apart"], values["pairs_apart"]
    found = from_line(json.dumps(values))
    assert found.apart == found.pairs_apart == []


# -- series


def test_runs_that_have_not_come_as_far_leave_gaps():
    short = list(events(CONFIG, 0.8))[:6]
    rounds, values = over_rounds(
        [list(events(CONFIG, 0.8)), short], FIGURES["accuracy_client_mean"]
    )
    assert rounds.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.isnan(values[1]).sum() == 4
    mean, low, high = band(values)
    assert mean[-1] == low[-1] == high[-1] == pytest.approx(0.8)
    assert np.isnan(band(np.full((2, 1), np.nan))[0]).all()


def test_bytes_add_up_over_the_rounds():
    sent = sent_megabytes([list(events(CONFIG, 0.8))])
    assert sent.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_phases_are_stretches_of_the_same_factors():
    assert phases(list(events(CONFIG, 0.8)))[:2] == [(0, 1, "B"), (1, 2, "A")]


# -- studies


def test_a_comparison_is_one_study_with_the_lines_of_its_table(tmp_path, monkeypatch):
    write_comparison(tmp_path / "cmp", monkeypatch)
    (study,) = read(tmp_path)
    assert list(study.groups) == ["adf", "dec-lora", "ffa", "dec-lora (matched)"]
    assert study.finished
    assert study.conclusion() is not None


def test_loose_runs_are_grouped_by_what_sets_them_apart(tmp_path):
    for method in ("adf", "ffa"):
        for seed in (0, 1):
            config = dataclasses.replace(CONFIG, method=method, seed=seed)
            write_run(tmp_path / f"{method}{seed}", config)
    (study,) = read(tmp_path)
    assert {label: len(runs) for label, runs in study.groups.items()} == {"adf": 2, "ffa": 2}
    (difference,) = study.differences()
    assert difference.rival == "ffa"
    write_run(tmp_path / "slow", dataclasses.replace(CONFIG, lr=1e-5, seed=0))
    (study,) = read(tmp_path)
    assert "adf, lr 1e-05" in study.groups
    assert study.differences() == []


def test_a_sweeps_search_is_shown_until_there_is_more(tmp_path):
    write_run(tmp_path / "tuning" / "adf", dataclasses.replace(CONFIG, seed=1000))
    (study,) = read(tmp_path)
    assert [track.path.parent.name for _, track in study.tracks] == ["tuning"]
    write_run(tmp_path / "runs" / "adf", CONFIG)
    (study,) = read(tmp_path)
    assert [track.path.parent.name for _, track in study.tracks] == ["runs"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no run in"):
        find_studies([tmp_path])


def test_the_commands_make_the_same_runs(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, method="ffa", clip_norm=None, label_skew="dirichlet:0.1")
    _, name, *args = shlex.split(run_command(config, "out"))
    given = parse(cli.Run, name, args, cli.Run(**defaults(args)))
    assert given.settings == config
    settings = {"lrs": {"adf": 2e-3, "ffa": 0.01}, "matched_control": False}
    plan = write_comparison(tmp_path / "a b", monkeypatch, **settings)
    assert load_plan(tmp_path / "a b") == plan
    _, name, *args = shlex.split(compare_command(plan))
    start = cli.Compare(**defaults(args), methods="", lrs="")
    given = parse(cli.Compare, name, args, start)
    again = cli._plan(given, start.settings, plan.out)
    assert again == plan


# -- charts


def test_every_chart_is_one_that_plotly_takes(tmp_path, monkeypatch):
    write_comparison(tmp_path / "cmp", monkeypatch)
    made = payload(read(tmp_path / "cmp")[0])
    drawn = [*made["charts"].values(), *(c for run in made["runs"] for c in run["charts"].values())]
    assert len(drawn) == 10 + 3 * 12
    for chart in drawn:
        go.Figure(chart["data"], chart["layout"])
        assert chart["alt"]


def test_the_library_is_the_one_that_plotly_checks_against():
    version = re.search(r"plotly-cartesian-(.*)\.min", PLOTLY).group(1)
    assert f"v{version}" in plotly_js()[:100]
    assert f"v{version}" in plotly.offline.get_plotlyjs()[:100]


def test_the_topology_holds_who_met_whom(tmp_path):
    (study,) = read(write_run(tmp_path / "run"))
    drawn = topology(study.tracks[0][1])
    pairs = [
        np.frombuffer(base64.b64decode(drawn["pairs"][at]), np.uint16).reshape(-1, 2).tolist()
        for at in drawn["drawn"]
    ]
    assert pairs[:4] == [[[0, 1]], [[0, 2]], [[0, 3]], [[0, 1]]]
    assert len(drawn["pairs"]) == 3
    assert drawn["apart"][0] == [0.70711, 1.0, 0.70711, 1.0]
    assert drawn["rounds"] == [1, 2, 3, 4, 5, 6]
    assert [base64.b64decode(one) for one in drawn["weights"]] == [b"\xff"] * 3
    assert drawn["heaviest"] == 0.5


def test_the_topology_holds_who_disagreed_with_whom(tmp_path):
    (study,) = read(write_run(tmp_path / "run"))
    drawn = topology(study.tracks[0][1])
    assert (drawn["least"], drawn["most"]) == pytest.approx((1 / 32, 3), rel=1e-6)
    for round_, code in enumerate(drawn["between"]):
        levels = np.frombuffer(base64.b64decode(code), np.uint8).astype(float)
        distances = drawn["least"] * (drawn["most"] / drawn["least"]) ** ((levels - 2) / 253)
        expected = [math.sqrt(apart) for _, _, apart in pairs_apart(CONFIG, round_)]
        assert distances == pytest.approx(expected, rel=0.01)


def test_distances_that_are_not_known_are_told_from_those_that_are_nothing(tmp_path):
    said = [dataclasses.replace(e, pairs_apart=[(0, 1, 0.0), (2, 3, 1.0)])
            if isinstance(e, RoundDone) else e for e in events(CONFIG, 0.8)]  # fmt: skip
    folder = write_run(tmp_path / "run")
    (folder / "events.jsonl").write_text("".join(to_line(event) + "\n" for event in said))
    (study,) = read(folder)
    found = base64.b64decode(topology(study.tracks[0][1])["between"][0])
    assert list(found) == [1, 0, 0, 0, 0, 2]


def test_a_long_run_is_thinned_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "MOST_POINTS", 3)
    (study,) = read(write_run(tmp_path / "run"))
    drawn = topology(study.tracks[0][1])
    assert drawn["step"] == 2
    assert drawn["rounds"] == [1, 3, 5, 6]
    chart = charts.over_rounds_chart(study.said, FIGURES["accuracy_client_mean"], "accuracy")
    assert chart["data"][0]["x"] == [0.0, 3.0, 6.0]


def test_a_thousand_clients_stay_small(tmp_path):
    config = dataclasses.replace(CONFIG, clients=1000, rounds=20)
    html = html_report(read(write_run(tmp_path / "run", config)))
    assert len(html) - len(plotly_js()) < 400_000
    assert "of 1000 clients" in html


def test_lines_over_the_rounds_begin_at_nought_and_have_the_majority_class(tmp_path):
    (study,) = read(write_run(tmp_path / "run"))
    made = payload(study)
    begun = study.tracks[0][1].started
    for name in ("accuracy_client_mean", "accuracy_client_min", "accuracy_averaged_model"):
        chart = made["charts"][name]
        assert chart["data"][-1]["y"] == [begun.majority] * 2
        assert chart["layout"]["xaxis"]["range"] == chart["data"][-1]["x"] == [0, 6]
        assert chart["layout"]["yaxis"]["autorangeoptions"] == {"clipmin": 0, "clipmax": 1}
    for name in ("loss_client_mean", "apart", "cross_term"):
        assert "majority class" not in [one["name"] for one in made["charts"][name]["data"]]
        assert made["charts"][name]["layout"]["xaxis"]["range"] == [0, 6]


def test_an_interval_ends_where_the_metric_does_and_each_seed_has_a_ring():
    scores = {"adf": [0.9, 1.0, 0.98], "ffa": [0.0, 0.1, 0.0]}
    ranked = {label: (estimate(values), values) for label, values in scores.items()}
    high = ranked["adf"][0]
    assert high.high > 1
    chart = charts.scores_chart(ranked, "accuracy")
    bars = [one for one in chart["data"] if "error_x" in one]
    (mean,), reach = bars[0]["x"], bars[0]["error_x"]
    assert mean - reach["arrayminus"][0] == pytest.approx(high.low, abs=1e-4)
    assert mean + reach["array"][0] == pytest.approx(1, abs=1e-4)
    (mean,), reach = bars[1]["x"], bars[1]["error_x"]
    assert mean - reach["arrayminus"][0] == pytest.approx(0, abs=1e-5)
    rings = {one["name"]: one["x"] for one in chart["data"] if "error_x" not in one}
    assert rings == scores
    assert chart["table"][1][3:] == [1.0, 0.9, 1.0, 0.98]
    # A correlation can be below 0, and what has no known range is left as it is.
    assert charts.scores_chart(ranked, "matthews")["table"][2][2] == pytest.approx(-0.11, abs=0.01)
    assert charts.scores_chart(ranked, "rmse")["table"][1][3] > 1


def test_a_method_has_one_colour_everywhere():
    alone = {method: styles([method])[method] for method in METHODS}
    assert len(set(alone.values())) == len(METHODS)
    labels = ["dec-lora (matched)", "ffa, rank 4", "dec-lora", "ffa", "mine"]
    found = styles(labels)
    assert list(found) == labels
    assert len(set(found.values())) == 5
    for label, method in (("dec-lora (matched)", "dec-lora"), ("ffa, rank 4", "ffa")):
        assert found[label] == alone[method]
    assert styles(["dec-lora", "dec-lora (matched)"])["dec-lora"] == alone["dec-lora"]
    assert set(styles([f"adf, lr {k}" for k in range(40)]).values()) == set(LINE_STYLES)


def test_every_colour_is_one_and_classes_are_told_apart_in_the_dark_too(tmp_path, monkeypatch):
    write_comparison(tmp_path / "cmp", monkeypatch)
    made = json.dumps(payload(read(tmp_path / "cmp")[0]))
    colours = set(re.findall(r'color": "([^"]*)"', made))
    assert colours
    assert all(re.fullmatch(r"#[0-9A-Fa-f]{6}([0-9A-Fa-f]{2})?", one) for one in colours)
    for scheme in ("ON_DARK", "ON_LIGHT"):
        table = re.search(rf"const {scheme} = {{(.*?)}};", _text("page.js"), re.DOTALL).group(1)
        other = dict(re.findall(r'"(#\w+)": "(#\w+)"', table))
        fills = [np.array([int(other.get(one, one)[k : k + 2], 16) for k in (1, 3, 5)])
                 for one in FILLS]  # fmt: skip
        apart = [np.linalg.norm(a - b) for k, a in enumerate(fills) for b in fills[:k]]
        assert min(apart) > 40


# -- the page


def test_the_tables_numbers_are_those_of_summary_json(tmp_path, monkeypatch):
    write_comparison(tmp_path / "cmp", monkeypatch)
    head, *lines = described(html_report(read(tmp_path / "cmp")))
    summary = json.loads((tmp_path / "cmp" / "summary.json").read_text())
    against = {one["rival"]: one for one in summary["differences"]}
    assert len(lines) == len(summary["methods"])
    for line, one in zip(lines, summary["methods"], strict=True):
        shown = dict(zip(head, line, strict=True))
        reach = one["interval"][1] - one["accuracy_client_mean"]
        assert shown["accuracy"] == f"{one['accuracy_client_mean']:.3f} ± {reach:.3f}"
        assert shown["worst"] == f"{one['accuracy_client_min']:.3f}"
        assert shown["MB sent"] == f"{one['sent_bytes'] / 1e6:.1f}"
        if one["label"] in against:
            assert shown["adf - this"].startswith(f"{against[one['label']]['difference']:+.3f}")


def test_nothing_in_a_run_can_become_a_part_of_the_page(tmp_path):
    bad = "</script><script>alert(1)</script><b>"
    folder = write_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"task": bad, "backbone": bad}))
    html = html_report(read(folder))
    assert "alert(1)" in html
    assert "<script>alert" not in html


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path):
    html = html_report(read(write_run(tmp_path / "run")))
    outside = html.replace(plotly_js(), "")
    assert "default-src 'none'" in outside
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"", outside)


# -- the commands


def test_report_and_figures_are_written(tmp_path, monkeypatch, capsys):
    write_comparison(tmp_path / "cmp", monkeypatch, methods=("adf", "ffa"))
    assert main(["report", str(tmp_path / "cmp"), "--out", str(tmp_path / "new" / "r.html")]) == 0
    assert "r.html" in capsys.readouterr().out
    assert (tmp_path / "new" / "r.html").read_text().startswith("<!doctype html>")
    for form, start in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        out = tmp_path / form
        assert main(["figures", str(tmp_path / "cmp"), f"--out={out}", f"--format={form}"]) == 0
        assert {path.stem for path in out.iterdir()} == set(PICTURES)
        assert all(path.read_bytes().startswith(start) for path in out.iterdir())


def test_two_studies_have_a_folder_of_figures_each(tmp_path, monkeypatch):
    for name in ("one", "two"):
        write_comparison(tmp_path / name, monkeypatch, methods=("ffa",), seeds=(0,))
    assert main(["figures", str(tmp_path), f"--out={tmp_path / 'f'}", "--format=svg"]) == 0
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"one", "two"}


def test_no_runs_no_report(tmp_path, capsys):
    assert main(["report", str(tmp_path), f"--out={tmp_path / 'r.html'}"]) == 1
    assert "There is no run in" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_the_page_needs_jinja(monkeypatch, tmp_path):
    from plait.report.page import _environment

    _environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"pip install 'plait\[report\]'"):
        html_report(read(write_run(tmp_path / "run")))
    _environment.cache_clear()


def test_the_options_are_these():
    names = {kind: {f.name for f in dataclasses.fields(kind)}
             for kind in (cli_report.Report, cli_report.Figures, cli_report.Dashboard)}  # fmt: skip
    assert names == {
        cli_report.Report: {"dirs", "out"},
        cli_report.Figures: {"dirs", "out", "format"},
        cli_report.Dashboard: {"dirs", "host", "port"},
    }


# -- peers


def test_peers_with_rows_of_their_own_are_one_run_too(tmp_path):
    for client in range(4):
        own = dataclasses.replace(CONFIG, train_file=f"rows-{client}.csv", backbone=f"/m{client}")
        write_peer(tmp_path / "fed" / f"peer-{client}" / "out", client, 3, own)
    other = dataclasses.replace(CONFIG, lr=0.5)
    write_peer(tmp_path / "fed" / "peer-4" / "out", 0, 3, other)
    (study,) = find_studies([tmp_path])
    assert [len(track.configs) for _, track in study.tracks] == [4, 1]
    assert "plait peer --config federation.toml --name NAME" in study.commands()
    shown = {name: text for name, text, _ in settings(*study.configs)}
    assert shown["train_file"] == "rows-0.csv, rows-1.csv, rows-2.csv, rows-3.csv, None"


def test_the_peers_of_a_federation_are_one_run(tmp_path):
    for client in range(4):
        write_peer(tmp_path / "federation" / f"peer-{client}" / "out", client, 3 if client else 2)
    seen: dict = {}
    (study,) = find_studies([tmp_path], seen)
    ((label, track),) = study.tracks
    track.read()
    assert label == "adf"
    assert len(track.rounds) == 2  # peer 0 is behind the others
    assert track.evaluations[-1].scores == pytest.approx([0.5, 0.7, 0.5, 0.7])
    assert track.rounds[0].sent_bytes == 4_000_000
    assert [one.pairs.tolist() for one in track.meetings] == [[[0, 1]], [[0, 2]]]
    known = [np.argwhere(np.isfinite(one.apart)).tolist() for one in track.meetings]
    assert known == [[[0, 1], [1, 0]], [[0, 2], [2, 0]]]
    write_peer(tmp_path / "federation" / "peer-0" / "out", 0, 3)
    (study,) = find_studies([tmp_path], seen)
    assert study.tracks[0][1] is track
    track.read()
    assert len(track.rounds) == 3
    made = payload(study)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert "12.0" in made["pieces"]["runs"]
    assert "plait up --peers 4" in made["pieces"]["settings"]
    for chart in (made["charts"]["apart"], made["charts"]["cross_term"],
                  made["runs"][0]["charts"]["consensus"]):  # fmt: skip
        assert (chart["data"], chart["note"]) == ([], "not known (a peer sees itself alone)")


def test_a_peers_part_has_names_and_no_score_of_others(tmp_path):
    write_peer(tmp_path / "b" / "out", 1, 3, client_names=NAMES, peer=1)
    (study,) = read(tmp_path)
    made = payload(study)
    assert study.title == "clinic"
    assert study.remarks == ("Of the 4 peers clinic alone is here.",)
    (run,) = made["runs"]
    assert run["topology"]["names"] == list(NAMES)
    assert run["topology"]["scores"][-1] == [None, 0.75, None, None]
    assert [one["name"] for one in run["charts"]["fan"]["data"]] == ["clinic", "majority class"]
    assert run["charts"]["partition"]["data"][0]["x"] == list(NAMES)
    assert made["charts"]["clients"]["data"] == []
    assert "averaged" not in made["pieces"]["runs"]


def test_a_peer_whose_rows_its_own_loop_knows_has_neither_score_nor_loss(tmp_path):
    out = tmp_path / "b" / "out"
    write_peer(out, 1, 3, client_names=NAMES, peer=1)
    lines = (out / "events.jsonl").read_text().splitlines()
    kept = [
        json.dumps(one | ({"train_losses": [math.nan]} if one["event"] == "RoundDone" else {}))
        for one in map(json.loads, lines)
        if one["event"] != "Evaluated"
    ]
    (out / "events.jsonl").write_text("\n".join([*kept, ""]))
    (study,) = read(tmp_path)
    made = payload(study)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert study.remarks == ("Of the 4 peers clinic alone is here.",)


def test_peers_take_the_places_that_they_have_in_their_federation(tmp_path):
    for name, client in (("a", 3), ("b", 0)):
        write_peer(tmp_path / name / "out", client, 2, client_names=NAMES, peer=client)
    (study,) = read(tmp_path)
    drawn = topology(study.tracks[0][1])
    assert drawn["scores"][-1] == [0.5, None, None, 0.7]  # client 0 of peer b, and 3 of a
    assert study.remarks == ("Of the 4 peers south, north alone are here.",)


def test_own_rows_and_classes_are_shown_where_a_run_has_them(tmp_path):
    plain = payload(read(write_run(tmp_path / "plain"))[0])
    assert "own rows" not in plain["pieces"]["runs"] + plain["pieces"]["results"]
    assert plain["runs"][0]["classes"] == []
    said = list(events(CONFIG, 0.8))
    own = {"own_scores": [0.9, 0.8, 0.9, 0.7], "own_rows": [5, 5, 5, 6]}
    said[-1] = dataclasses.replace(said[-1], confusion=[[3, 1], [0, 4]], **own)
    folder = write_run(tmp_path / "own")
    (folder / "events.jsonl").write_text("".join(to_line(event) + "\n" for event in said))
    (folder / "summary.json").write_text(json.dumps(summarize(CONFIG, said)))
    made = payload(read(folder)[0])
    for table in ("runs", "results"):
        assert "accuracy, own rows" in made["pieces"][table]
        assert "0.825" in made["pieces"][table]
    (run,) = made["runs"]
    assert [trace["y"] for trace in run["charts"]["own"]["data"]] == [
        own["own_scores"], [0.7, 0.9, 0.7, 0.9],
    ]  # fmt: skip
    go.Figure({k: v for k, v in run["charts"]["own"].items() if k != "alt"})
    assert run["classes"][1] == ["no", "1.000", "0.750", "0.857", "75", "25"]


def test_what_is_zero_is_not_called_unknown():
    ffa = dataclasses.replace(CONFIG, method="ffa")
    said = {"adf": [list(events(CONFIG, 0.8))], "ffa": [list(events(ffa, 0.8))]}
    assert remark(said, FIGURES["cross_term"]) == "0 throughout: ffa"
    assert remark(said, FIGURES["apart"]) == remark(said, FIGURES["accuracy_client_mean"]) == ""
