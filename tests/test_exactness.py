"""What must hold exactly, on the stacked code that every run uses (method.md's list)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import tiny_job
from plait.config import Config
from plait.engines.simulate import simulate
from plait.events import RoundDone
from plait.factors import VALUE, Factor
from plait.methods import METHODS, build_method
from plait.metrics import consensus, cross_term, mixing_errors
from plait.mixing import average, mean, neighbour_weights
from plait.topology import build_schedule

SLOT = (VALUE, Factor.A)
FAST = {"clients": 4, "rounds": 6, "local_steps": 2, "batch_size": 4, "rank": 2, "lr": 1e-2}


def finished(**settings):
    """The stack and the rounds of a finished run."""
    job = tiny_job(Config(**(FAST | settings)))
    stack = job.initial_stack()
    rounds = [event for event in simulate(job, stack) if isinstance(event, RoundDone)]
    return stack, rounds


def assert_equal_factors(one, other, tolerance):
    for factor in one.factors:
        torch.testing.assert_close(
            one.factors[factor], other.factors[factor], rtol=0, atol=tolerance
        )


def test_on_the_complete_graph_adf_is_rolora():
    adf, _ = finished(method="adf", switch_every=1, topology="complete")
    rolora, _ = finished(method="rolora", topology="complete")
    assert_equal_factors(adf, rolora, 1e-6)


def test_on_a_sparse_graph_adf_is_not_rolora():
    adf, _ = finished(method="adf", switch_every=1, topology="ring")
    rolora, _ = finished(method="rolora", topology="ring")
    assert (adf.factors[Factor.A] - rolora.factors[Factor.A]).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["adf", "adf-offset"])
@pytest.mark.parametrize("topology", ["ring", "pairs"])
def test_adf_that_never_switches_is_ffa(method, topology):
    adf, rounds = finished(method=method, switch_every=1000, topology=topology, p=0.5)
    ffa, _ = finished(method="ffa", topology=topology, p=0.5)
    assert_equal_factors(adf, ffa, 1e-6)
    assert all(layer.cross_term < 1e-12 for event in rounds for layer in event.after)


def test_fedavg_is_dec_lora_on_the_complete_graph():
    fedavg, _ = finished(method="fedavg", topology="ring")
    dec_lora, _ = finished(method="dec-lora", topology="complete")
    assert_equal_factors(fedavg, dec_lora, 0)


def test_with_rank_enough_decaf_mixes_products_exactly():
    # Layers are 32 wide.
    for method, exact in (("decaf", True), ("dec-lora", False)):
        _, rounds = finished(method=method, topology="ring", rank=32, rounds=2)
        errors = [layer.mixing_error for event in rounds for layer in event.after]
        assert (max(errors) < 1e-5) == exact, errors


def test_fedsa_brings_a_together_and_leaves_b():
    _, rounds = finished(method="fedsa", topology="complete")
    for event in rounds:
        assert event.shared == "A"
        for before, after in zip(event.before, event.after, strict=True):
            assert before.consensus_A > 1e-9 > after.consensus_A
            assert before.consensus_B == after.consensus_B > 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_cross_term_is_within_its_bound(method):
    _, rounds = finished(method=method, topology="ring")
    layers = [layer for event in rounds for layer in (*event.before, *event.after)]
    for layer in layers:
        bound = math.sqrt(layer.consensus_A * layer.consensus_B)
        assert layer.cross_term <= bound * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("topology", ["ring", "pairs", "hypercube", "one_peer_exponential"])
@pytest.mark.parametrize("method", METHODS)
def test_mixing_conserves_the_mean(method, topology):
    config = Config(method=method, topology=topology, clients=4, p=0.5)
    build = build_method(config)
    if build.conserves == "nothing":
        pytest.skip("this method doesn't promise it")
    if build.mix(0).together:
        pytest.skip("mixes a layer's A and B together: held to its twin by test_rows.py")
    X = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    for round_ in range(4):
        W = build_schedule(config)(round_)
        mixed = build.mix(round_).combine(None, {SLOT: X}, {SLOT: X}, neighbour_weights(W))[SLOT]
        torch.testing.assert_close(mean(mixed), mean(X), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            mixed.double(), torch.from_numpy(W) @ X.double(), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("method", ["adf", "ffa", "rolora"])
def test_the_frozen_factor_does_not_move_in_its_phase(method):
    job = tiny_job(Config(**(FAST | {"method": method, "topology": "ring", "switch_every": 2})))
    stack = job.initial_stack()
    before = {factor: value.clone() for factor, value in stack.factors.items()}
    for event in simulate(job, stack):
        if not isinstance(event, RoundDone):
            continue
        for factor in (Factor.A, Factor.B):
            moved = not torch.equal(before[factor], stack.factors[factor])
            if factor not in job.method.train(event.round) | job.method.share(event.round):
                assert not moved
            if factor in job.method.train(event.round):
                assert moved
        before = {factor: value.clone() for factor, value in stack.factors.items()}


def test_before_mixing_the_frozen_factor_is_bitwise_what_it_was():
    job = tiny_job(Config(**(FAST | {"method": "adf", "topology": "complete", "rounds": 1})))
    stack = job.initial_stack()
    A0 = stack.factors[Factor.A].clone()
    list(simulate(job, stack))
    assert torch.equal(stack.factors[Factor.A], A0)


@pytest.mark.parametrize("method", ["adf", "dec-lora"])
def test_the_same_seed_twice_is_bitwise_equal(method):
    one, rounds = finished(method=method, topology="pairs", p=0.5, lora_dropout=0.1)
    other, again = finished(method=method, topology="pairs", p=0.5, lora_dropout=0.1)
    assert all(torch.equal(one.factors[f], other.factors[f]) for f in one.factors)
    assert [event.before for event in rounds] == [event.before for event in again]


def test_another_seed_is_another_run():
    one, _ = finished(seed=0)
    other, _ = finished(seed=1)
    assert not torch.equal(one.factors[Factor.B], other.factors[Factor.B])


def test_all_clients_start_from_the_same_factors():
    stack = tiny_job(Config(**FAST)).initial_stack()
    assert all(torch.equal(value[0], row) for value in stack.factors.values() for row in value)
    assert stack.factors[Factor.A].abs().sum() > 0
    assert stack.factors[Factor.B].abs().sum() == 0


def test_hypercube_with_long_phases_brings_the_frozen_factor_together():
    _, rounds = finished(method="adf", topology="hypercube", switch_every=3, rounds=9, clients=8)
    # A trained in rounds 3-5 and was mixed in each; three more rounds average it exactly.
    assert sum(layer.consensus_A for layer in rounds[5].before) > 1e-9
    assert sum(layer.consensus_A for layer in rounds[8].after) < 1e-12


@pytest.mark.parametrize("clients", [33, 34, 60])
def test_many_neighbours_at_once_are_averaged_as_one_by_one(clients):
    X = torch.randn(clients, 20, generator=torch.Generator().manual_seed(0))
    W = build_schedule(Config(topology="complete", clients=clients))(0)
    W[0, 1] = W[1, 0] = 0  # a message that never came leaves its weight with its receiver
    W[0, 2:] = 0
    weights = neighbour_weights(W)
    kept = torch.from_numpy(1 - weights.sum(axis=1))[:, None]
    expected = kept * X.double() + torch.from_numpy(weights) @ X.double()
    mixed = average(X, X, weights)
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(mixed[0], X[0])


# -- the metrics against their definitions


def factors(clients=5, rank=3, d_in=7, d_out=11, seed=0):
    rng = np.random.default_rng(seed)
    A = torch.from_numpy(rng.normal(size=(clients, rank, d_in)))
    B = torch.from_numpy(rng.normal(size=(clients, d_out, rank)))
    return A, B


def test_consensus_and_cross_term_by_definition():
    A, B = factors()
    dA, dB = A - A.mean(0), B - B.mean(0)
    assert consensus(A) == pytest.approx((dA**2).sum().item() / 5)
    C = (B @ A).mean(0) - B.mean(0) @ A.mean(0)
    torch.testing.assert_close(C, (dB @ dA).mean(0))
    assert cross_term(A, B) == pytest.approx(C.norm().item())


@pytest.mark.parametrize("active_only", [False, True])
@pytest.mark.parametrize("topology", ["ring", "complete", "star", "pairs"])
@pytest.mark.parametrize("width", [7, 40])  # of five clients with rank 3, some hear many there
@pytest.mark.parametrize("room", [1, 10**6])
def test_mixing_error_by_definition(active_only, topology, width, room, monkeypatch):
    monkeypatch.setattr("plait.metrics.ROOM", room)
    A, B = factors(d_in=width, d_out=width + 4)
    W = build_schedule(Config(topology=topology, clients=5, p=0.5))(0)
    mix = torch.from_numpy(W)
    A_after = A if active_only else torch.einsum("ij,jab->iab", mix, A)
    B_after = torch.einsum("ij,jab->iab", mix, B)
    products = torch.einsum("ij,jab->iab", mix, B @ A)
    expected = (products - B_after @ A_after).flatten(1).norm(dim=1)
    torch.testing.assert_close(mixing_errors(A, B, A_after, B_after, W), expected)


def test_mixing_both_errs_in_second_order_and_the_active_one_alone_in_first():
    A, B = factors()
    W = build_schedule(Config(topology="ring", clients=5))(0)
    errors = {}
    for size in (1e-2, 1e-3):
        A_near, B_near = A[:1] + size * A, B[:1] + size * B
        mixed = [torch.einsum("ij,jab->iab", torch.from_numpy(W), X) for X in (A_near, B_near)]
        errors["both", size] = mixing_errors(A_near, B_near, *mixed, W).mean()
        errors["active", size] = mixing_errors(A_near, B_near, A_near, mixed[1], W).mean()
    assert errors["both", 1e-2] / errors["both", 1e-3] == pytest.approx(100, rel=0.1)
    assert errors["active", 1e-2] / errors["active", 1e-3] == pytest.approx(10, rel=0.1)
