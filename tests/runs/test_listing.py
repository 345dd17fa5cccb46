"""`plait runs`: the folders there are, by date, and those that are asked for."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from fake_folders import CONFIG, begin_run, write_run
from plait.cli.main import main
from plait.runs.listing import chosen, listed
from plait.runs.run_folder import RunFolder


@pytest.fixture
def top(tmp_path):
    go_on = begin_run(tmp_path / "new", dataclasses.replace(CONFIG, method="ffa", lr=0.5))
    for _ in range(5):
        go_on()
    write_run(tmp_path / "deep" / "old")
    os.utime(tmp_path / "deep" / "old" / "events.jsonl", (1, 1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"no_such_setting": 1}')
    (tmp_path / "other" / "events.jsonl").touch()
    return tmp_path


def test_runs_are_listed_by_date(top):
    (old, new), unread = listed(top)
    assert (old.path.name, old.state, old.rounds_done) == ("old", "finished", 6)
    assert old.score == pytest.approx(0.8)
    assert (new.path.name, new.state, new.rounds_done) == ("new", "begun", 2)
    assert [line.partition(":")[0] for line in unread] == [str(top / "other" / "config.json")]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", "{", "is damaged"),
        ("config.json", '{"lr": "fast"}', "config.json"),
        ("about.json", "[]", "is damaged"),
        ("events.jsonl", "x\n", "is damaged"),
        ("events.jsonl", "[]\n", "is damaged"),
        ("events.jsonl", '{"event": "RoundDone", "round": x\n', "is damaged"),
        ("events.jsonl", '{"event": "Evaluated"}\n', "is damaged"),
    ],
)
def test_a_folder_that_cant_be_read_is_named(top, capsys, file, text, said):
    (top / "deep" / "old" / file).write_text(text)
    assert main(["runs", str(top)]) == 0
    shown = capsys.readouterr().out
    assert "deep/old " not in shown
    (line,) = (one for one in shown.splitlines() if str(top / "deep" / "old" / file) in one)
    assert line.startswith("not listed: ")
    assert said in line


def ends_early(run: Path, keep: float) -> None:
    """Cut a run's events off: amid a line, or behind one."""
    events = run / "events.jsonl"
    there = events.read_bytes()
    cut = there[: int(keep * len(there))]
    events.write_bytes(cut if keep else there[: there.rindex(b"\n", 0, -1) + 1])


@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.999])
def test_a_finished_run_whose_events_end_early_is_not_listed(top, keep):
    ends_early(top / "deep" / "old", keep)
    (new,), unread = listed(top)
    assert new.path.name == "new"
    (line,) = (one for one in unread if str(top / "deep" / "old" / "events.jsonl") in one)
    assert ("its last line is cut off" if keep else "ends with another score") in line


def test_a_run_that_goes_on_with_a_line_half_written_is_listed(top):
    ends_early(top / "new", 0.999)
    assert listed(top)[0][1].path.name == "new"


def test_runs_are_filtered_by_settings_and_state(top):
    runs, _ = listed(top)
    assert chosen(runs, ["method=ffa", "lr=5e-1"]) == runs[1:]
    assert chosen(runs, ["state=finished"]) == runs[:1]
    with pytest.raises(ValueError, match="give setting=value"):
        chosen(runs, ["no_such=1"])


def test_runs_are_found_by_name_and_tags(top, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    folder = RunFolder(top / "new")
    folder.describe("baseline", ["old"])
    folder.describe("", ["paper", "small"])  # what is given again takes the place of what was
    folder.describe("", [])
    runs, _ = listed(top)
    assert [(one.name, one.tags) for one in runs] == [("", ()), ("baseline", ("paper", "small"))]
    assert chosen(runs, ["name=baseline"]) == chosen(runs, ["tag=small"]) == runs[1:]
    assert chosen(runs, ["tag=old"]) == []
    assert main(["runs", str(top), "--filter", "tag=paper"]) == 0
    assert re.search(r"new +baseline +paper, small +", capsys.readouterr().out)


def test_the_peers_of_a_federation_are_one_run(tmp_path):
    federation = tmp_path / "trial" / "federation"
    for name, events in (("ada", 3), ("ben", 20)):
        own = dataclasses.replace(CONFIG, train_file=f"{name}.csv")
        go_on = begin_run(federation / name / "out", own)
        for _ in range(events):
            go_on()
    assert len(listed(tmp_path)[0]) == 2, "no federation.toml"
    (federation / "federation.toml").touch()
    ((one,), _) = listed(tmp_path)
    assert (one.path, one.rounds_done, one.state) == (tmp_path / "trial", 1, "begun")
    write_run(federation / "cai" / "out", dataclasses.replace(CONFIG, seed=2))
    ((one,), _) = listed(federation)
    assert (one.path, one.rounds_done) == (federation, 1)
    ada, ben, cai = (listed(federation / name)[0][0] for name in ("ada", "ben", "cai"))
    assert one.score == pytest.approx((ada.score + ben.score + cai.score) / 3)


@pytest.mark.parametrize(("by", "first"), [("score", "new"), ("run", "deep"), ("rounds", "new")])
def test_they_are_sorted_by_a_column(top, capsys, by, first):
    assert main(["runs", str(top), "--sort", by]) == 0
    said = capsys.readouterr().out
    assert said.index(first) == min(said.index("new"), said.index("deep"))


def test_a_column_that_is_not_there_is_named(top, capsys):
    assert main(["runs", str(top), "--sort", "scores"]) == 1
    assert "score" in capsys.readouterr().err


def test_the_command_shows_them(top, capsys):
    assert main(["runs", str(top), "--filter", "method=adf"]) == 0
    said = capsys.readouterr().out
    assert "tags" not in said
    assert "deep/old" in said
    assert "6/6" in said
    assert "new" not in said
    assert main(["runs", str(top / "adapters")]) == 1
