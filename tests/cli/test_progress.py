from __future__ import annotations

import io

from rich.console import Console

from fake_runs import events
from plait.cli.progress import View, watch
from plait.config import Config

CONFIG = Config(clients=2, rounds=3)


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    said = (("adf", event) for event in events(CONFIG, 0.8))
    watch(said, CONFIG.rounds, {"adf": 1}, Console(file=out, width=40))
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == (
        "adf  round 0/3  accuracy 0.500 (worst 0.400)  averaged model 0.520  left -:--:--"
    )
    assert lines[-1] == (
        "adf  round 3/3  accuracy 0.800 (worst 0.700)  averaged model 0.820  left 0:00:00"
    )


def test_a_terminal_shows_a_table_with_a_row_for_each_method():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    planned = {"adf": 2, "ffa": 2}
    said = [
        (label, event)
        for label, score in (("adf", 0.8), ("ffa", 0.7))
        for _ in range(planned[label])
        for event in events(CONFIG, score)
    ]
    watch(said, CONFIG.rounds, planned, console)
    last = out.getvalue().split("method")[-1]
    adf, ffa = (next(x for x in last.splitlines() if x.startswith(m)) for m in planned)
    assert adf.split() == ["adf", "2/2", "3/3", "B", "0.800", "0.700", "0.820"]
    assert ffa.split() == ["ffa", "2/2", "3/3", "B", "0.700", "0.600", "0.720"]
    assert "12/12 rounds" in last
    assert "0:00:00 left" in last


def test_the_time_left_follows_the_pace_so_far():
    view = View(CONFIG.rounds, {"adf": 2})
    assert view.left == "-:--:--"
    started, first, done, *_ = events(CONFIG, 0.8)
    for event in (started, first, done):
        view.see("adf", event)
    # 1 s to prepare, .5 s to evaluate, 2 s for the round; five rounds are left.
    assert view.left == "0:00:18"
    view.at_once = 2
    assert view.left == "0:00:09"


def test_a_new_run_of_a_method_starts_its_row_anew():
    view = View(CONFIG.rounds, {"adf": 2})
    for event in events(CONFIG, 0.8):
        view.see("adf", event)
    view.see("adf", next(events(CONFIG, 0.8)))
    assert view.lines["adf"].runs == 2
    assert view.lines["adf"].round == 0
    assert view.lines["adf"].evaluated is None
