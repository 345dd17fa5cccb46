"""Runs in one stack: each is what it is alone, to the last bit."""

from __future__ import annotations

import dataclasses
import itertools
import time
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_job
from plait.config import Config, Machine
from plait.data import sources
from plait.engines import stacked_runs
from plait.engines.job import Materials, Rules, assemble
from plait.events import RoundDone
from plait.experiments.executors import CellEnded, here, in_one_stack
from plait.experiments.plan import Cell
from plait.factors import A
from plait.runs.run import Run
from plait.runs.run_folder import load_events

CONFIG = Config(
    clients=2, rounds=3, local_steps=1, batch_size=2, rank=2, switch_every=2, eval_every=3, p=0.5,
)  # fmt: skip


@cache
def first_job():
    return tiny_job(CONFIG)


def shared_job(config, _machine=None):
    """A tiny job with the model and the data of all others."""
    job = first_job()
    materials = Materials(job.task, job.backbone, job.train, job.held_out)
    shares = np.array_split(np.arange(len(job.train)), config.clients)
    return assemble(Rules.of(config), materials, shares, time.perf_counter())


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How many runs each local phase was of."""
    monkeypatch.setattr("plait.runs.run.prepare", shared_job)
    found = []

    def counted(backbone, tokens, works, optimizer):
        found.append(len(works))
        return original(backbone, tokens, works, optimizer)

    original = stacked_runs.local_phases
    monkeypatch.setattr(stacked_runs, "local_phases", counted)
    return found


@pytest.fixture
def evaluations(monkeypatch):
    """How many models each evaluation was of."""
    found = []

    def counted(backbone, factors, tokens, objective):
        found.append(len(factors[A]))
        return original(backbone, factors, tokens, objective)

    original = stacked_runs.evaluate
    monkeypatch.setattr(stacked_runs, "evaluate", counted)
    return found


def cells_of(folder, configs):
    return [Cell(f"{k}", config, folder / f"{k}") for k, config in enumerate(configs)]


def assert_same(one, other):
    states = [load_file(cell.folder / "checkpoint.safetensors") for cell in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    said = [
        [
            {k: v for k, v in vars(event).items() if "seconds" not in k}
            for event in load_events(cell.folder)
        ]
        for cell in (one, other)
    ]
    assert repr(said[0]) == repr(said[1])  # as text, where NaN is itself


def test_a_stack_of_a_study_is_its_runs_one_by_one(tmp_path, calls, evaluations):
    """Three methods at three rates on two graphs with two seeds: 36 runs."""
    axes = itertools.product(
        ("adf", "dec-lora", "ffa"), (1e-3, 3e-3, 1e-2), ("ring", "pairs"), (0, 1)
    )
    configs = [
        dataclasses.replace(CONFIG, method=method, lr=lr, topology=topology, seed=seed)
        for method, lr, topology, seed in axes
    ]
    alone, stacked = (cells_of(tmp_path / name, configs) for name in ("alone", "stacked"))
    list(here(alone))
    ended = [said for _, said in in_one_stack(stacked, 36) if isinstance(said, CellEnded)]
    assert [one.failure for one in ended] == [None] * 36
    for one, other in zip(alone, stacked, strict=True):
        assert_same(one, other)
    # Rounds of B, B, A with ADF, of B with FFA, and of both with Dec-LoRA.
    assert sorted(calls) == [12, 12, 12, 12, 12, 24, 24]
    # At the start all models of a run are the same; then its clients' own and the averaged one,
    # but where both clients have come out the same.
    assert evaluations[0] == 36
    assert 100 < evaluations[1] <= 3 * 36
    assert len(evaluations) == 2


def test_what_fails_leaves_the_stack_and_others_differ_in_rounds(tmp_path):
    configs = [
        dataclasses.replace(CONFIG, rounds=5),
        dataclasses.replace(CONFIG, lr=1e30, clip_norm=None),
        dataclasses.replace(CONFIG, local_steps=1, method="dec-lora"),
        dataclasses.replace(CONFIG, seed=3, lora_dropout=0.5),
        dataclasses.replace(CONFIG, seed=4, lora_dropout=0.5, dp_clip=0.1, dp_noise=0.5),
    ]
    alone, stacked = (cells_of(tmp_path / name, configs) for name in ("alone", "stacked"))
    list(here(alone))
    ends = {
        cell.label: said.failure
        for cell, said in in_one_stack(stacked, 5)
        if isinstance(said, CellEnded)
    }
    assert [label for label, failure in ends.items() if failure] == ["1"]
    assert ends["1"].diverged
    assert "training diverged" in ends["1"].reason
    for k in (0, 2, 3, 4):
        assert_same(alone[k], stacked[k])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_stack_that_memory_does_not_hold_goes_on_as_halves(tmp_path, monkeypatch, caplog, error):
    """One run is through before; of the others none says anything twice."""
    configs = [dataclasses.replace(CONFIG, rounds=1)]
    configs += [dataclasses.replace(CONFIG, seed=seed) for seed in range(3)]
    alone, stacked = (cells_of(tmp_path / name, configs) for name in ("alone", "stacked"))
    expected = list(here(alone))
    counted, tries = stacked_runs.local_phases, []

    def tight(backbone, tokens, works, optimizer):
        found = counted(backbone, tokens, works, optimizer)
        tries.append(len(works))
        if len(works) == 3:  # after they have trained
            raise error("no memory")
        return found

    monkeypatch.setattr(stacked_runs, "local_phases", tight)
    monkeypatch.setattr(sources, "_SAID", set())
    said = list(in_one_stack(stacked, 4))
    assert tries == [4, 3, 2, 2, 2, 1, 1, 1]
    assert "4 runs at once don't fit into memory; now 2 at a time" in caplog.text
    assert len(said) == len(expected)
    assert all(one.failure is None for _, one in said if isinstance(one, CellEnded))
    for one, other in zip(alone, stacked, strict=True):
        assert_same(one, other)


def test_a_stack_that_was_left_goes_on(tmp_path):
    configs = [dataclasses.replace(CONFIG, seed=seed) for seed in range(3)]
    alone, stacked = (cells_of(tmp_path / name, configs) for name in ("alone", "stacked"))
    list(here(alone))
    list(itertools.islice(Run(configs[1], stacked[1].folder, machine=Machine(save_every=1)), 3))
    said = in_one_stack(stacked, 2, machine=Machine(save_every=1))
    while not isinstance(next(said)[1], RoundDone):
        pass
    said.close()
    list(in_one_stack(stacked, 3))
    for one, other in zip(alone, stacked, strict=True):
        assert_same(one, other)
