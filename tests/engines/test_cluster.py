"""A run on a Ray cluster is the simulation's, in blocks: the same numbers, whatever dies."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_job
from plait.config import Config, Machine
from plait.engines.simulate import simulate
from plait.events import RoundDone, to_line
from plait.factors import slot_name
from plait.runs.run import Run

ray = pytest.importorskip("ray", reason="plait[ray] is not installed")

from fake_cluster import blocks_of, handed_bytes, rounds_of_blocks  # noqa: E402
from plait.engines.cluster import bounds, share_of_cluster  # noqa: E402

SETTINGS = {
    "clients": 5,
    "rounds": 3,
    "local_steps": 2,
    "batch_size": 3,
    "rank": 2,
    "switch_every": 2,
    "lr": 1e-2,
    "lr_schedule": "linear",
    "head": "mixed",
    "lora_dropout": 0.1,
    "optimizer_state": "reset_each_phase",
    "eval_every": 1,
}
OFTEN = {"save_every": 2}
OF_ONE = ("worker_bytes", "pairs_apart")
"""What only one of the two engines says."""
TIMES = ("train_seconds", "mix_seconds", "eval_seconds", "wall_seconds", "seconds")


@pytest.fixture(scope="module")
def cluster():
    """One small Ray on this machine for all tests here; each run has workers of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # The workers' jobs are made by conftest.py.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        ray.init(
            num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="critical",
            object_store_memory=80 << 20,
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def tiny_jobs(monkeypatch):
    monkeypatch.setattr("plait.runs.run.prepare", tiny_job)


def without(values, *more):
    return {key: value for key, value in values.items() if key not in (*TIMES, *more)}


def adapters(folder):
    return {
        path.parent.name: load_file(path)
        for path in sorted((folder / "adapters").glob("*/adapter_model.safetensors"))
    }


def assert_same_run(one, other):
    """Two run folders hold the same run, bit for bit but for sums over clients of float64."""
    mine, theirs = adapters(one), adapters(other)
    assert mine.keys() == theirs.keys() == {*(f"client-{k}" for k in range(5)), "mean"}
    for name, tensors in mine.items():
        assert all(torch.equal(tensors[key], theirs[name][key]) for key in tensors), name
    lines = ((folder / "events.jsonl").read_text().splitlines() for folder in (one, other))
    summaries = ([(folder / "summary.json").read_text()] for folder in (one, other))
    for pair in (*zip(*lines, strict=True), *zip(*summaries, strict=True)):
        mine, theirs = (without(json.loads(text), *OF_ONE) for text in pair)
        assert mine == close(theirs)


def close(value):
    """The value, with figures that are sums over clients to 1e-9 of themselves."""
    if isinstance(value, dict):
        return {key: close(one) for key, one in value.items()}
    if isinstance(value, list):
        return [close(one) for one in value]
    return pytest.approx(value, rel=1e-9, abs=1e-15) if isinstance(value, float) else value


def test_a_block_hands_over_the_rows_that_others_hear_and_no_more():
    config = Config(topology="ring", **SETTINGS)
    _, block = blocks_of(config, 2)
    block.begin(None)
    sums, rows, own = block.train(0)
    # Of 2, 3 and 4 on a ring of five, client 1 hears 2 and client 0 hears 4.
    assert [slot_name(slot) for slot in rows] == ["A", "B", "HEAD"]
    assert not any(len(value) for value in own.values())
    for slot, value in rows.items():
        np.testing.assert_array_equal(value, block.stack.state[slot][[0, 2]].numpy())
    handed = sum(value.nbytes for value in (*rows.values(), *sums.values()))
    assert block.round.handed_bytes == handed


def test_blocks_are_nearly_equal_and_fit_on_machines(monkeypatch):
    assert [list(block) for block in bounds(7, 2)] == [[0, 1, 2], [3, 4, 5, 6]]
    nodes = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in (16.0, 6.0)]
    nodes += [{"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert share_of_cluster(3, "auto") == {"num_cpus": 6}
    assert share_of_cluster(1, "auto") == {"num_cpus": 16}
    with pytest.raises(ValueError, match="has 22 CPUs for 23 workers"):
        share_of_cluster(23, "auto")
    nodes[0]["Resources"]["GPU"] = 4.0
    assert share_of_cluster(4, "auto") == {"num_gpus": 1, "num_cpus": 1}
    assert share_of_cluster(4, "cpu") == {"num_cpus": 5}
    with pytest.raises(ValueError, match="has 4 GPUs for 5 workers"):
        share_of_cluster(5, "auto")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "ray"}, "needs --workers"),
        ({"engine": "ray", "workers": 6}, "take 1 to 5"),
        ({"workers": 2}, "--workers is for --engine ray"),
        ({"engine": "rai"}, "Did you mean ray"),
    ],
)
def test_what_cant_be_is_said(given, message):
    with pytest.raises(ValueError, match=message):
        next(Run(Config(**SETTINGS), machine=Machine(**given)))


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plait.engines.cluster", None)
    with pytest.raises(ValueError, match=r"pip install 'plait\[ray\]'"):
        next(Run(Config(**SETTINGS), machine=Machine(engine="ray", workers=2)))


@pytest.mark.parametrize(
    ("method", "topology", "workers", "more"),
    [
        ("adf", "ring", 2, {}), ("rolora", "pairs", 3, {}), ("local", "pairs", 2, {}),
        ("ffa", "hypercube", 4, {"clients": 8}), ("adf", "ring", 2, {"task": "chat", "head": None}),
        ("dec-lora", "ring", 3, {"rank": 8, "ranks": "2,1"}),
    ],
)  # fmt: skip
def test_blocks_say_what_a_simulation_says(method, topology, workers, more):
    settings = SETTINGS | {"task": "trec"} | more
    config = Config(method=method, topology=topology, p=0.5, **settings)
    job = tiny_job(config)
    expected = [e for e in simulate(job, job.initial_stack()) if isinstance(e, RoundDone)]
    for event, whole in zip(rounds_of_blocks(blocks_of(config, workers)), expected, strict=True):
        assert event.worker_bytes == handed_bytes(config, workers, event)
        mine, theirs = (without(json.loads(to_line(e)), *OF_ONE) for e in (event, whole))
        assert mine == close(theirs)


@pytest.mark.parametrize(
    ("method", "topology", "workers"),
    [("adf", "ring", 2), pytest.param("rolora", "pairs", 3, marks=pytest.mark.slow)],
)
def test_it_is_the_run_of_a_simulation(cluster, tmp_path, method, topology, workers):
    config = Config(method=method, topology=topology, p=0.5, **SETTINGS)
    list(Run(config, tmp_path / "simulated"))
    run = Run(config, tmp_path / "ray", machine=Machine(engine="ray", workers=workers, **OFTEN))
    list(run)
    assert_same_run(tmp_path / "simulated", tmp_path / "ray")
    run.save(tmp_path / "saved")
    assert_same_run(tmp_path / "simulated", tmp_path / "saved")
    state, saved = (load_file(tmp_path / x / "checkpoint.safetensors") for x in ("ray", "saved"))
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in state)


@pytest.mark.slow
def test_in_memory_its_state_is_gone_with_the_workers(cluster, tmp_path):
    run = Run(Config(**SETTINGS), machine=Machine(engine="ray", workers=1))
    list(run)
    assert run.summary["rounds"] == 3
    for ask in (run.model, lambda: run.save(tmp_path / "saved")):
        with pytest.raises(ValueError, match="give the run a folder"):
            ask()
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_nothing(cluster, tmp_path):
    config = Config(method="adf", topology="pairs", p=0.5, **SETTINGS | {"rounds": 4})
    list(Run(config, tmp_path / "simulated"))
    run = Run(config, tmp_path / "ray", machine=Machine(engine="ray", workers=2, **OFTEN))
    for event in run:
        # After the round that follows a checkpoint, and before any.
        if isinstance(event, RoundDone) and event.round in (0, 2):
            os.kill(pids(run._engine)[event.round // 2], signal.SIGKILL)
    assert_same_run(tmp_path / "simulated", tmp_path / "ray")


def pids(engine):
    ids = [block._actor_id.hex() for block in engine.blocks]
    return [ray._private.state.actors(actor)["Pid"] for actor in ids]


@pytest.mark.slow
def test_one_engine_goes_on_where_the_other_stopped(cluster, tmp_path):
    config = Config(topology="ring", **SETTINGS)
    list(Run(config, tmp_path / "simulated"))
    stopped = Run(config, tmp_path / "ray", machine=Machine(**OFTEN))
    list(itertools.islice(stopped, 6))  # up to the checkpoint after the second round
    machine = Machine(engine="ray", workers=1)
    events = list(Run(config, tmp_path / "ray", resume=True, machine=machine))
    assert_same_run(tmp_path / "simulated", tmp_path / "ray")
    assert not any(event.worker_bytes for event in events if isinstance(event, RoundDone))
