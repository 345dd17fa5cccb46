"""Sending only what changed most: CHOCO-SGD in numpy, all engines, resumed, with losses."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_rows import all_agree, config_of, rounds_of

from conftest import tiny_job
from fake_network import TERMS
from plait.config import Machine
from plait.engines.simulate import simulate
from plait.engines.steps import mix, publish, reset_optimizer
from plait.factors import VALUE, Factor, public
from plait.mixing import neighbour_weights
from plait.runs.run import Run
from plait.topology import build_schedule

A, B = (VALUE, Factor.A), (VALUE, Factor.B)


def sparse(method="dec-lora", **others):
    defaults = {"wire": "top-k:0.1", "gossip_step": 0.5, "topology": "ring"}
    return config_of(method, **defaults | others)


PATIENT = dataclasses.replace(TERMS, retry_s=20, linger_s=0)
"""Whoever is asked for a message before it is pushed gives all of it."""


def twin(x, copies, W, count, step):
    """A round of CHOCO-SGD after its local steps: x and copies (N, P), both after it."""
    x, copies = x.copy(), copies.copy()
    for i in range(len(x)):
        order = np.argsort(-np.abs(x[i] - copies[i]), kind="stable")[:count]
        q = np.zeros_like(x[i])
        q[order] = (x[i] - copies[i])[order]
        copies[i] += q
    return x + step * np.array([W[i] @ copies - copies[i] for i in range(len(x))]), copies


@pytest.mark.parametrize("topology", ["ring", "pairs"])
def test_rounds_are_those_of_choco_sgd(topology):
    config = sparse(rounds=6, topology=topology)
    job, rng = tiny_job(config), np.random.default_rng(0)
    state, W_of = job.initial_stack().state, build_schedule(config_of("adf", topology=topology))
    expected = {slot: (state[slot].double().numpy(),) * 2 for slot in (A, B)}
    for round_ in range(config.rounds):
        W = W_of(round_)
        for slot in (A, B):
            update = rng.normal(size=state[slot].shape).astype("f4")
            state[slot] = state[slot] + torch.from_numpy(update)
            x, copies = expected[slot]
            count = round(0.1 * x.shape[1])
            expected[slot] = twin(x + update, copies, W, count, 0.5)
        publish(job, state, round_, range(4))
        state |= mix(job, state, state, neighbour_weights(job.schedule(round_)), round_, range(4))
    for slot in (A, B):
        for found, one in zip((state[slot], state[job.sent(slot)]), expected[slot], strict=True):
            np.testing.assert_allclose(found, one, rtol=0, atol=1e-5)


def test_what_was_not_sent_stays_and_nothing_is_lost():
    """The mean moves only by training, and a client that hears nobody keeps what it has."""
    config = sparse(gossip_step=1.0)
    job, generator = tiny_job(config), torch.Generator().manual_seed(0)
    state = job.initial_stack().state
    before = {slot: state[slot] + torch.randn(state[slot].shape, generator=generator)
              for slot in (A, B)}  # fmt: skip
    state |= before
    publish(job, state, 0, range(4))
    W = neighbour_weights(job.schedule(0))
    mixed = mix(job, state, state, W, 0, range(4))
    alone = mix(job, state, state, np.zeros_like(W), 0, range(4))
    for slot in (A, B):
        sent = (state[job.sent(slot)] != job.initial_stack().state[slot]).sum(dim=1)
        assert sent.tolist() == [round(0.1 * before[slot].shape[1])] * 4
        torch.testing.assert_close(mixed[slot].mean(0), before[slot].mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(alone[slot], before[slot], rtol=0, atol=1e-6)


def test_public_copies_stay_where_the_optimizer_starts_anew():
    job = tiny_job(sparse(optimizer_state="reset_each_round"))
    stack = job.initial_stack()
    before = {slot: value.clone() for slot, value in stack.state.items()}
    assert torch.equal(before[job.sent(A)], before[A]), "all know the common start"
    stack.state["m", Factor.A].fill_(1.0)
    reset_optimizer(stack, Factor.AB, 0, job, 0)
    assert all(torch.equal(value, before[slot]) for slot, value in stack.state.items())


def test_all_values_are_plain_averaging_with_the_same_bytes():
    config, plain = sparse(wire="top-k:1.0"), sparse(wire="float32")
    one, two = tiny_job(config), tiny_job(plain)
    stacks = one.initial_stack(), two.initial_stack()
    events = [rounds_of(simulate(*pair)) for pair in zip((one, two), stacks, strict=True)]
    assert [e.sent_bytes for e in events[0]] == [e.sent_bytes for e in events[1]]
    for slot, value in stacks[1].state.items():
        assert torch.equal(value, stacks[0].state[slot]), slot


@pytest.mark.parametrize(
    ("method", "topology"),
    [("adf", "ring"), ("rolora", "pairs"), ("tracking", "pairs"), ("adf-offset", "ring")],
)
def test_all_engines_agree_bit_for_bit(method, topology):
    all_agree(sparse(method, topology=topology, optimizer_state="reset_each_round"), terms=PATIENT)


@pytest.mark.parametrize(
    "others", [{"rank": 4, "ranks": "2,1,4"}, {"mix": "clipped-gossip:0.1"}, {"frozen_every": 2}]
)
def test_so_they_do_with_ranks_mixes_and_frozen_factors_that_rest(others):
    all_agree(sparse("adf", topology="pairs", **others), terms=PATIENT)


@pytest.mark.parametrize("private", [{}, {"dp_clip": 0.02, "dp_noise": 0.5}])
def test_a_run_that_was_stopped_goes_on(monkeypatch, tmp_path, private):
    monkeypatch.setattr("plait.runs.run.prepare", tiny_job)
    monkeypatch.setattr("plait.engines.simulate.save_adapters", lambda *_: None)
    config = sparse("adf", **private)
    list(Run(config, tmp_path / "whole"))
    list(itertools.islice(Run(config, tmp_path / "run", machine=Machine(save_every=1)), 4))
    list(Run(config, tmp_path / "run", resume=True))
    whole, found = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "run")
    )
    assert f"{public(VALUE)}.A" in whole
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)
