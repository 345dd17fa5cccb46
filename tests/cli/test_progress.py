from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from fake_runs import events
from plait.cli.progress import View, watch
from plait.config import Config
from plait.events import Evaluated

CONFIG = Config(clients=2, rounds=3)


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    said = (("adf", event) for event in events(CONFIG, 0.8))
    watch(said, CONFIG.rounds, {"adf": 1}, Console(file=out, width=40))
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines.pop(0).startswith("adf: evaluation every round; before the first")
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
    assert "16/16 evaluations" in last
    assert "0:00:00 left" in last


def test_runs_that_nobody_planned_are_counted():
    view = View(CONFIG.rounds, {"adf": 1})
    for label in ("adf", "adf", "adf, lr 0.1"):  # a seed more, and a rate beyond the grid
        for event in events(CONFIG, 0.8):
            view.see(label, event)
    assert view.runs == {"adf": 2, "adf, lr 0.1": 1}
    assert view.plain("adf").startswith("adf run 2/2  round 3/3")
    assert view.left == "0:00:00"


def test_the_time_left_follows_the_pace_so_far():
    view = View(CONFIG.rounds, {"adf": 2}, clock=lambda: 0.0)
    assert view.left == "-:--:--"
    started, first, done, *_ = events(CONFIG, 0.8)
    for event in (started, first, done):
        view.see("adf", event)
    # 1 s to prepare, 2 s for the round; five are left. One model took .5 s to evaluate: another
    # first evaluation is left, and six of three models.
    assert view.left == "0:00:24"  # 15 + 9.5
    view.at_once = 2
    assert view.left == "0:00:12"


def test_there_is_time_left_until_the_last_evaluation_is_done():
    view = View(CONFIG.rounds, {"adf": 1}, clock=lambda: 0.0)
    *before, last = events(CONFIG, 0.8)
    before[0] = dataclasses.replace(before[0], eval_every=0, eval_rows=100, held_out_rows=900)
    for event in (one for one in before if not (isinstance(one, Evaluated) and one.round >= 0)):
        view.see("adf", event)
    assert view.done == view.all_rounds == 3
    assert (view.evaluations, view.all_evaluations) == (1, 2)
    assert view.lines["adf"].doing == "evaluating"
    assert view.left == "0:00:14"  # 900 rows of three models, at .5 s for 100 of one: 13.5
    view.clock = lambda: 10.0
    assert view.left == "0:00:04"
    view.clock = lambda: 100.0
    assert view.left == "0:00:01"
    view.see("adf", last)
    assert view.left == "0:00:00"


@pytest.mark.parametrize(
    ("every", "rows", "said"),
    [
        (10, 256, "evaluation every 10 rounds on 256 rows; before the first round and after the"),
        (0, 900, "evaluation before the first round and after the last only; --eval-every"),
    ],
)
def test_it_is_said_when_runs_evaluate(every, rows, said):
    out = io.StringIO()
    started, *others = events(CONFIG, 0.8)
    started = dataclasses.replace(started, eval_every=every, eval_rows=rows)
    told = (("adf", event) for _ in range(2) for event in (started, *others))
    watch(told, CONFIG.rounds, {"adf": 2}, Console(file=out))
    assert out.getvalue().count(said) == 1


def test_a_new_run_of_a_method_starts_its_row_anew():
    view = View(CONFIG.rounds, {"adf": 2})
    for event in events(CONFIG, 0.8):
        view.see("adf", event)
    view.see("adf", next(events(CONFIG, 0.8)))
    assert view.lines["adf"].runs == 2
    assert view.lines["adf"].round == 0
    assert view.lines["adf"].evaluated is None
