"""`plait sweep`: what it runs, that nothing runs twice, and that what fails is said."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

from conftest import save_encoder
from fake_runs import FakeRuns, events
from plait.cli.main import main
from plait.config import Config, Machine
from plait.experiments import executors as workers
from plait.experiments.executors import CellEnded, executor_for, here, in_processes, num_jobs
from plait.experiments.paper_table import blocks
from plait.experiments.plan import Cell, tuning_seeds
from plait.experiments.results import RESULTS, collect, failures, load, save, state
from plait.experiments.sweep import Sweep, effective, load_sweep
from plait.runs.run import Run
from plait.runs.run_folder import load_events

GRID = """
methods = ["adf", "ffa"]
seeds = [0, 1]
lr_grid = [1e-3, 2e-3]
[settings]
clients = 4
rounds = 6
[axes]
p = [0.5, 0.1]
switch_every = [3, 1]
[search_at]
p = 0.5
"""


def written(tmp_path: Path, text: str = GRID) -> Path:
    file = tmp_path / "grid.toml"
    file.write_text(text)
    return file


def grid(tmp_path: Path, text: str = GRID) -> Sweep:
    return load_sweep(written(tmp_path, text), tmp_path / "out")


def fake(monkeypatch, score=lambda config: 0.8 - abs(config.lr - 2e-3)) -> FakeRuns:
    runs = FakeRuns(score)
    monkeypatch.setattr(workers, "Run", runs)
    return runs


def swept(tmp_path: Path, *more: str) -> int:
    return main(["sweep", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"),
                 "--jobs", "1", *more])  # fmt: skip


# -- what there is to run


def test_a_setting_that_makes_no_difference_makes_no_run():
    base = Config(switch_every=5, p=0.1, topology="pairs", rounds=12)

    def same(*changes: dict[str, object]) -> bool:
        found = {
            effective(dataclasses.replace(base, **change), base).digest() for change in changes
        }
        return len(found) == 1

    T = [{"switch_every": 1}, {"switch_every": 10}]
    assert same(*({"method": "ffa", **one} for one in T))
    assert same(*({"method": "rolora", **one} for one in T))
    assert not same(*({"method": "adf", **one} for one in T))
    p = [{"p": 0.5}, {"p": 0.02}]
    assert not same(*({"method": "ffa", **one} for one in p))
    assert same(*({"method": "ffa", "topology": "ring", **one} for one in p))
    assert same(*({"method": "local", "topology": t} for t in ("ring", "pairs")))
    assert same(
        *({"method": "fedavg", "topology": t, "p": q} for t, q in [("ring", 1), ("star", 0)])
    )
    c = [{"switch_scale": 1.0}, {"switch_scale": 4.0}]
    assert same(*({"method": "adf", **one} for one in c))
    assert not same(*({"method": "tad", "topology": "ring", **one} for one in c))
    assert same(*({"method": "tad", "topology": "ring", **one} for one in T))
    degrees = [{"degree": 2}, {"degree": 4}]
    assert same(*({"topology": "ring", **one} for one in degrees))
    assert not same(*({"topology": "base", **one} for one in degrees))
    assert same(*({"method": "fedavg", "weights": w} for w in ("laplacian", "sequential")))
    assert not same({"method": "ffa", "lr": 1e-3}, {"method": "ffa", "lr": 2e-3})


def test_a_grid_runs_each_config_once(monkeypatch, tmp_path):
    runs = fake(monkeypatch)
    written(tmp_path)
    assert swept(tmp_path) == 0
    assert len({config.digest() for config in runs.started}) == len(runs.started)
    reported = [config for config in runs.started if config.eval_split == "test"]
    # Two p, two seeds: ADF at two T, FFA once, the control once since both T got the same rate.
    assert len(reported) == 2 * 2 * (2 + 1 + 1)
    assert {(c.method, c.switch_every) for c in reported} == {
        ("adf", 3), ("adf", 1), ("ffa", 5), ("dec-lora", 5)
    }  # fmt: skip


def test_rates_are_searched_on_rows_and_seeds_that_are_not_reported(monkeypatch, tmp_path):
    def score(config: Config) -> float:
        best = {("adf", 3): 2e-3, ("adf", 1): 1e-3, ("ffa", 5): 1e-3}
        return 0.8 - abs(config.lr - best.get((config.method, config.switch_every), 0))

    runs = fake(monkeypatch, score)
    written(tmp_path)
    assert swept(tmp_path) == 0
    tuned = [config for config in runs.started if config.eval_split == "validation"]
    assert {config.seed for config in tuned} == set(tuning_seeds((0, 1)))
    assert {config.p for config in tuned} == {0.5}  # search_at
    # 1e-3 and 2e-3, each with two seeds, and one rate beyond whichever of them was the best.
    assert Counter((c.method, c.switch_every, c.lr) for c in tuned) == dict.fromkeys([
        ("adf", 1, 5e-4), ("adf", 1, 1e-3), ("adf", 1, 2e-3),
        ("adf", 3, 1e-3), ("adf", 3, 2e-3), ("adf", 3, 4e-3),
        ("ffa", 5, 5e-4), ("ffa", 5, 1e-3), ("ffa", 5, 2e-3),
    ], 2)  # fmt: skip
    reported = {(c.method, c.switch_every, c.lr) for c in runs.started if c.eval_split == "test"}
    assert reported == {
        ("adf", 3, 2e-3), ("adf", 1, 1e-3), ("ffa", 5, 1e-3),
        ("dec-lora", 5, 1e-3), ("dec-lora", 5, 5e-4),  # the controls at half of ADF's rate
    }  # fmt: skip


def test_seeds_are_added_until_intervals_are_short_and_the_table_has_them(monkeypatch, tmp_path):
    gaps = {0: 0.0, 1: 0.04, 2: 0.02, 3: 0.02, 4: 0.02}
    fake(monkeypatch, lambda c: 0.8 - (gaps[c.seed] if c.method == "dec-lora" else 0.0))
    text = (
        'methods = ["adf", "dec-lora"]\nseeds = [0, 1, 2]\nuntil = 0.03\nat_most = 5\n'
        "matched_control = false\n[lrs]\nadf = 1e-3\ndec-lora = 1e-3\n"
    )
    sweep = grid(tmp_path, text)
    assert swept(tmp_path) == 0
    frame = load(sweep.out)
    assert set(frame["seed"]) == {0, 1, 2, 3, 4}  # 3 (4.303 * .02 / sqrt(3) / .03)^2 = 8.2 > 5
    (one,) = blocks(frame)[0].columns[0].differences.values()
    assert one.estimate.high - one.estimate.mean == pytest.approx(4.302653 * 0.02 / 5**0.5)


def test_a_control_that_is_dec_lora_itself_is_a_line_without_a_run(monkeypatch, tmp_path):
    text = 'methods = ["adf", "dec-lora"]\nseeds = [0]\n[lrs]\nadf = 2e-3\ndec-lora = 1e-3\n'
    runs = fake(monkeypatch)
    sweep = grid(tmp_path, text)
    assert swept(tmp_path) == 0
    assert len(runs.started) == 2
    frame = load(sweep.out)
    assert list(frame["label"]) == ["adf", "dec-lora", "dec-lora (matched)"]
    assert frame["digest"].nunique() == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metods = ['adf']", "Unknown keys: metods"),
        ("methods = ['afd']", "Unknown method 'afd'. Did you mean tad or adf"),
        ("[axes]\np = 0.5", "p is 0.5; give a list"),
        ("[axes]\np = [0.5, 0.5]", "each value once"),
        ("[axes]\np = [2.0]", "a probability"),
        ("[axes]\np = ['x']", "it must be float"),
        ("[axes]\nseed = [1]", "see methods, seeds"),
        ("[settings]\nlr = 1.0", "see methods, seeds"),
        ("[settings]\nclients = 7\ntopology = 'torus'", "7 clients fill no grid"),
        ("[axes]\np = [0.5]\n[search_at]\np = 0.1", "not on that axis"),
        ("seeds = [0, 0]", "give each once"),
        ("preset = 'papr'", "Did you mean paper"),
        ("p = [", "not TOML"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_before_anything(tmp_path, capsys, text, message):
    file = written(tmp_path, text)
    assert swept(tmp_path) == 1
    said = capsys.readouterr().err
    assert message in said
    assert str(file) in said
    assert not (tmp_path / "out").exists()


# -- going on


def test_a_finished_run_is_never_run_again(monkeypatch, tmp_path):
    runs = fake(monkeypatch)
    written(tmp_path)
    assert swept(tmp_path) == 0
    first = len(runs.started)
    assert swept(tmp_path) == 0
    assert len(runs.started) == first
    written(tmp_path, GRID.replace("seeds = [0, 1]", "seeds = [0, 1, 2]"))
    assert swept(tmp_path) == 0
    assert {config.seed for config in runs.started[first:]} == {2}


def failing(monkeypatch, when, error: Exception, began: bool) -> FakeRuns:
    runs = FakeRuns(lambda _: 0.8)

    def broken(config: Config, out: Path, resume: bool = False, **machine):
        if when(config):
            runs.started.append(config)
            if began:
                yield next(events(config, 0.8))
            raise error
        yield from runs(config, out, resume, **machine)

    monkeypatch.setattr(workers, "Run", broken)
    return runs


def test_a_failed_run_is_listed_and_tried_again(monkeypatch, tmp_path, capsys):
    written(tmp_path)
    is_bad = lambda c: c.method == "ffa" and c.seed == 1  # noqa: E731
    failing(monkeypatch, is_bad, RuntimeError("the disk is gone"), began=True)
    assert swept(tmp_path) == 1
    said = capsys.readouterr()
    listed = [line for line in said.err.splitlines() if line.startswith("failed: ")]
    assert len([line for line in listed if "the disk is gone" in line]) == 2  # one for each p
    assert "/ffa-seed1-" in said.err
    frame = load(tmp_path / "out")
    lost = frame[frame["state"] == "failed"]
    assert set(lost["method"]) == {"ffa"}
    assert set(lost["reason"]) == {"RuntimeError: the disk is gone"}
    assert (frame["state"] == "finished").sum() == len(frame) - len(lost)

    runs = fake(monkeypatch)
    assert swept(tmp_path) == 0
    assert {(c.method, c.seed) for c in runs.started} == {("ffa", 1)}
    assert len(runs.started) == 2


def test_a_run_that_diverged_is_listed_and_not_tried_again(monkeypatch, tmp_path, capsys):
    written(tmp_path)
    is_bad = lambda c: c.method == "ffa" and c.seed == 1  # noqa: E731
    runs = failing(monkeypatch, is_bad, ValueError("The loss is not finite."), began=True)
    for _ in range(2):
        assert swept(tmp_path) == 1
        assert capsys.readouterr().err.count("The loss is not finite.") == 2
    assert sum(map(is_bad, runs.started)) == 2
    assert "diverged" in set(load(tmp_path / "out")["state"])


def test_a_rate_that_diverges_is_an_answer(monkeypatch, tmp_path):
    written(tmp_path)
    failing(monkeypatch, lambda c: c.lr == 2e-3, ValueError("not finite"), began=True)
    assert swept(tmp_path) == 0
    frame = load(tmp_path / "out")
    assert set(frame[frame["kind"] == "reported"]["lr"]) == {1e-3, 5e-4}


def test_a_method_without_any_rate_is_listed_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    written(tmp_path)
    failing(monkeypatch, lambda c: c.method == "adf", ValueError("not finite"), began=True)
    assert swept(tmp_path) == 1
    assert "adf: its search found no learning rate" in capsys.readouterr().err
    reported = load(tmp_path / "out").query("kind == 'reported'")
    assert set(reported["label"]) == {"ffa"}  # without ADF's rate there is no control either


def test_a_method_waits_for_the_whole_of_its_search(monkeypatch, tmp_path, capsys):
    written(tmp_path)
    is_bad = lambda c: c.method == "adf" and c.lr == 2e-3  # noqa: E731
    runs = failing(monkeypatch, is_bad, RuntimeError("the disk is gone"), began=True)
    assert swept(tmp_path) == 1
    assert "adf: its search found no learning rate" in capsys.readouterr().err
    assert {c.method for c in runs.started if c.seed in (0, 1)} == {"ffa"}
    runs = fake(monkeypatch, lambda c: 0.9 if c.lr == 2e-3 else 0.8)
    assert swept(tmp_path) == 0
    assert {c.lr for c in runs.started if c.seed in (0, 1) and c.method == "adf"} == {2e-3}


def test_a_damaged_file_is_named(monkeypatch, tmp_path, capsys):
    fake(monkeypatch)
    written(tmp_path)
    assert swept(tmp_path) == 0
    run = next((tmp_path / "out" / "tuning").iterdir())
    (run / "summary.json").write_text('{"accuracy_client_mean": 0.')
    assert swept(tmp_path) == 1
    assert f"{run / 'summary.json'} is damaged" in capsys.readouterr().err


def test_a_table_that_cant_be_written_leaves_the_one_before(monkeypatch, tmp_path):
    frame = pd.DataFrame({"a": [1, 2]})
    save(frame, tmp_path)

    def full(_, path, **how):
        Path(path).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="No space"):
        save(frame * 2, tmp_path)
    assert load(tmp_path).equals(frame)
    assert [one.name for one in tmp_path.iterdir()] == [RESULTS]


def test_a_folder_that_holds_something_else_is_refused(tmp_path, capsys):
    written(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    assert swept(tmp_path) == 1
    assert "holds no sweep" in capsys.readouterr().err


# -- what is written


def test_the_results_have_a_row_for_each_line_setting_and_seed(monkeypatch, tmp_path, capsys):
    fake(monkeypatch, lambda config: 0.5 + 0.01 * config.seed * config.p)
    written(tmp_path)
    assert swept(tmp_path) == 0
    frame = load(tmp_path / "out")
    reported = frame[frame["kind"] == "reported"]
    assert len(reported) == 4 * 2 * 3  # settings, seeds, lines
    assert set(reported["switch_every"]) == {3, 1}
    ffa = reported[(reported["label"] == "ffa") & (reported["p"] == 0.5)]
    assert ffa["digest"].nunique() == 2  # a run for each seed serves both T
    row = reported.iloc[0]
    folder = tmp_path / "out" / row["folder"]
    config = Config.from_json(json.loads((folder / "config.json").read_text()))
    assert row["digest"] == config.digest()
    summary = json.loads((folder / "summary.json").read_text())
    assert row["accuracy_client_mean"] == summary["accuracy_client_mean"]
    assert row["version"].startswith("0.")
    assert (frame["kind"] == "tuning").sum() == 3 * 3 * 2  # searches, rates, seeds
    pd.testing.assert_frame_equal(
        frame, collect(load_sweep(tmp_path / "grid.toml", tmp_path / "out")), check_dtype=False
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert [line.split("/")[0] for line in lines] == [str(n + 1) for n in range(34)]
    assert lines[-1].endswith("left 0:00:00")


def test_a_table_without_results_says_how_to_make_some(tmp_path, capsys):
    assert main(["table", str(tmp_path)]) == 1
    assert "plait sweep FILE --out" in capsys.readouterr().err


# -- in processes

REAL = """
methods = ["ffa", "local"]
seeds = [0, 1]
matched_control = false
[settings]
task = "movies"
backbone = "BACKBONE"
clients = 2
rounds = 20
local_steps = 1
batch_size = 2
max_length = 8
label_skew = "iid"
eval_every = 20
save_every = 1
device = "cpu"
"""


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    return save_encoder("mean-pooled", tmp_path_factory.mktemp("models") / "tiny")


def until(true) -> None:
    """Wait for something that comes soon, except where the machine is very busy."""
    end = time.monotonic() + 600
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def test_a_killed_sweep_goes_on_at_the_run_that_it_was_in(tmp_path, tiny_folder):
    file = written(tmp_path, REAL.replace("BACKBONE", str(tiny_folder)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "plait", "sweep", str(file), "--out", str(out), "--jobs", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as going:
        try:
            until(lambda: list(out.glob("runs/*/summary.json")) or going.poll() is not None)
            children = Path(f"/proc/{going.pid}/task/{going.pid}/children").read_text().split()
        finally:
            going.kill()
    # Its processes end with it: they would write into the folders of the next one.
    until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children))
    finished = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/summary.json")}
    assert 0 < len(finished) < 4

    assert main([*command[3:-1], "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    frame = load(out)
    assert list(frame["state"]) == ["finished"] * 4
    for cell in load_sweep(file, out).reported:
        alone = tmp_path / "alone" / cell.folder.name
        list(Run(cell.config, alone))
        mine, theirs = (
            json.loads((folder / "summary.json").read_text()) for folder in (cell.folder, alone)
        )
        timeless = lambda s: {k: v for k, v in s.items() if "seconds" not in k}  # noqa: E731
        assert timeless(mine) == timeless(theirs)


@pytest.mark.slow
def test_a_process_that_is_killed_costs_its_own_run_only(tmp_path, tiny_folder):
    text = REAL.replace("BACKBONE", str(tiny_folder)).replace("rounds = 20", "rounds = 2000")
    sweep = grid(tmp_path, text)
    long = sweep.reported[0]
    short = Cell("short", dataclasses.replace(long.config, rounds=1), tmp_path / "out" / "short")
    with in_processes(1) as executor:
        said = executor([long, short])

        def kill() -> None:
            until((long.folder / "events.jsonl").exists)
            (process,) = multiprocessing.active_children()
            process.kill()

        threading.Thread(target=kill).start()
        ended = [(cell, one.failure) for cell, one in said if isinstance(one, CellEnded)]
    (first, failure), (second, none) = ended
    assert (first, second) == (long, short)
    assert failure is not None
    assert "killed" in failure.reason
    assert none is None
    assert state(short)[0] == "finished"


def test_what_cannot_run_is_a_failure_with_its_reason(tmp_path):
    config = Config(task="movies", clients=2, backbone="./nowhere")
    ((_, ended),) = here([Cell("x", config, tmp_path / "x")])
    assert "There is no model folder" in ended.failure.reason
    assert not ended.failure.diverged


def test_what_is_wrong_with_the_code_is_shown_with_its_traceback(monkeypatch, tmp_path, capsys):
    def broken(*_args, **_kwargs):
        raise KeyError("lora")

    monkeypatch.setattr(workers, "Run", broken)
    ((_, ended),) = here([Cell("x", Config(), tmp_path / "x")])
    assert ended.failure.reason == "KeyError: 'lora'"
    assert "in broken" in capsys.readouterr().err


def test_jobs_are_chosen_by_the_device_and_by_what_there_is_to_do(monkeypatch):
    monkeypatch.setattr(workers, "num_cores", lambda: 8)
    assert num_jobs("cpu", 0) == 8
    assert num_jobs("cpu", 0, 3) == 3
    assert num_jobs("cpu", 5, 3) == 5
    monkeypatch.setattr(workers, "resolve_device", torch.device)
    assert (num_jobs("cuda", 0), num_jobs("cuda", 0, 3), num_jobs("cuda", 5, 40)) == (16, 3, 5)
    with executor_for(2, machine=Machine(device="cuda")) as executor:
        assert executor.func is workers.in_one_stack
    with pytest.raises(ValueError, match="jobs is -1"):
        num_jobs("cpu", -1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_executor_says_all_that_its_runs_say_and_that_they_have_ended(
    tmp_path, jobs, tiny_folder
):
    config = Config(task="movies", clients=2, rounds=1, local_steps=1, eval_rows=8)
    good, bad = (
        Cell(name, dataclasses.replace(config, backbone=str(backbone)), tmp_path / name)
        for name, backbone in (("good", tiny_folder), ("bad", "./nowhere"))
    )
    with executor_for(jobs) as executor:
        said = list(executor([bad, good])) + list(executor([good]))
        assert len(multiprocessing.active_children()) == (jobs if jobs > 1 else 0)
    assert not multiprocessing.active_children()
    of_good = [one for cell, one in said if cell == good]
    expected = [*load_events(good.folder), CellEnded()] * 2
    assert of_good == expected
    ((_, failed),) = [pair for pair in said if pair[0] == bad]
    assert "There is no model folder" in failed.failure.reason


def test_failures_are_none_where_nothing_failed(monkeypatch, tmp_path):
    fake(monkeypatch)
    sweep = grid(tmp_path)
    assert swept(tmp_path) == 0
    assert failures(sweep) == []


@pytest.mark.parametrize(
    "axis",
    [
        "max_new_tokens = [16, 32]",
        "dp_delta = [1e-5, 1e-6]",
        'edges_file = ["a.txt", "b.txt"]',
        'objective = ["auto", "classification"]',
        'glue_dir = ["/a", "/b"]',
    ],
)
def test_an_axis_that_nothing_gives_a_meaning_is_refused(tmp_path, axis):
    with pytest.raises(ValueError, match=f"axes: {axis.split()[0]} makes no difference"):
        grid(tmp_path, GRID.replace("switch_every = [3, 1]", axis))


def test_each_value_of_a_gossip_step_is_a_run_of_its_own_where_something_travels(tmp_path):
    axis = "gossip_step = [1.0, 0.5]"
    sweep = grid(tmp_path, GRID.replace("switch_every = [3, 1]", axis))
    assert {plan.config.gossip_step for plan in sweep.plans} == {1.0, 0.5}
    assert effective(Config(gossip_step=0.5), Config()).gossip_step == 0.5
    assert effective(Config(gossip_step=0.5, method="local"), Config()).gossip_step == 1.0
    for given in ({"wire": "int8"}, {"wire": "top-k:0.1"}, {"frozen_every": 2}):
        assert effective(Config(**given), Config()) == Config(**given)
        alone = Config(**given, method="local")
        assert effective(alone, Config()) == Config(method="local")


def test_an_axis_that_changes_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="axes: p makes no difference"):
        grid(tmp_path, GRID.replace("clients = 4", 'clients = 4\ntopology = "ring"'))


def test_combinations_that_run_the_same_are_one(tmp_path):
    axes = 'topology = ["ring", "pairs"]\np = [0.5, 0.1]'
    text = GRID.replace("p = [0.5, 0.1]\nswitch_every = [3, 1]", axes)
    plans = grid(tmp_path, text).plans
    assert [(plan.config.topology, plan.config.p) for plan in plans] == [
        ("ring", 0.5), ("pairs", 0.5), ("pairs", 0.1),
    ]  # fmt: skip


def test_a_sweep_does_not_go_on_with_other_rows(monkeypatch, tmp_path, capsys):
    fake(monkeypatch)
    written(tmp_path)
    assert swept(tmp_path) == 0
    run = next((tmp_path / "out" / "tuning").iterdir())
    (run / "fingerprints.json").write_text('{"training rows": "others"}')
    assert swept(tmp_path) == 1
    assert "have changed: training rows" in capsys.readouterr().err
