"""Methods that share more than values, or mix A and B together: all engines do the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_job
from fake_network import Hub, member, start_peer, together
from plait.config import Config, Machine
from plait.engines.simulate import simulate
from plait.events import RoundDone
from plait.factors import AB, VALUE, A, B
from plait.methods import METHODS, Method, alternate, always
from plait.mixing import average, build_mix, each_factor, each_site
from plait.runs.run import Run

CONFIG = Config(
    method="own", topology="ring", clients=5, rounds=4, local_steps=2, batch_size=3, rank=2,
    lr=1e-2, lora_dropout=0.1, optimizer_state="keep", head="mixed",
)  # fmt: skip


def averaged_apart(mine, theirs, W):
    return tuple(average(own, heard, W) for own, heard in zip(mine, theirs, strict=True))


WAYS = {
    "moments": {"kinds": (VALUE, "m")},
    "both moments": {"kinds": (VALUE, "m", "v")},
    "moments and sites": {"kinds": (VALUE, "m"), "mix": always(each_site(averaged_apart))},
    "sites": {"mix": always(each_site(averaged_apart))},
    "factors": {"mix": always(each_factor(average))},
    "screened": {"mix": always(build_mix("trimmed-product:1"))},
}


def add_method(monkeypatch, way):
    own = Method(summary="", train=alternate(B, A, every=2), share=always(AB), **WAYS[way])
    monkeypatch.setitem(METHODS, "own", lambda _: own)


def simulated(config=CONFIG):
    job = tiny_job(config)
    stack = job.initial_stack()
    return job, stack, [e for e in simulate(job, stack) if isinstance(e, RoundDone)]


def assert_same_state(expected, parts):
    """The stacks of some engine's parts, one after another, are the whole stack, bit for bit."""
    for slot, value in expected.state.items():
        found = torch.cat([part.state[slot] for part in parts])
        assert torch.equal(found, value), slot


def test_sites_averaged_apart_are_factors_averaged(monkeypatch):
    stacks = []
    for way in ("sites", "factors"):
        add_method(monkeypatch, way)
        stacks.append(simulated()[1])
    assert_same_state(stacks[0], stacks[1:])
    add_method(monkeypatch, "moments and sites")
    with_moments = simulated()[1]
    add_method(monkeypatch, "moments")
    assert_same_state(simulated()[1], [with_moments])
    assert not torch.equal(with_moments.state["m", B], stacks[0].state["m", B])


@pytest.mark.parametrize("way", WAYS)
def test_blocks_do_what_a_simulation_does(monkeypatch, way):
    pytest.importorskip("ray", reason="plait[ray] is not installed")
    from fake_cluster import blocks_of, handed_bytes, rounds_of_blocks

    add_method(monkeypatch, way)
    _, stack, rounds = simulated()
    blocks = blocks_of(CONFIG, 2)
    for event, whole in zip(rounds_of_blocks(blocks), rounds, strict=True):
        assert event.worker_bytes == handed_bytes(CONFIG, 2, event)
        assert (event.shared, event.sent_bytes) == (whole.shared, whole.sent_bytes)
        assert event.train_losses == whole.train_losses
    assert_same_state(stack, [block.stack for block in blocks])


@pytest.mark.parametrize("way", WAYS)
def test_peers_do_what_a_simulation_does(monkeypatch, way):
    add_method(monkeypatch, way)
    _, stack, rounds = simulated()
    hub = Hub()
    members = [member(f"p{k}") for k in range(CONFIG.clients)]
    peers = [start_peer(hub, k, CONFIG, members) for k in range(CONFIG.clients)]
    said = together(peers, CONFIG.rounds)
    assert_same_state(stack, [peer.stack for peer in peers])
    for number, whole in enumerate(rounds):
        parts = [[e for e in events if isinstance(e, RoundDone)][number] for events in said]
        assert {part.shared for part in parts} == {whole.shared}
        assert sum(part.sent_bytes for part in parts) == whole.sent_bytes


@pytest.mark.parametrize("way", ["moments", "both moments", "sites"])
def test_all_that_travels_is_counted(monkeypatch, way):
    add_method(monkeypatch, way)
    job, _, rounds = simulated()
    one = sum(map(job.backbone.layout.size, job.backbone.layout.factors))
    kinds = len(job.method.kinds)
    assert len(job.travels) == 3 * kinds
    for event in rounds:
        assert job.message_bytes(event.round, 0) == 4 * kinds * one
        assert event.sent_bytes == 4 * kinds * one * len(event.edges)
    names = ["A|B|HEAD", "m.A|m.B|m.HEAD", "v.A|v.B|v.HEAD"][:kinds]
    assert {event.shared for event in rounds} == {"|".join(names)}


@pytest.mark.parametrize("way", ["moments", "moments and sites"])
@pytest.mark.parametrize("private", [{}, {"dp_clip": 0.02, "dp_noise": 0.5}])
def test_a_run_that_was_stopped_keeps_them(monkeypatch, tmp_path, way, private):
    monkeypatch.setattr("plait.runs.run.prepare", tiny_job)
    add_method(monkeypatch, way)
    config = Config(**CONFIG.to_json() | private)
    list(Run(config, tmp_path / "whole"))
    list(itertools.islice(Run(config, tmp_path / "run", machine=Machine(save_every=1)), 4))
    list(Run(config, tmp_path / "run", resume=True))
    whole, found = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "run")
    )
    assert whole.keys() == found.keys() >= {"x.A", "m.A", "v.A", "x.HEAD"}
    assert all(torch.equal(whole[name], found[name]) for name in whole)
