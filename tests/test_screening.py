"""Mixes that judge neighbours by B A as well: against factors poisoned apart, whatever is sent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from plait.config import Config
from plait.factors import VALUE, A, B, Factor
from plait.lora import Layout, Site
from plait.methods import build_method
from plait.mixing import average, build_mix, neighbour_weights
from plait.screening import clipped_product, trimmed_product
from plait.topology import build_schedule

LAYOUT = Layout((Site("a", 5, 9), Site("b", 8, 6)), rank=3, scale=1.0, head=(("w", (2, 4)),))


def states(clients=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        (VALUE, factor): torch.randn(clients, LAYOUT.size(factor), generator=generator)
        for factor in (A, B, Factor.HEAD)
    }


def complete(clients=6):
    return neighbour_weights(build_schedule(Config(topology="complete", clients=clients))(0))


def products(state):
    """(n, all layers) float64, each client's B A laid out in full."""
    sites = LAYOUT.by_site({slot: value.double() for slot, value in state.items()})
    return torch.cat([(b @ a).flatten(1) for a, b in sites], dim=1)


def mixed_by(mix, state, W):
    return build_mix(mix).combine(LAYOUT, state, state, W)


# -- factors poisoned apart


def one_product_split_in_two(splits):
    """Clients with A c and B / c for each c; last a liar, the A of one and the B of another."""
    one = states(1, seed=3)
    c = torch.tensor([[s] for s in splits])
    state = {(VALUE, A): one[VALUE, A] * c, (VALUE, B): one[VALUE, B] / c}
    largest, smallest = splits.index(max(splits)), splits.index(min(splits))
    return {
        slot: torch.cat([value, value[k : k + 1]])
        for (slot, value), k in zip(state.items(), (largest, smallest), strict=True)
    }


@pytest.mark.parametrize(
    ("mix", "stands"),
    [
        ("trimmed-mean:1", False),
        ("clipped-gossip:10", False),
        ("trimmed-product:1", True),
        ("clipped-product:10", True),
    ],
)
def test_a_liar_with_factors_of_two_honest_ones_deceives_who_judges_each_apart(mix, stands):
    state, W = one_product_split_in_two([1.0, 1.0, 2.0, 0.5]), complete(5)
    true = products(state)[0]
    torch.testing.assert_close(products(state)[:4], true.expand(4, -1), rtol=0, atol=1e-5)
    assert (products(state)[4] - 4 * true).norm() < 1e-5, "the liar's is four times as large"
    honest = {slot: torch.cat([value[:4], value[:1]]) for slot, value in state.items()}
    led, alone = (products(mixed_by(mix, one, W))[0] for one in (state, honest))
    moved = float((led - alone).norm() / true.norm())
    assert moved < 0.1 if stands else moved > 0.4, moved


# -- what holds whatever is sent


def lies():
    """What a client of `states` may meet: its own product in other factors is among it."""
    own, other = ({slot: x[k : k + 1] for slot, x in states().items()} for k in (0, 1))
    enormous = {slot: torch.full_like(value, 3e38) for slot, value in own.items()}
    unlike = zip(own, (1e4, 1e-4, 1), strict=True)
    return {
        "honest": other,
        "enormous": enormous,
        "random": {slot: 1e3 * value for slot, value in other.items()},
        "one's own product": {slot: c * own[slot] for slot, c in unlike},
        "its head": own | {(VALUE, Factor.HEAD): enormous[VALUE, Factor.HEAD]},
        "A alone": own | {(VALUE, A): enormous[VALUE, A]},
        "less than nothing": own | {(VALUE, B): -own[VALUE, B]},
    }  # fmt: skip


@pytest.mark.parametrize("start", ["trained", "B is zero"])
@pytest.mark.parametrize("lie", lies())
def test_clipped_a_neighbour_moves_factors_head_and_product_by_its_weight_times_the_radius(
    lie, start
):
    own, radius, weight = {slot: x[:1] for slot, x in states().items()}, 0.5, 0.4
    if start == "B is zero":
        own[VALUE, B] = 0 * own[VALUE, B]
    screened = build_mix(f"clipped-product:{radius}")
    mixed = screened.combine(LAYOUT, own, lies()[lie], np.array([[weight]]))
    moved = [float((mixed[slot] - own[slot]).norm()) for slot in own]
    moved.append(float((products(mixed) - products(own)).norm()))
    assert max(moved) <= weight * radius * (1 + 1e-4)


def test_clipped_by_what_moves_most_on_the_way():
    state, W = states(), complete()
    taken = clipped_product(3.0)(LAYOUT, state, state, W)
    np.testing.assert_allclose(taken, taken.T, rtol=1e-9)
    for i, j in zip(*np.nonzero(W), strict=True):
        own, step = (
            {slot: x[i].double()[None] for slot, x in state.items()},
            {slot: (x[j].double() - x[i].double())[None] for slot, x in state.items()},
        )
        far = [float(x.norm()) for x in step.values()]
        for t in (0, 1):  # the derivative of the product, by central differences: it is quadratic
            there = [products({s: own[s] + (t + d) * step[s] for s in own}) for d in (-0.5, 0.5)]
            far.append(float((there[1] - there[0]).norm()))
        assert taken[i, j] == pytest.approx(W[i, j] * min(1, 3.0 / max(far)), rel=1e-9)


@pytest.mark.parametrize("lie", lies())
@pytest.mark.parametrize("count", [1, 2])
def test_trimmed_whoever_is_kept_is_as_near_to_an_honest_one_as_these_are(lie, count):
    state = states()
    for slot, value in state.items():
        value[-count:] = lies()[lie][slot]
    taken = trimmed_product(count)(LAYOUT, state, state, complete())
    honest = 6 - count
    for X in (*(x.double() for x in state.values()), products(state)):
        far = torch.linalg.vector_norm(X[:, None] - X, dim=-1)
        widest = far[:honest, :honest].max()
        for i in range(honest):
            assert all(far[j, :honest].min() <= widest * (1 + 1e-9) for j in taken[i].nonzero()[0])


def twin_trimmed_product(state, W, count):
    """One client, one view of all, one other at a time, with products in full."""
    taken = W.copy()
    for i in range(len(W)):
        heard = [j for j in range(len(W)) if W[i, j] > 0]
        for X in (*(x.double() for x in state.values()), products(state)):
            scores = {}
            for j in heard:
                apart = sorted(math.dist(X[j], X[k]) for k in {i, *heard} - {j})
                scores[j] = apart[len(apart) - 1 - count]
            limit = sorted(scores.values())[len(heard) - 1 - count]
            taken[i, [j for j in heard if scores[j] > limit]] = 0
    return taken


@pytest.mark.parametrize("topology", ["complete", "exponential"])
@pytest.mark.parametrize("count", [1, 2])
def test_trimmed_equals_its_twin(topology, count):
    state = states(9)
    W = neighbour_weights(build_schedule(Config(topology=topology, clients=9))(0))
    taken = trimmed_product(count)(LAYOUT, state, state, W)
    np.testing.assert_array_equal(taken, twin_trimmed_product(state, W, count))
    assert (taken > 0).any()


def test_where_a_factor_is_equal_everywhere_it_costs_nobody_a_neighbour():
    state, W = states(), complete()
    state[VALUE, A] = state[VALUE, A][:1].repeat(6, 1)
    state[VALUE, Factor.HEAD] = state[VALUE, Factor.HEAD][:1].repeat(6, 1)
    state[VALUE, B] = state[VALUE, B][:1] * torch.arange(6.0)[:, None]
    taken = trimmed_product(1)(LAYOUT, state, state, W)
    assert np.count_nonzero(taken[2]) == 4  # all but the last


def test_what_is_not_taken_stays_with_the_receiver():
    state, W = states(), complete()
    mixed = mixed_by("trimmed-product:1", state, W)
    taken = trimmed_product(1)(LAYOUT, state, state, W)
    assert (np.count_nonzero(taken, axis=1) < 5).all()
    for slot, value in state.items():
        assert torch.equal(mixed[slot], average(value, value, taken))


# -- with which methods


@pytest.mark.parametrize("mix", ["trimmed-product:1", "clipped-product:0.5"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ffa"}, "and ffa shares only B in round 0: take a method that shares both"),
        ({"method": "rolora"}, "and rolora shares only B in round 0"),
        ({"method": "fedsa"}, "and fedsa shares only A in round 0"),
        ({"frozen_every": 0}, "adf shares only B in round 0: .* or --frozen-every 1"),
        ({"method": "decaf"}, "mixes in a way of its own"),
        ({"ranks": "4,8"}, "needs clients of one rank"),
    ],
)
def test_both_factors_of_one_rank_must_be_there_to_be_judged(mix, settings, message):
    with pytest.raises(ValueError, match=message):
        build_method(Config(mix=mix, **settings))
    build_method(Config(mix=mix))
