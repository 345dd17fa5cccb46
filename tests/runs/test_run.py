"""A run as an object: what comes out, what it leaves, and how it goes on, to the last bit."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from conftest import tiny_job, tiny_model
from plait.config import Config, Machine
from plait.engines.simulate import simulate
from plait.events import Evaluated, Event, RoundDone, Started
from plait.model.loading import Loaded
from plait.runs.listing import listed
from plait.runs.run import Run
from plait.runs.run_folder import load_events, load_run
from plait.runs.trained import find
from twin import all_logits, twin_logits

CONFIG = Config(
    topology="ring", clients=3, rounds=4, local_steps=2, batch_size=3, rank=2, switch_every=2,
    lr=1e-2, eval_every=1,
)  # fmt: skip
OFTEN = Machine(save_every=1)
NAMES = ("client-0", "client-1", "client-2", "mean")


@pytest.fixture(autouse=True)
def tiny_runs(monkeypatch):
    monkeypatch.setattr("plait.runs.run.prepare", tiny_job)
    monkeypatch.setattr(
        "plait.runs.run.load_for",
        lambda _config, _objective, names: Loaded(tiny_model("bert", len(names)), None, ()),
    )


def timeless(summary):
    return {key: value for key, value in summary.items() if not key.endswith("seconds")}


def said(event: Event):
    return type(event), timeless(vars(event))


def stopped(config, out, after, machine=OFTEN):
    """A run in a folder that nobody listens to after so many events."""
    assert len(list(itertools.islice(Run(config, out, machine=machine), after))) == after


def assert_same_result(one, other):
    assert timeless(load_run(one)[2]) == timeless(load_run(other)[2])
    assert same_adapters(one / "adapters", other / "adapters")


def same_adapters(one, other) -> bool:
    paths = [f"{name}/adapter_model.safetensors" for name in NAMES]
    pairs = [(load_file(one / path), load_file(other / path)) for path in paths]
    assert all(expected.keys() == found.keys() for expected, found in pairs)
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


# -- what it leaves


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("head", ["frozen", "mixed"])
def test_a_model_of_it_has_the_logits_of_its_client(tmp_path, head, folder):
    config = dataclasses.replace(CONFIG, head=head)
    run = Run(config, tmp_path / "run" if folder else None)
    assert list(run) == run.events
    job = tiny_job(config)
    stack = job.initial_stack()
    list(simulate(job, stack))
    mean = {factor: value.double().mean(0, keepdim=True) for factor, value in stack.factors.items()}
    own = {factor: value[1:2] for factor, value in stack.factors.items()}
    assert not all(torch.equal(own[factor], mean[factor].float()) for factor in own)
    run.save(tmp_path / "saved")
    rows = np.arange(len(job.held_out))
    for client, factors in ((1, own), ("mean", {f: value.float() for f, value in mean.items()})):
        expected = all_logits(job.backbone, factors, job.held_out)[0]
        name = client if client == "mean" else f"client-{client}"
        path = tmp_path / "saved" / "adapters" / name
        with torch.no_grad():
            found = twin_logits(run.model(client), job.held_out, rows)
            loaded = PeftModel.from_pretrained(tiny_model("bert"), path).eval()
            assert torch.equal(twin_logits(loaded, job.held_out, rows), found)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_saved_is_the_run_as_if_in_a_folder_from_the_start(tmp_path, folder):
    run = Run(CONFIG, tmp_path / "first" if folder else None, tags=("mine",))
    events = list(run)
    run.save(tmp_path / "saved")
    assert all(one.tags == ("mine",) for one in listed(tmp_path)[0])
    assert load_run(tmp_path / "saved") == (CONFIG, events, run.summary)
    longer = dataclasses.replace(CONFIG, rounds=6)
    list(Run(longer, tmp_path / "saved", resume=True))
    list(Run(longer, tmp_path / "whole"))
    assert_same_result(tmp_path / "saved", tmp_path / "whole")
    with pytest.raises(ValueError, match="already holds a run"):
        run.save(tmp_path / "saved")


@pytest.mark.parametrize("folder", [False, True])
def test_before_its_end_there_is_no_result(tmp_path, folder):
    run = Run(CONFIG, tmp_path / "run" if folder else None)
    for _ in range(10):
        for ask in (lambda: run.summary, run.model, lambda: run.save(tmp_path / "saved")):
            with pytest.raises(ValueError, match="isn't finished: loop over it first"):
                ask()
        next(run)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(StopIteration):
        next(run)
    assert run.summary["rounds"] == 4


def test_a_client_that_is_none_has_no_model():
    run = Run(CONFIG)
    list(run)
    with pytest.raises(ValueError, match="There is no client 3; take 0 to 2"):
        run.model(3)


# -- going on


@pytest.mark.parametrize("folder", [False, True])
def test_a_loop_that_was_left_is_gone_on_with_by_the_same_object(tmp_path, folder):
    whole = list(map(said, Run(CONFIG)))
    run = Run(CONFIG, tmp_path / "run" if folder else None)
    for event in run:
        if isinstance(event, RoundDone) and event.round == 1:
            break
    assert list(map(said, run.events)) == whole[: len(run.events)]
    rest = list(run)
    assert list(map(said, run.events)) == whole
    assert run.events[-len(rest) :] == rest
    assert run.summary["rounds"] == 4


@pytest.mark.parametrize("optimizer_state", ["reset_each_round", "reset_each_phase", "keep"])
@pytest.mark.parametrize("stop_after", [1, 4, 5, 7, 9])
def test_a_run_that_was_stopped_ends_as_an_unbroken_one(tmp_path, stop_after, optimizer_state):
    config = dataclasses.replace(
        CONFIG, optimizer_state=optimizer_state, lora_dropout=0.1, lr_schedule="cosine"
    )
    unbroken = list(Run(config, tmp_path / "unbroken"))
    stopped(config, tmp_path / "stopped", stop_after)

    resumed = list(Run(config, tmp_path / "stopped", resume=True, machine=OFTEN))

    assert list(map(said, resumed)) == list(map(said, unbroken))
    assert_same_result(tmp_path / "unbroken", tmp_path / "stopped")


def test_a_loop_that_was_left_leaves_a_run_that_is_taken_up(tmp_path):
    unbroken = list(Run(CONFIG, tmp_path / "unbroken"))
    for event in Run(CONFIG, tmp_path / "left"):
        if isinstance(event, RoundDone) and event.round == 2:
            break  # before the first checkpoint
    resumed = list(Run(CONFIG, tmp_path / "left", resume=True))
    assert list(map(said, resumed)) == list(map(said, unbroken))
    assert_same_result(tmp_path / "left", tmp_path / "unbroken")


STOPPING = dataclasses.replace(
    CONFIG, rounds=8, eval_split="validation", stop_after=2, lr=3e-2, seed=2
)


def test_a_run_stops_without_gain_and_keeps_the_best_round(tmp_path):
    long = dataclasses.replace(STOPPING, stop_after=None)
    means = [np.mean(e.scores) for e in Run(long) if isinstance(e, Evaluated) and e.round >= 0]
    best = 2
    assert means[1] <= means[0] < means[2] > max(means[3:5])
    run = Run(STOPPING, tmp_path / "run")
    list(run)
    figures = {
        "rounds_done": best + 3,
        "best_round": best,
        "best_accuracy_client_mean": means[best],
    }
    assert {name: run.summary[name] for name in figures} == figures
    assert run.summary["accuracy_client_mean"] == means[best + 2]
    assert run.folder.rounds_done == best + 3
    shorter = dataclasses.replace(long, rounds=best + 1)
    list(Run(shorter, tmp_path / "shorter"))
    assert same_adapters(tmp_path / "run" / "best", tmp_path / "shorter" / "adapters")
    assert not same_adapters(tmp_path / "run" / "best", tmp_path / "run" / "adapters")
    assert find(tmp_path / "run" / "best", 1).folder == tmp_path / "run" / "best" / "client-1"
    # It is finished: taken up again it says the same, and more rounds would change nothing.
    assert list(Run(STOPPING, tmp_path / "run", resume=True)) == run.events
    with pytest.raises(ValueError, match="stopped early"):
        Run(dataclasses.replace(STOPPING, rounds=9), tmp_path / "run", resume=True)
    run.save(tmp_path / "saved")
    assert same_adapters(tmp_path / "saved" / "best", tmp_path / "run" / "best")


@pytest.mark.parametrize("after", [5, 8, -1])
def test_a_run_that_was_left_stops_where_it_would_have(tmp_path, after):
    whole = list(Run(STOPPING, tmp_path / "whole"))
    stopped(STOPPING, tmp_path / "left", after % (len(whole) + 1))
    resumed = list(Run(STOPPING, tmp_path / "left", resume=True, machine=OFTEN))
    assert list(map(said, resumed)) == list(map(said, whole))
    assert_same_result(tmp_path / "left", tmp_path / "whole")
    assert same_adapters(tmp_path / "left" / "best", tmp_path / "whole" / "best")


@pytest.mark.parametrize(
    "changes", [{"eval_split": "test"}, {"eval_every": None}, {"eval_rows": 5}, {"stop_after": 0}]
)
def test_stopping_needs_all_validation_rows(changes):
    with pytest.raises(ValueError, match=r"stop_after (counts|is 0)"):
        dataclasses.replace(STOPPING, **changes)


def test_a_line_that_was_cut_short_is_written_again(tmp_path):
    stopped(CONFIG, tmp_path / "run", 5)
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"event": "RoundD')
    assert len(list(Run(CONFIG, tmp_path / "run", resume=True))) == 10


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    events = list(Run(CONFIG, tmp_path / "run"))
    summary = (tmp_path / "run" / "summary.json").read_bytes()
    monkeypatch.setattr("plait.runs.run.prepare", None)
    again = Run(CONFIG, tmp_path / "run", resume=True)
    assert list(again) == again.events == events
    assert (tmp_path / "run" / "summary.json").read_bytes() == summary
    assert again.summary == json.loads(summary)
    again.model(0)


@pytest.mark.parametrize("eval_every", [1, 3, None])
@pytest.mark.parametrize("stop_after", [None, 6])
def test_more_rounds_end_as_if_there_had_been_as_many_from_the_start(
    tmp_path, stop_after, eval_every
):
    short = dataclasses.replace(
        CONFIG, eval_every=eval_every, optimizer_state="keep", lora_dropout=0.1
    )
    long = dataclasses.replace(short, rounds=6)
    events = list(Run(long, tmp_path / "whole"))
    if stop_after:
        stopped(short, tmp_path / "run", stop_after)
    else:
        list(Run(short, tmp_path / "run"))
        before = load_run(tmp_path / "run")[2]

    more = Run(long, tmp_path / "run", resume=True)
    list(more)

    assert_same_result(tmp_path / "whole", tmp_path / "run")
    rounds = [
        [said(e) for e in found if isinstance(e, RoundDone)] for found in (events, more.events)
    ]
    assert rounds[0] == rounds[1]
    if eval_every:
        assert list(map(said, more.events))[1:] == list(map(said, events))[1:]
    assert load_run(tmp_path / "run")[:2] == (long, more.events)
    aside = tmp_path / "run" / "summary-4.json"
    assert aside.exists() == (stop_after is None)
    if stop_after is None:
        assert json.loads(aside.read_text()) == before


def test_more_rounds_that_were_stopped_go_on_too(tmp_path):
    long = dataclasses.replace(CONFIG, rounds=6)
    list(Run(long, tmp_path / "whole"))
    list(Run(CONFIG, tmp_path / "run"))
    begun = Run(long, tmp_path / "run", resume=True, machine=OFTEN)
    for event in begun:
        if isinstance(event, RoundDone) and event.round == 4:
            break
    with pytest.raises(ValueError, match="holds no finished run"):
        load_run(tmp_path / "run")
    list(Run(long, tmp_path / "run", resume=True))
    assert_same_result(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run" / "summary-4.json").exists()


@pytest.mark.parametrize(
    "machine", [Machine(chunk_tokens=20, save_every=3), Machine(memory_gib=0.5, cache_gib=0.0)]
)
def test_another_machine_may_go_on(tmp_path, machine):
    config = dataclasses.replace(CONFIG, lora_dropout=0.1)
    list(Run(config, tmp_path / "whole"))
    stopped(config, tmp_path / "run", 5)
    list(Run(config, tmp_path / "run", resume=True, machine=machine))
    assert_same_result(tmp_path / "whole", tmp_path / "run")


def test_fewer_rounds_are_refused(tmp_path):
    list(Run(CONFIG, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"other settings \(rounds\)"):
        Run(dataclasses.replace(CONFIG, rounds=3), tmp_path / "run", resume=True)


def test_more_rounds_and_another_setting_are_refused(tmp_path):
    list(Run(CONFIG, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"other settings \(lr, rounds\)|\(rounds, lr\)"):
        Run(dataclasses.replace(CONFIG, rounds=6, lr=1.0), tmp_path / "run", resume=True)


def test_a_learning_rate_that_went_by_the_rounds_takes_no_more_of_them(tmp_path):
    falling = dataclasses.replace(CONFIG, lr_schedule="cosine")
    list(Run(falling, tmp_path / "run"))
    with pytest.raises(ValueError, match="went to its end over 4 rounds"):
        Run(dataclasses.replace(falling, rounds=6), tmp_path / "run", resume=True)


def test_an_old_folder_without_its_last_state_takes_no_more_rounds(tmp_path):
    list(Run(CONFIG, tmp_path / "run"))
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match="without its last state") as refused:
        Run(dataclasses.replace(CONFIG, rounds=6), tmp_path / "run", resume=True)
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == files
    assert len(list(Run(CONFIG, tmp_path / "run", resume=True))) == 10


def test_a_folder_of_before_machines_were_apart_goes_on(tmp_path):
    list(Run(CONFIG, tmp_path / "whole"))
    stopped(CONFIG, tmp_path / "run", 5)
    file = tmp_path / "run" / "config.json"
    old = json.loads(file.read_text()) | {"device": "cpu", "cache_gib": 2.0, "save_every": 10}
    file.write_text(json.dumps(old | {"chunk_tokens": None, "memory_gib": None}))
    list(Run(CONFIG, tmp_path / "run", resume=True))
    assert_same_result(tmp_path / "whole", tmp_path / "run")


# -- the first event


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_every": 2, "eval_rows": 5}, (2, 5)),
        ({"eval_every": 2}, (2, 20)),
        ({"eval_every": None}, (0, 20)),
        ({"eval_every": None, "local_steps": 30, "batch_size": 4}, (1, 20)),
    ],
)
def test_the_first_event_says_when_it_is_evaluated_and_on_how_many_rows(settings, expected):
    events = list(Run(dataclasses.replace(CONFIG, **settings)))
    started = events[0]
    assert isinstance(started, Started)
    assert (started.eval_every, started.eval_rows) == expected
    every, rows = expected
    found = {event.round: event.rows for event in events if isinstance(event, Evaluated)}
    between = {round_: rows for round_ in range(3) if every and (round_ + 1) % every == 0}
    assert found == {-1: found[-1], **between, 3: 20}


def test_nothing_is_written_before_the_first_event(tmp_path):
    run = Run(CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    first = next(run)
    assert load_events(tmp_path / "run") == [first]
