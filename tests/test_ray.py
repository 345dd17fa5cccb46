"""A run on a Ray cluster is the simulation's, in blocks: the same numbers, whatever dies."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_job
from plait import runs
from plait.config import Config
from plait.events import Evaluated, RoundDone
from plait.mixing import neighbour_weights
from plait.runs import run

ray = pytest.importorskip("ray", reason="plait[ray] is not installed")

from plait.engines.block import Block  # noqa: E402
from plait.engines.cluster import Cluster, bounds, share_of_cluster  # noqa: E402

SETTINGS = {
    "clients": 5,
    "rounds": 3,
    "local_steps": 2,
    "batch_size": 3,
    "rank": 2,
    "switch_every": 2,
    "lr": 1e-2,
    "head": "mixed",
    "lora_dropout": 0.1,
    "optimizer_state": "reset_each_phase",
    "save_every": 2,
    # A client to a chunk: one product over the texts of several adds up in another order.
    "chunk_tokens": 1,
}
TIMES = ("train_seconds", "mix_seconds", "eval_seconds", "wall_seconds", "seconds")


@pytest.fixture(scope="module")
def cluster():
    """One small Ray on this machine for all tests here; each run has workers of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # The workers' jobs are made by conftest.py.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        ray.init(
            num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="critical",
            object_store_memory=80 << 20,
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def tiny_jobs(monkeypatch):
    monkeypatch.setattr(runs, "prepare", tiny_job)


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
        mine, theirs = (without(json.loads(text), "worker_bytes") for text in pair)
        assert mine == close(theirs)


def close(value):
    """The value, with figures that are sums over clients to 1e-9 of themselves."""
    if isinstance(value, dict):
        return {key: close(one) for key, one in value.items()}
    if isinstance(value, list):
        return [close(one) for one in value]
    return pytest.approx(value, rel=1e-9, abs=1e-15) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("method", "topology", "workers"), [("adf", "ring", 2), ("rolora", "pairs", 3)]
)
def test_it_is_the_run_of_a_simulation(cluster, tmp_path, method, topology, workers):
    config = Config(method=method, topology=topology, p=0.5, **SETTINGS)
    list(run(config, tmp_path / "simulated"))
    events = list(run(config, tmp_path / "ray", engine="ray", workers=workers))
    assert_same_run(tmp_path / "simulated", tmp_path / "ray")
    assert all(event.worker_bytes for event in events if isinstance(event, RoundDone))


def test_a_worker_that_is_killed_changes_nothing(cluster, tmp_path):
    config = Config(method="adf", topology="pairs", p=0.5, **SETTINGS | {"rounds": 4})
    list(run(config, tmp_path / "simulated"))
    with Cluster(config, 2, tiny_job) as engine:
        folder = runs.RunFolder.open(tmp_path / "ray", config, resume=False)
        for event in runs.carry_out(engine, config, folder):
            # After the round that follows a checkpoint, and before any.
            if isinstance(event, RoundDone) and event.round in (0, 2):
                os.kill(pids(engine)[event.round // 2], signal.SIGKILL)
    assert_same_run(tmp_path / "simulated", tmp_path / "ray")


def pids(engine):
    ids = [block._actor_id.hex() for block in engine.blocks]
    return [ray._private.state.actors(actor)["Pid"] for actor in ids]


def test_one_engine_goes_on_where_the_other_stopped(cluster, tmp_path):
    config = Config(topology="ring", **SETTINGS)
    list(run(config, tmp_path / "simulated"))
    stopped = run(config, tmp_path / "ray")
    list(itertools.islice(stopped, 6))  # up to the checkpoint after the second round
    stopped.close()
    events = list(run(config, tmp_path / "ray", resume=True, engine="ray", workers=1))
    assert_same_run(tmp_path / "simulated", tmp_path / "ray")
    assert not any(event.worker_bytes for event in events if isinstance(event, RoundDone))
