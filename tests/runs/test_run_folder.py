"""The run folder: what it holds, what it refuses, what events say; and the exported adapters."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel

from conftest import tiny_job, tiny_model
from plait.config import Config
from plait.engines.simulate import simulate
from plait.events import Evaluated, RoundDone, from_line, to_line
from plait.factors import Factor
from plait.machine.files import LOCK
from plait.metrics import MOST_PAIRED, pair_distances
from plait.runs.run import Run
from plait.runs.run_folder import (
    load_config,
    load_events,
    load_fingerprints,
    load_run,
    load_summary,
)
from plait.runs.trained import export
from twin import all_logits, twin_logits

CONFIG = Config(
    topology="ring",
    clients=3,
    rounds=4,
    local_steps=2,
    batch_size=3,
    rank=2,
    switch_every=2,
    lr=1e-2,
    eval_every=1,
)


@pytest.fixture(autouse=True)
def tiny_jobs(monkeypatch):
    monkeypatch.setattr("plait.runs.run.prepare", tiny_job)


def test_the_folder_holds_the_run(tmp_path):
    events = list(Run(CONFIG, tmp_path / "run"))
    config, recorded, summary = load_run(tmp_path / "run")
    assert config == CONFIG
    assert recorded == events
    assert [type(event).__name__ for event in events[:2]] == ["Started", "Evaluated"]
    assert sum(isinstance(event, RoundDone) for event in events) == 4
    assert summary["rounds"] == 4
    last = next(e for e in reversed(events) if isinstance(e, Evaluated))
    assert summary["accuracy_client_mean"] == np.mean(last.scores)
    sent = sum(event.sent_bytes for event in events if isinstance(event, RoundDone))
    assert summary["sent_bytes"] == sent > 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "events.jsonl", "summary.json", "checkpoint.safetensors", "adapters",
        "fingerprints.json", "made-by.json", ".lock",
    }  # fmt: skip
    names = {path.name for path in (tmp_path / "run" / "adapters").iterdir()}
    assert names == {"client-0", "client-1", "client-2", "mean"}


def test_the_clients_distances_from_the_mean_average_to_the_consensus_distances():
    for event in Run(CONFIG):
        if isinstance(event, RoundDone):
            assert len(event.apart) == CONFIG.clients
            consensus = sum(layer.consensus_A + layer.consensus_B for layer in event.after)
            assert np.mean(event.apart) == pytest.approx(consensus, rel=1e-12)


def test_the_distances_of_pairs_are_those_of_their_factors_before_mixing():
    job = tiny_job(CONFIG)
    told = []
    for event in simulate(job, job.initial_stack()):
        if isinstance(event, RoundDone):
            assert [(i, j) for i, j, _ in event.pairs_apart] == [(0, 1), (0, 2), (1, 2)]
            consensus = sum(layer.consensus_A + layer.consensus_B for layer in event.before)
            # The sum over pairs is N times the sum of the squared distances from the mean.
            told.append(sum(far for *_, far in event.pairs_apart))
            assert told[-1] == pytest.approx(CONFIG.clients**2 * consensus, rel=1e-3)
    assert min(told) > 0


def test_the_distances_of_pairs_are_as_if_taken_one_by_one():
    layout = tiny_job(CONFIG).backbone.layout
    generator = torch.Generator().manual_seed(0)
    # All near one far point, where products would leave only rounding; the last two are the same.
    rows = {f: 100 + 1e-3 * torch.randn(MOST_PAIRED + 1, layout.size(f), generator=generator)
            for f in (Factor.A, Factor.B)}  # fmt: skip
    for row in rows.values():
        row[MOST_PAIRED - 1] = row[MOST_PAIRED - 2]
    found = pair_distances(layout, rows)
    whole = torch.cat([row.double() for row in rows.values()], dim=1)[:MOST_PAIRED]
    expected = torch.cdist(whole, whole, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_events_survive_a_line_of_json(tmp_path):
    for event in Run(CONFIG):
        assert from_line(to_line(event)) == event


def test_a_used_folder_is_refused(tmp_path):
    list(Run(CONFIG, tmp_path / "run"))
    with pytest.raises(ValueError, match="already holds a run"):
        Run(CONFIG, tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        Run(CONFIG, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        Run(Config.from_json(CONFIG.to_json() | {"lr": 0.5}), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="holds no finished run"):
        load_run(tmp_path)


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path):
    """As where a service and its user start the same run."""
    list(Run(CONFIG, tmp_path / "run"))
    more = dataclasses.replace(CONFIG, rounds=5)
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    lock = str(tmp_path / "run" / LOCK)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, lock], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="Another process is writing into"):
            list(Run(more, tmp_path / "run", resume=True))
        assert (tmp_path / "run" / "events.jsonl").read_bytes() == before
        other.kill()
    list(Run(more, tmp_path / "run", resume=True))


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(ValueError, match=r"client 0.* not finite in round 0.*learning rate"):
        list(Run(Config.from_json(CONFIG.to_json() | {"lr": 1e30, "clip_norm": None})))


@pytest.mark.parametrize("head", ["frozen", "mixed"])
@pytest.mark.parametrize("who", [1, None])
def test_an_exported_adapter_gives_peft_the_same_logits(tmp_path, who, head):
    config = Config.from_json(CONFIG.to_json() | {"head": head})
    list(Run(config, tmp_path / "run"))
    export(tmp_path / "run", who, tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "adapter").eval()

    job = tiny_job(config)
    stack = job.initial_stack()
    for event in simulate(job, stack):
        del event
    rows = {
        factor: value[1:2] if who == 1 else value.double().mean(0, keepdim=True).float()
        for factor, value in stack.factors.items()
    }
    with torch.no_grad():
        expected = twin_logits(loaded, job.held_out, np.arange(len(job.held_out)))
    logits = all_logits(job.backbone, rows, job.held_out)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert logits.std() > 0


def test_export_says_what_there_is(tmp_path):
    list(Run(CONFIG, tmp_path / "run"))
    with pytest.raises(ValueError, match="no adapter client-7; it has: client-0"):
        export(tmp_path / "run", 7, tmp_path / "adapter")
    with pytest.raises(ValueError, match="already exists"):
        export(tmp_path / "run", 0, tmp_path)


@pytest.mark.parametrize(
    ("read", "file"),
    [
        (load_config, "config.json"), (load_summary, "summary.json"),
        (load_fingerprints, "fingerprints.json"), (load_events, "events.jsonl"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, read, file):
    list(Run(CONFIG, tmp_path / "run"))
    place = tmp_path / "run" / file
    for text in ("{", "[]", "0", "\x00"):
        place.write_text(f"{text}\n")
        with pytest.raises(ValueError, match=f"{place}.* is damaged"):
            read(tmp_path / "run")


def test_a_finished_run_whose_events_end_early_is_refused(tmp_path):
    list(Run(CONFIG, tmp_path / "run"))
    events = tmp_path / "run" / "events.jsonl"
    events.write_bytes(events.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{events} is damaged"):
        load_run(tmp_path / "run")
    with pytest.raises(ValueError, match=f"{events} is damaged"):
        list(Run(CONFIG, tmp_path / "run", resume=True))
    events.write_text("")
    with pytest.raises(ValueError, match=f"{events} is damaged"):
        export(tmp_path / "run", 0, tmp_path / "adapter")
