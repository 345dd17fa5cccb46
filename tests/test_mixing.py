"""Robust mixing: against slow twins, whatever a neighbour sends, and in a run with a liar."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import tiny_job
from plait.config import Config
from plait.engines import simulate as engine
from plait.events import RoundDone
from plait.factors import AB, NONE, VALUE, A, B
from plait.lora import Layout, Site
from plait.methods import METHODS, Method, alternate, always, build_method
from plait.mixing import (
    AVERAGE,
    MIXES,
    average,
    build_mix,
    clipped_gossip,
    each_factor,
    each_site,
    mean,
    neighbour_weights,
    trimmed_mean,
)
from plait.topology import build_schedule

N, P = 6, 40
LAYOUT = Layout((Site("a", 4, 3), Site("b", 6, 7)), rank=2, scale=1.0)  # A and B have 20 each
EXAMPLES = [f"{name}:{row.example}" if row.example else name for name, row in MIXES.items()]


def states(seed=0, clients=N):
    return torch.randn(clients, P, generator=torch.Generator().manual_seed(seed))


def weights(topology="complete", clients=N):
    return neighbour_weights(build_schedule(Config(topology=topology, clients=clients))(0))


def mixed_by(mix, mine, heard, W):
    """What a mix makes of rows (m, P): A and B of `LAYOUT` side by side."""
    own, theirs = ({(VALUE, A): X[:, :20], (VALUE, B): X[:, 20:]} for X in (mine, heard))
    mixed = build_mix(mix).combine(LAYOUT, own, theirs, W)
    return torch.cat([mixed[VALUE, A], mixed[VALUE, B]], dim=1)


# -- slow twins: one client, one coordinate, one neighbour at a time


def twin_trimmed_mean(X, W, count):
    mixed = X.clone().double()
    for i in range(len(X)):
        heard = [j for j in range(len(X)) if W[i, j] > 0]
        for p in range(P):
            values = sorted(float(X[j, p]) for j in [i, *heard])
            inner = values[count : len(values) - count]
            for j in heard:
                if inner and inner[0] <= float(X[j, p]) <= inner[-1]:
                    mixed[i, p] += W[i, j] * (float(X[j, p]) - float(X[i, p]))
    return mixed


def twin_clipped_gossip(X, W, radius):
    mixed = X.clone().double()
    for i in range(len(X)):
        for j in range(len(X)):
            step = (X[j] - X[i]).double()
            norm = math.sqrt(sum(float(d) ** 2 for d in step))
            mixed[i] += W[i, j] * (step if norm <= radius else radius / norm * step)
    return mixed


@pytest.mark.parametrize("topology", ["complete", "ring", "star"])
@pytest.mark.parametrize("count", [1, 2])
def test_trimmed_mean_equals_its_twin(topology, count):
    X, W = states(), weights(topology)
    mixed = trimmed_mean(count)(X, X, W)
    torch.testing.assert_close(mixed.double(), twin_trimmed_mean(X, W, count), atol=1e-6, rtol=0)


@pytest.mark.parametrize("radius", [0.1, 8.5, 100.0])  # two clients are about 9 apart
def test_clipped_gossip_equals_its_twin(radius):
    X, W = states(), weights("ring")
    mixed = clipped_gossip(radius)(X, X, W)
    torch.testing.assert_close(mixed.double(), twin_clipped_gossip(X, W, radius), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mix", EXAMPLES)
def test_a_client_alone_gets_the_same_bits_as_in_a_stack(mix):
    X, W = states(), weights("ring")
    together = mixed_by(mix, X, X, W)
    for i in range(N):
        heard = np.flatnonzero(W[i])
        alone = mixed_by(mix, X[i : i + 1].clone(), X[heard].clone(), W[i : i + 1, heard])
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("mix", ["clipped-gossip:1e6", "clipped-product:1e6"])
def test_a_radius_that_nothing_reaches_is_averaging_to_the_bit(mix):
    X, W = states(), weights("ring")
    assert torch.equal(mixed_by(mix, X, X, W), average(X, X, W))


@pytest.mark.parametrize("mix", EXAMPLES)
def test_where_all_agree_or_nobody_is_heard_all_stays_as_it_is(mix):
    X, W = states(), weights()
    same = X[:1].repeat(N, 1)
    assert torch.equal(mixed_by(mix, same, same, W), same)
    assert torch.equal(mixed_by(mix, X, X, 0 * W), X)


# -- what holds whatever is sent

LIES = {
    "enormous": torch.full((P,), 3.4e38),
    "random": 1e3 * states(seed=1)[0],
    "just outside": states()[1:].max(dim=0).values + 1,
}


@pytest.mark.parametrize("lie", LIES)
def test_trimmed_mean_stays_within_the_honest_values(lie):
    X, W = states(), weights()
    X[0] = LIES[lie]
    mixed = trimmed_mean(1)(X, X, W)[1:]
    assert (mixed <= X[1:].max(dim=0).values + 1e-6).all()
    assert (mixed >= X[1:].min(dim=0).values - 1e-6).all()


def test_averaging_does_not():
    X, W = states(), weights()
    X[0] = LIES["enormous"]
    assert (average(X, X, W)[1:] > X[1:].max(dim=0).values).all()


@pytest.mark.parametrize("lie", LIES)
def test_clipped_gossip_lets_a_liar_move_nobody_far(lie):
    X, W = states(), weights()
    honest = clipped_gossip(0.5)(X, X, W)
    X[0] = LIES[lie]
    moved = (clipped_gossip(0.5)(X, X, W)[1:] - honest[1:]).norm(dim=1)
    assert (moved <= 2 * 0.5 * W[1:, 0].max() + 1e-5).all()


@pytest.mark.parametrize("mix", EXAMPLES)
@pytest.mark.parametrize("topology", ["ring", "star"])
def test_which_of_them_conserve_the_mean(mix, topology):
    X, W = states(), weights(topology)
    assert np.array_equal(W, W.T)
    moved = float((mean(mixed_by(mix, X, X, W)) - mean(X)).abs().max())
    if MIXES[mix.partition(":")[0]].conserves_mean:
        assert moved < 1e-6
    elif topology == "ring":
        assert moved > 1e-3


@pytest.mark.parametrize("mix", ["trimmed-mean", "trimmed-product"])
def test_with_too_few_neighbours_to_trim_a_client_keeps_its_state(mix):
    X, W = states(), weights("ring")
    assert torch.equal(mixed_by(f"{mix}:2", X, X, W), X)
    assert not torch.equal(mixed_by(f"{mix}:1", X, X, W), X)


# -- a run with a client that lies


def losses_of_the_honest(monkeypatch, mix, lie):
    """Client 0 sends lies in every round; the mean loss of the others in each round."""
    config = Config(
        clients=5, rounds=4, local_steps=4, batch_size=4, rank=2, lr=1e-2, mix=mix, eval_every=4,
        topology="complete", method="dec-lora",
    )  # fmt: skip
    job = tiny_job(config)
    stack = job.initial_stack()
    honest = engine.train_round

    def train_round(job, stack, round_, *rest):
        for value in stack.factors.values():
            value[0] = value[1]  # what the liar makes of it for itself is nobody's concern
        losses = honest(job, stack, round_, *rest)
        for value in stack.factors.values():
            value[0] = lie(value[1], round_)
        return losses

    monkeypatch.setattr(engine, "train_round", train_round)
    monkeypatch.setattr("plait.engines.steps.check_finite", lambda *_: None)
    rounds = [e for e in engine.simulate(job, stack) if isinstance(e, RoundDone)]
    return [float(np.mean(event.train_losses[1:])) for event in rounds]


def enormous(row, _round):
    return torch.full_like(row, 1e20)


def random(row, round_):
    return 100 * torch.randn(row.shape, generator=torch.Generator().manual_seed(round_))


@pytest.mark.parametrize("lie", [enormous, random])
@pytest.mark.parametrize("mix", EXAMPLES)
def test_honest_clients_learn_beside_a_liar_with_robust_mixing_only(monkeypatch, mix, lie):
    losses = losses_of_the_honest(monkeypatch, mix, lie)
    assert (losses[-1] < losses[0]) == (mix != "average"), losses


# -- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trimed-mean:1", "Did you mean trimmed-mean"),
        ("trimmed-product:x", "a whole number above 0, as in trimmed-product:1"),
        ("clipped-product:0", "a number above 0, as in clipped-product:0.5"),
        ("average:1", "write `average`"),
        ("clipped-gossip", "write `clipped-gossip:0.5`"),
        ("trimmed-mean:0", "a whole number above 0"),
        ("trimmed-mean:1.5", "a whole number above 0"),
        ("clipped-gossip:nan", "a number above 0"),
        ("clipped-gossip:inf", "a number above 0"),
        ("clipped-gossip:x", "a number above 0"),
    ],
)
def test_mixes_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        build_method(Config(mix=name))


def test_a_method_that_mixes_in_its_own_way_takes_no_other(monkeypatch):
    own = Method(summary="", train=build_method(Config()).train, share=build_method(Config()).share,
                 mix=always(each_factor(lambda mine, theirs, W: mine)))  # fmt: skip
    monkeypatch.setitem(METHODS, "own", lambda _: own)
    assert build_method(Config(method="own")) is own
    with pytest.raises(ValueError, match="leave out --mix"):
        build_method(Config(method="own", mix="trimmed-mean:1"))


# -- A and B of a layer together


def factors_of_sites(layout, clients=N):
    generator = torch.Generator().manual_seed(0)
    return {
        (kind, factor): torch.randn(clients, layout.size(factor), generator=generator)
        for kind in (VALUE, "m")
        for factor in (A, B)
    }


@pytest.mark.parametrize("topology", ["complete", "ring", "star"])
def test_a_rule_for_sites_that_averages_apart_is_averaging_to_the_bit(topology):
    layout = tiny_job(Config(clients=N, rank=2)).backbone.layout
    state, W = factors_of_sites(layout), weights(topology)
    apart = each_site(lambda mine, theirs, W: (average(mine[0], theirs[0], W),
                                               average(mine[1], theirs[1], W)))  # fmt: skip
    found, expected = (mix.combine(layout, state, state, W) for mix in (apart, AVERAGE))
    assert found.keys() == expected.keys() == state.keys()
    assert all(torch.equal(found[slot], expected[slot]) for slot in state)


def test_a_rule_for_sites_gets_the_two_of_each_layer():
    layout = tiny_job(Config(clients=N, rank=2)).backbone.layout
    state, W = factors_of_sites(layout), weights()
    own = {slot: value[:2] for slot, value in state.items()}
    seen = []

    def rule(mine, theirs, W):
        seen.append([tuple(one.shape) for one in (*mine, *theirs)])
        return torch.zeros_like(mine[0]), mine[1]

    found = each_site(rule).combine(layout, own, state, W[:2])
    assert seen == [
        [(2, 2, site.d_in), (2, site.d_out, 2), (N, 2, site.d_in), (N, site.d_out, 2)]
        for site in layout.sites
    ]
    assert not found[VALUE, A].any()
    assert torch.equal(found[VALUE, B], own[VALUE, B])
    for factor in (A, B):  # other slots are averaged
        assert torch.equal(found["m", factor], average(own["m", factor], state["m", factor], W[:2]))


def own_method(monkeypatch, **settings):
    given = {"summary": "", "train": always(AB), "share": always(AB)}
    monkeypatch.setitem(METHODS, "own", lambda _: Method(**(given | settings)))
    return build_method(Config(method="own", rounds=6))


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (always(B), "shares only B in round 0"),
        (alternate(B, A, every=2), "shares only B in round 0"),
        (alternate(AB, A, every=3), "shares only A in round 3"),
    ],
)
def test_what_mixes_together_must_travel_together(monkeypatch, share, message):
    mix = always(each_site(lambda mine, _theirs, _W: mine))
    with pytest.raises(ValueError, match=f"own mixes A and B together, and own {message}"):
        own_method(monkeypatch, share=share, mix=mix)
    own_method(monkeypatch, share=share)
    for fine in (always(AB), always(NONE), alternate(AB, NONE, every=1)):
        own_method(monkeypatch, share=fine, mix=mix)


def test_a_slot_that_nobody_keeps_is_not_shared(monkeypatch):
    own_method(monkeypatch, kinds=(VALUE, "m", "v"))
    with pytest.raises(ValueError, match=r"own shares slots that it doesn't keep: \['speed'\]"):
        own_method(monkeypatch, kinds=(VALUE, "speed"))


def test_the_default_is_plain_averaging():
    assert build_method(Config()).mix(0) is AVERAGE
