"""A simulation and peers do the same: the same code, the same numbers."""

from __future__ import annotations

import itertools

import pytest

from conftest import tiny_job
from fake_network import Hub, member, start_peer, together
from plait.config import Config
from plait.engines.simulate import simulate
from plait.events import Evaluated, RoundDone

SETTINGS = {
    "clients": 4,
    "rounds": 4,
    "local_steps": 2,
    "batch_size": 3,
    "rank": 2,
    "switch_every": 2,
    "lr": 1e-2,
    "lr_schedule": "cosine",
    "warmup_rounds": 1,
    "lora_dropout": 0.1,
    "optimizer_state": "reset_each_phase",
    "eval_every": 1,
}


def simulated(config):
    job = tiny_job(config)
    stack = job.initial_stack()
    return stack, list(simulate(job, stack))


def peers_of(config, hub=None, **kwargs):
    hub = hub or Hub()
    members = [member(f"p{k}") for k in range(config.clients)]
    return [start_peer(hub, k, config, members, **kwargs) for k in range(config.clients)]


def far(stack, peers):
    return max(
        float((value[peer.me] - peer.stack.factors[factor][0]).abs().max())
        for factor, value in stack.factors.items()
        for peer in peers
    )


def apart_of(event):
    return {(i, j): apart for i, j, apart in event.pairs_apart}


@pytest.mark.parametrize(
    ("method", "topology"),
    [
        *itertools.product(["adf", "rolora"], ["ring", "pairs"]),
        ("adf", "one_peer_exponential"),
        ("adf", "hypercube"),
        ("tad", "base"),
        ("fedavg", "complete"),
    ],
)
def test_peers_and_a_simulation_agree_bit_for_bit(method, topology):
    config = Config(method=method, topology=topology, p=0.5, **SETTINGS)
    stack, expected = simulated(config)
    peers = peers_of(config)

    said = together(peers, config.rounds)

    assert far(stack, peers) == 0
    for kind, fields in ((RoundDone, ("train_losses",)), (Evaluated, ("scores",))):
        whole = [event for event in expected if isinstance(event, kind)]
        parts = [[event for event in events if isinstance(event, kind)] for events in said]
        for number, event in enumerate(whole):
            for field in fields:
                assert getattr(event, field) == [getattr(p[number], field)[0] for p in parts]
    for number, event in enumerate(e for e in expected if isinstance(e, RoundDone)):
        rounds = [[e for e in events if isinstance(e, RoundDone)][number] for events in said]
        assert event.edges == [edge for part in rounds for edge in part.edges]
        assert event.sent_bytes == sum(part.sent_bytes for part in rounds)
        assert (event.active, event.shared) == (rounds[0].active, rounds[0].shared)
        for part in rounds:
            for i, j, apart in part.pairs_apart:
                assert apart == pytest.approx(apart_of(event)[i, j], rel=1e-3)
            met = len(part.edges) if {"A", "B"} <= set(event.shared) else 0
            assert len(part.pairs_apart) == met


@pytest.mark.parametrize("method", ["adf", "dec-lora"])
@pytest.mark.parametrize("topology", ["ring", "pairs"])
def test_they_agree_on_a_language_model(method, topology):
    config = Config(task="chat", method=method, topology=topology, p=0.5, **SETTINGS)
    stack, expected = simulated(config)
    peers = peers_of(config)
    said = together(peers, config.rounds)
    assert far(stack, peers) == 0
    *_, last = (event for event in expected if isinstance(event, Evaluated))
    for client, events in enumerate(said):
        *_, own = (event for event in events if isinstance(event, Evaluated))
        assert (own.scores, own.losses) == ([last.scores[client]], [last.losses[client]])


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_they_agree_on_a_base_in_few_bits(load_in):
    config = Config(task="chat", topology="ring", load_in=load_in, **SETTINGS)
    stack, _ = simulated(config)
    peers = peers_of(config)
    together(peers, config.rounds)
    assert far(stack, peers) == 0


@pytest.mark.parametrize("mix", ["trimmed-mean:1", "clipped-gossip:0.05", "clipped-product:0.05"])
def test_they_mix_robustly_bit_for_bit_alike(mix):
    config = Config(topology="ring", mix=mix, **SETTINGS)
    stack, _ = simulated(config)
    plain, _ = simulated(Config(topology="ring", **SETTINGS))
    peers = peers_of(config)
    together(peers, config.rounds)
    assert far(stack, peers) == 0
    assert far(plain, peers) > 1e-4


def test_with_symmetric_loss_and_nothing_lost_they_agree_too():
    config = Config(topology="ring", **SETTINGS)
    stack, _ = simulated(config)
    peers = peers_of(config, symmetric=True)
    together(peers, config.rounds)
    assert far(stack, peers) == 0
