"""Every row of METHODS: against a twin in numpy, in all engines, and resumed."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from conftest import tiny_job, tiny_model
from fake_network import Hub, member, start_peer, together
from plait.adaptive_phases import epochs
from plait.config import Config, Machine
from plait.engines.job import prepare
from plait.engines.simulate import simulate
from plait.engines.steps import mix, train_round
from plait.events import RoundDone
from plait.factors import AB, BASE, BASE_A, BASE_B, NOTE, VALUE, A, B
from plait.methods import METHODS, build_method, walk
from plait.mixing import neighbour_weights
from plait.model.peft_adapters import save_adapters
from plait.peers.local_federation import average_adapters
from plait.privacy import seeded_noise
from plait.runs.run import Run
from plait.site_mixing import mean_client, slice_average
from plait.topology import build_schedule

CONFIG = Config(
    clients=4, rounds=3, local_steps=1, batch_size=2, rank=2, lr=1e-2, switch_every=2, p=0.5,
    optimizer_state="keep", eval_every=3,
)  # fmt: skip


def config_of(method, **others):
    return Config(**CONFIG.to_json() | {"method": method} | others)


# -- twins: a layer's A (N, r, d_in) and B (N, d_out, r), one client after another


def twin_average(X, W):
    return np.array([sum(W[i, j] * X[j] for j in range(len(X))) for i in range(len(X))])


def twin_factors(share):
    def twin(A, B, W, round_):
        shared = share(round_)
        return tuple(
            twin_average(X, W) if name in shared else X for name, X in (("A", A), ("B", B))
        )

    return twin


def twin_decaf(A, B, W, _round):
    mixed_A, mixed_B, rank = A.copy(), B.copy(), A.shape[1]
    for i in range(len(A)):
        if W[i, i] == 1:
            continue
        U, S, Vt = np.linalg.svd(sum(W[i, j] * B[j] @ A[j] for j in range(len(A))))
        for k in range(rank):
            sign = np.sign(U[np.abs(U[:, k]).argmax(), k])
            mixed_B[i, :, k], mixed_A[i, k] = (
                sign * S[k] ** 0.5 * U[:, k],
                sign * S[k] ** 0.5 * Vt[k],
            )
    return mixed_A, mixed_B


def twin_hetlora(A, B, W, _round):
    norms = np.array([np.linalg.norm(b @ a) for a, b in zip(A, B, strict=True)])
    weights = W * norms / (W @ norms)[:, None]
    return twin_average(A, weights), twin_average(B, weights)


def twin_fedrot(A, B, W, round_):
    mixed_A, mixed_B = np.zeros_like(A), np.zeros_like(B)
    for i, j in itertools.product(range(len(A)), repeat=2):
        M = A[i] @ A[j].T if round_ % 2 else B[i].T @ B[j]
        U, _, Vt = np.linalg.svd(M)
        D = np.diag([1.0] * (len(M) - 1) + [np.linalg.det(Vt.T @ U.T)])
        R = Vt.T @ D @ U.T if i != j else np.eye(len(M))
        mixed_A[i] += W[i, j] * R.T @ A[j]
        mixed_B[i] += W[i, j] * B[j] @ R
    return mixed_A, mixed_B


def twin_flora(A, B, W, _round):
    return None, np.zeros_like(B)  # what A is: test_flora_starts_again_with_the_same_a_everywhere


TWINS = {
    "flora": twin_flora,
    "ffa": twin_factors(lambda _: "B"),
    "rolora": twin_factors(lambda round_: "BA"[round_ % 2]),
    "fedsa": twin_factors(lambda _: "A"),
    "local": twin_factors(lambda _: ""),
    "decaf": twin_decaf,
    "flexlora": twin_decaf,
    "fedrot": twin_fedrot,
    "hetlora": twin_hetlora,
}
"""Those of the others average both factors."""


@cache
def job_of(method, **others):
    return tiny_job(config_of(method, **others))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=10, deadline=None)
@given(
    st.integers(2, 5), st.integers(0, 10**6), st.integers(0, 2), st.sampled_from([0.3, 0.7, 1.0])
)
def test_mixing_equals_its_twin(method, clients, seed, round_, p):
    job, layout = job_of(method), job_of(method).backbone.layout
    config = config_of(method, clients=clients, seed=seed, p=p, rounds=4)
    W = build_method(config).meets(config)(round_)
    generator = torch.Generator().manual_seed(seed)
    state = {
        slot: torch.randn(clients, layout.size(slot[1]), generator=generator)
        for slot in job.initial_stack([0]).state
    }
    mixed = state | mix(job, state, state, neighbour_weights(W), round_, range(clients))
    before, after = (
        [{f: x.double().numpy() for f, x in layout.views(which, one[VALUE, which]).items()}
         for which in (A, B)] for one in (state, mixed)
    )  # fmt: skip
    twin = TWINS.get(method, twin_factors(lambda _: "AB"))
    for site in layout.sites:
        expected = twin(before[0][site.name], before[1][site.name], W, round_)
        for found, one in zip(after, expected, strict=True):
            if one is None:
                continue
            np.testing.assert_allclose(
                found[site.name], one, rtol=0, atol=1e-6 * max(1, abs(one).max())
            )


def test_a_direction_is_averaged_over_those_that_have_it():
    """raFLoRA with ranks 3, 1 and 2: a numpy twin with masks."""
    rng, ranks = np.random.default_rng(0), [3, 1, 2]
    A, B = rng.normal(size=(3, 3, 5)), rng.normal(size=(3, 4, 3))
    for k, rank in enumerate(ranks):
        A[k, rank:], B[k, :, rank:] = 0, 0
    W = build_schedule(Config(topology="ring", clients=3))(0)
    found = slice_average(*[(torch.tensor(A), torch.tensor(B))] * 2, neighbour_weights(W))
    for i, direction in itertools.product(range(3), range(3)):
        own = A[i, direction], B[i, :, direction]
        for k, value in enumerate((found[0][i, direction], found[1][i, :, direction])):
            other = [(A[j, direction], B[j, :, direction])[k] for j in range(3)]
            expected = own[k] + sum(
                W[i, j] * (other[j] - own[k]) for j in range(3) if direction < ranks[j]
            )
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)


# -- engines


def rounds_of(events):
    return [event for event in events if isinstance(event, RoundDone)]


@pytest.mark.parametrize("topology", ["ring", "pairs"])
@pytest.mark.parametrize("method", METHODS)
def test_all_engines_agree_bit_for_bit(method, topology):
    all_agree(config_of(method, topology=topology))


ONE_RANK = ("adf-adaptive", "fedrot", "fedex", "rw-lora", "tracking", "adf-tracking")


@pytest.mark.parametrize("method", METHODS)
def test_so_they_do_with_clients_of_different_rank(method):
    config = config_of(method, topology="pairs", rank=4, ranks="2,1,4")
    if method in ONE_RANK:
        with pytest.raises(ValueError, match="needs clients of one rank"):
            tiny_job(config)
    else:
        all_agree(config)


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
@pytest.mark.parametrize("method", ["adf", "decaf", "tracking", "local"])
def test_so_they_do_on_messages_of_fewer_bits(method, wire):
    all_agree(config_of(method, topology="pairs", wire=wire))


def test_so_they_do_on_messages_of_fewer_bits_and_ranks():
    all_agree(config_of("adf", topology="pairs", rank=4, ranks="2,1,4", wire="int8"))


def all_agree(config, **how):
    job = tiny_job(config)
    stack = job.initial_stack()
    whole = rounds_of(simulate(job, stack))
    hub, members = Hub(), [member(f"p{k}") for k in range(config.clients)]
    peers = [start_peer(hub, k, config, members, **how) for k in range(config.clients)]
    said = [rounds_of(events) for events in together(peers, config.rounds)]
    assert_same_state(stack, peers)
    for event, *parts in zip(whole, *said, strict=True):
        assert {part.shared for part in parts} == {event.shared}
        assert sum(part.sent_bytes for part in parts) == event.sent_bytes
        assert event.sent_bytes == job.sent_bytes(event.round, event.edges)
    if config.topology == "pairs" and importlib.util.find_spec("ray"):
        from fake_cluster import blocks_of, rounds_of_blocks

        blocks = blocks_of(config, 2)
        of_blocks = list(rounds_of_blocks(blocks))
        assert [event.sent_bytes for event in of_blocks] == [event.sent_bytes for event in whole]
        assert_same_state(stack, blocks)


def assert_same_state(expected, parts):
    for slot, value in expected.state.items():
        assert torch.equal(value, torch.cat([part.stack.state[slot] for part in parts])), slot


@pytest.mark.parametrize("private", [{}, {"dp_clip": 0.02, "dp_noise": 0.5}])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on(monkeypatch, tmp_path, method, private):
    monkeypatch.setattr("plait.runs.run.prepare", tiny_job)
    monkeypatch.setattr("plait.engines.simulate.save_adapters", lambda *_: None)
    config = config_of(method, topology="ring", **private)
    list(Run(config, tmp_path / "whole"))
    list(itertools.islice(Run(config, tmp_path / "run", machine=Machine(save_every=1)), 4))
    list(Run(config, tmp_path / "run", resume=True))
    whole, found = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "run")
    )
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


# -- gradient tracking


@pytest.mark.parametrize(
    ("method", "trains"), [("tracking", "AB AB AB"), ("adf-tracking", "B B A")]
)
def test_tracking_is_its_definition(method, trains):
    job = tiny_job(config_of(method, topology="ring"))
    stack, rng = job.initial_stack(), np.random.default_rng(0)
    x = {f: value.double().numpy() for f, value in stack.factors.items()}
    y = {f: np.zeros_like(value) for f, value in x.items()}
    u = {f: np.zeros_like(value) for f, value in x.items()}

    def phase(_job, stack, round_, _clients, _turns):
        for factor in (A, B):
            if factor.name in trains.split()[round_]:
                step = 0.1 * rng.normal(size=x[factor].shape)
                stack.state[VALUE, factor] = (
                    stack.state[VALUE, factor] + torch.from_numpy(step).float()
                )
                # c = y - u, and x + u + c and c + u are what is averaged
                c, u[factor] = y[factor] - u[factor], step
                x[factor], y[factor] = x[factor] + step + c, c + step
        return np.zeros(CONFIG.clients)

    for round_ in range(CONFIG.rounds):
        train_round(job, stack, round_, range(CONFIG.clients), seeded_noise(0), phase)
        W = job.schedule(round_)
        stack.state |= mix(
            job, stack.state, stack.state, neighbour_weights(W), round_, range(job.config.clients)
        )
        for factor in (A, B):
            x[factor], y[factor] = W @ x[factor], W @ y[factor]
            found = [stack.state[kind, factor].numpy() for kind in (VALUE, "tracked", "update")]
            for one, expected in zip(found, (x[factor], y[factor], u[factor]), strict=True):
                np.testing.assert_allclose(one, expected, rtol=0, atol=1e-6)
            np.testing.assert_allclose((found[1] - found[2]).mean(axis=0), 0, atol=1e-6)


@pytest.mark.parametrize(("method", "plain"), [("tracking", "dec-lora"), ("adf-tracking", "adf")])
@pytest.mark.parametrize("topology", ["complete", "ring"])
def test_tracking_is_plain_averaging_on_the_complete_graph(method, plain, topology):
    stacks = []
    for one in (method, plain):
        job = tiny_job(
            config_of(one, topology=topology, rounds=4, optimizer_state="reset_each_round")
        )
        stacks.append(job.initial_stack())
        list(simulate(job, stacks[-1]))
    far = max(float((stacks[0].factors[f] - stacks[1].factors[f]).abs().max()) for f in (A, B))
    assert far < 1e-5 if topology == "complete" else far > 1e-4


def test_privacy_covers_what_is_tracked():
    job = tiny_job(config_of("tracking", topology="ring", dp_clip=0.02, dp_noise=0.5))
    stack = job.initial_stack()
    start = {f: value.clone() for f, value in stack.factors.items()}
    silence = lambda _client, _round, change: np.zeros_like(change)  # noqa: E731
    for round_ in range(2):
        before = {f: stack.state["tracked", f] - stack.state["update", f] for f in (A, B)}
        train_round(job, stack, round_, range(4), silence)
        updates = torch.cat([stack.state["update", f] for f in (A, B)], dim=1)
        torch.testing.assert_close(updates.norm(dim=1), torch.full((4,), 0.02), rtol=1e-4, atol=0)
        for f in (A, B):
            sent = stack.state["update", f] + before[f]
            torch.testing.assert_close(stack.state["tracked", f], sent, rtol=0, atol=1e-7)
            torch.testing.assert_close(stack.factors[f], start[f] + sent, rtol=0, atol=1e-7)
        start = {f: value.clone() for f, value in stack.factors.items()}


# -- turns within a round


def test_by_turns_with_one_step_a_round_is_adf_that_switches_each_round():
    stacks = []
    for method in ("la-lora", "adf"):
        job = tiny_job(config_of(method, topology="ring", switch_every=1))
        stacks.append(job.initial_stack())
        rounds = rounds_of(simulate(job, stacks[-1]))
        assert [event.active for event in rounds] == ["B", "A", "B"]
    assert all(torch.equal(value, stacks[1].state[slot]) for slot, value in stacks[0].state.items())
    assert [steps_of(stack) for stack in stacks] == [{A: [1] * 4, B: [2] * 4}] * 2


def test_by_turns_is_one_step_of_one_factor_after_another():
    whole, single = (tiny_job(config_of("la-lora", local_steps=k, clip_norm=0.1)) for k in (5, 1))
    stacks = [job.initial_stack() for job in (whole, single)]
    assert whole.turns(1) == [A, B, A, B, A]
    for round_ in range(2):
        train_round(whole, stacks[0], round_, range(4), seeded_noise(0))
    for step in range(10):
        train_round(single, stacks[1], step, range(4), seeded_noise(0))
    assert all(torch.equal(value, stacks[1].state[slot]) for slot, value in stacks[0].state.items())
    assert [steps_of(stack) for stack in stacks] == [{A: [5] * 4, B: [5] * 4}] * 2


# -- a walk


def test_a_walk_goes_along_edges_and_comes_to_all_as_often():
    holders = walk(Config(topology="star", clients=4, rounds=2000))
    assert all(a == b or 0 in (a, b) for a, b in itertools.pairwise(holders))
    np.testing.assert_allclose(np.bincount(holders) / len(holders), 0.25, atol=0.08)


def test_a_walk_is_one_clients_steps_after_anothers():
    settings = {"rounds": 6, "head": "mixed", "optimizer_state": "reset_each_round"}
    job = tiny_job(config_of("rw-lora", topology="ring", **settings))
    stack, alone, holders = job.initial_stack(), job.initial_stack([0]), walk(job.config)
    assert len(set(holders)) > 1
    for event in simulate(job, stack):
        if not isinstance(event, RoundDone):
            continue
        holder, following = holders[event.round : event.round + 2]
        losses = train_round(job, alone, event.round, [holder], seeded_noise(0))
        assert event.train_losses[holder] == losses[0]
        assert np.isnan(event.train_losses).sum() == 3
        assert event.edges == [(following, holder, 1.0)] * (following != holder)
        for factor, value in alone.factors.items():
            assert torch.equal(value[0], stack.factors[factor][following])


def test_who_takes_the_model_takes_nothing_of_its_own_old_copy():
    job = tiny_job(config_of("rw-lora", topology="ring", wire="int8"))
    state = random_state_of(job)
    W = np.zeros((4, 4))
    W[2, 1] = 1
    mixed = mix(job, state, state, W, 0, range(4))
    for value in mixed.values():
        assert torch.equal(value[2], value[1])


def random_state_of(job):
    layout, generator = job.backbone.layout, torch.Generator().manual_seed(0)
    return {(VALUE, f): torch.randn(4, layout.size(f), generator=generator) for f in (A, B)}


def test_peers_that_rest_wait_for_the_model_where_it_comes_next():
    all_agree(config_of("rw-lora", topology="ring", rounds=12), keep_rounds=12)


# -- clocks apart


def steps_of(stack):
    return {factor: steps.tolist() for factor, steps in stack.steps.items()}


@pytest.mark.parametrize("private", [{}, {"dp_clip": 0.02, "dp_noise": 0.5}])
def test_without_a_common_clock_each_trains_the_factor_of_its_own(private):
    job = tiny_job(config_of("adf-offset", rounds=5, **private))
    stack = job.initial_stack()
    stack.state[VALUE, B] += 0.1  # where B is zero A has no gradient
    for round_ in range(5):
        before = {slot: value.clone() for slot, value in stack.state.items()}
        train_round(job, stack, round_, range(4), seeded_noise(0))
        for client, slot in itertools.product(range(4), before):
            moved = not torch.equal(before[slot][client], stack.state[slot][client])
            assert moved == (slot[1].name == "BBAA"[(round_ + client) % 4])
    assert steps_of(stack) == {A: [2, 2, 3, 3], B: [3, 3, 2, 2]}


@pytest.mark.parametrize(
    "settings",
    [{"optimizer_state": "reset_each_phase"}, {"dp_clip": 0.02, "dp_noise": 0.5, "ranks": "2,1"}],
)
def test_all_engines_agree_on_clocks_apart(settings):
    all_agree(config_of("adf-offset", topology="pairs", rounds=5, **settings))


# -- phases that end by agreement


ADAPTIVE = {"rounds": 14, "clients": 4, "switch_below": 0.5, "lr": 1e-2}


@pytest.mark.parametrize(("topology", "below"), [("ring", 0.05), ("pairs", 0.5), ("complete", 0.5)])
def test_all_change_the_phase_in_the_round_that_one_who_knows_all_would_choose(topology, below):
    job = tiny_job(
        config_of("adf-adaptive", topology=topology, **ADAPTIVE | {"switch_below": below})
    )
    stack, clock, spread, seen = job.initial_stack(), 0, 0.0, set()
    for epoch, round_ in ((one, round_) for one in epochs(job.config) for round_ in one):
        start = {f: value.clone() for f, value in stack.factors.items()}
        train_round(job, stack, round_, range(4), seeded_noise(0))
        active, frozen = (B, A) if clock % 2 == 0 else (A, B)
        assert torch.equal(stack.factors[frozen], start[frozen])
        assert not torch.equal(stack.factors[active], start[active])
        before, W = dict(stack.factors), job.schedule(round_)
        stack.state |= mix(job, stack.state, stack.state, neighbour_weights(W), round_, range(4))
        if round_ == epoch.start:
            moved = {f: (stack.factors[f] - before[f]).double().norm(dim=1) for f in (A, B)}
            spread = float((moved[frozen] / moved[active]).nan_to_num(0).max())
        if round_ == epoch[-1] and epoch != epochs(job.config)[-1] and spread < below:
            clock += 1
        if round_ != job.config.rounds - 1:
            assert stack.factors[NOTE][:, 0].tolist() == [clock] * 4
        seen.add(spread < below)
    assert clock >= 2
    assert False in seen or topology == "complete"


@pytest.mark.parametrize("topology", ["ring", "pairs"])
def test_engines_agree_on_when_a_phase_ends(topology):
    config = config_of("adf-adaptive", topology=topology, **ADAPTIVE)
    all_agree(config)
    job = tiny_job(config)
    phases = [event.active for event in rounds_of(simulate(job, job.initial_stack()))]
    assert {*phases} == {"A", "B"}


@pytest.mark.parametrize("method", ["adf-adaptive", "fedex"])
def test_what_no_optimizer_changes_can_be_adopted(method):
    """A peer that takes another's state starts its optimizer anew, for all factors that came."""
    stack = job_of(method).initial_stack()
    for factor in stack.factors:
        stack.reset(factor)
    assert stack.steps.keys() == {A, B}


def test_a_liars_note_is_cut_down_to_what_an_honest_one_may_say():
    job = job_of("adf-adaptive", topology="ring", **ADAPTIVE)
    state = {(VALUE, f): torch.zeros(4, job.backbone.layout.size(f)) for f in (A, B, NOTE)}
    state[VALUE, NOTE][1] = torch.tensor([1e30, 1e30])
    W = neighbour_weights(job.schedule(0))
    round_ = epochs(job.config)[2].start + 1
    found = mix(job, state, state, W, round_, range(4))[VALUE, NOTE]
    assert found[0].tolist() == [2, 1e6]
    assert found[3].tolist() == [0, 0]


def test_an_epoch_lasts_until_all_have_heard_of_all():
    for config in (Config(topology="ring", clients=7), Config(topology="pairs", rounds=60)):
        for epoch in epochs(config)[:-1]:
            later = [build_schedule(config)(t) > 0 for t in epoch][1:]
            whole, shorter = (
                functools.reduce(
                    lambda heard, W: W @ heard, some, np.eye(config.clients, dtype=bool)
                )
                for some in (later, later[:-1])
            )
            assert whole.all()
            assert not shorter.all()


@pytest.mark.parametrize(
    "settings",
    [{"wire": "int8"}, {"optimizer_state": "reset_each_phase"}, {"mix": "trimmed-mean:1"}],
)
def test_what_does_not_go_with_agreed_phases_is_refused(settings):
    with pytest.raises(ValueError, match=r"--wire float32|leave out --mix"):
        tiny_job(config_of("adf-adaptive", **settings))


# -- what is added to the frozen weights


WITH_BASE = [method for method in METHODS if build_method(config_of(method)).base_rank]


def added(layout, state, a=A, b=B):
    """Layer -> (N, d_out, d_in) B A."""
    views = [layout.views(f, state[VALUE, f].double()) for f in (a, b)]
    return {name: views[1][name] @ x for name, x in views[0].items()}


def random_state(job, clients, seed):
    generator, layout = torch.Generator().manual_seed(seed), job.backbone.layout
    return {
        (VALUE, f): torch.randn(clients, layout.size(f), generator=generator) for f in (*AB, *BASE)
    }


@pytest.mark.parametrize("change", ["mixed", "local"])
@pytest.mark.parametrize("method", WITH_BASE)
@settings(max_examples=10, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10**6), st.sampled_from([0.3, 0.7, 1.0]))
def test_the_mean_of_what_is_added_is_kept(method, change, clients, seed, p):
    """A twin in numpy, with full matrices; the rank is that of these."""
    job = job_of(method, base_change=change)
    layout = job.backbone.layout
    W = build_schedule(config_of(method, clients=clients, seed=seed, p=p))(0)
    state = random_state(job, clients, seed)
    mixed = mix(job, state, state, neighbour_weights(W), 0, range(clients))
    before, base = added(layout, state), added(layout, state, BASE_A, BASE_B)
    after, base_after = added(layout, mixed), added(layout, mixed, BASE_A, BASE_B)
    for name in before:
        whole = before[name] + base[name] if change == "mixed" else before[name]
        expected = np.einsum("ij,jab->iab", W, whole) + (change == "local") * base[name].numpy()
        found = (after[name] + base_after[name]).numpy()
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_flora_starts_again_with_the_same_a_everywhere():
    job = job_of("flora")
    state = random_state(job, 4, 0)
    found = [mix(job, state, state, np.zeros((4, 4)), k, range(4))[VALUE, A] for k in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[0][:1].repeat(4, 1))
    fresh, layout = job.initial_stack().factors[A], job.backbone.layout
    assert not torch.equal(found[0], fresh)
    for view, first in zip(
        layout.views(A, found[0]).values(), layout.views(A, fresh).values(), strict=True
    ):
        assert 0.5 * first.std() < view.std() < 2 * first.std()


def test_who_hears_nobody_keeps_its_base_of_fedex():
    job, state = job_of("fedex"), random_state(job_of("fedex"), 3, 0)
    W = neighbour_weights(np.array([[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]))
    mixed = mix(job, state, state, W, 0, range(3))
    for slot, value in state.items():
        assert torch.equal(mixed[slot][0], value[0])
        assert not torch.equal(mixed[slot][1], value[1])


def test_what_is_cut_off_is_the_mixing_error():
    errors = []
    for rank in (1, 16):
        job = tiny_job(config_of("fedex", topology="ring", base_rank=rank, rounds=2))
        last = rounds_of(simulate(job, job.initial_stack()))[-1]
        errors.append(sum(layer.mixing_error for layer in last.after))
    assert errors[0] > 1e-6
    assert errors[1] < 1e-3 * errors[0]


def test_its_bytes_are_those_of_a_larger_rank():
    plain, mixed, local = (
        job_of("dec-lora"), job_of("fedex", base_rank=6), job_of("fedex", base_change="local")
    )  # fmt: skip
    one = plain.message_bytes(0, 0)
    assert (mixed.message_bytes(0, 0), local.message_bytes(0, 0)) == (4 * one, one)


@pytest.mark.parametrize("method", WITH_BASE)
def test_a_base_of_ones_own_is_the_same_in_all_engines(method):
    all_agree(config_of(method, topology="ring", base_change="local"))


@pytest.mark.parametrize("method", WITH_BASE)
def test_dropout_is_refused_where_the_model_changes(method):
    with pytest.raises(ValueError, match="leave out --lora-dropout"):
        tiny_job(config_of(method, lora_dropout=0.1))


@cache
def trained_job(method, others):
    job = tiny_job(config_of(method, **{"topology": "ring", "base_rank": 3} | dict(others)))
    stack = job.initial_stack()
    list(simulate(job, stack))
    return job, stack


of_other_ranks = pytest.mark.parametrize(
    ("method", "others"),
    [
        ("fedex", ()),
        ("flora", (("ranks", "2,4"), ("topology", "pairs"))),
        ("adf", (("ranks", "4,1"),)),
    ],
)


@of_other_ranks
def test_peft_loads_what_was_trained(tmp_path, method, others):
    """Each client's adapter has its own rank, and with it what was added to the model."""
    job, stack = trained_job(method, others)
    save_adapters(job.backbone, stack, job.config, tmp_path)
    averaged = mean_client(job.backbone.layout, stack.factors)
    rows = {f"client-{k}": {f: x[k : k + 1] for f, x in stack.factors.items()} for k in range(4)}
    for name, factors in (rows | {"mean": averaged}).items():
        model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / name).eval()
        (settings,) = model.peft_config.values()
        rank = job.config.rank_of(int(name[-1])) if name[-1].isdigit() else job.config.rank
        assert settings.r == rank + (0 if method == "adf" else 3)
        batch = job.backbone.batch(job.held_out, np.arange(6)[None])
        with torch.no_grad():
            found = job.backbone.logits(batch, factors)
            for k, expected in enumerate(found):
                ids = torch.tensor(job.held_out.take(np.array([k])).ids[None], dtype=torch.long)
                logits = model(input_ids=ids).logits[0]
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@of_other_ranks
def test_the_mean_of_adapters_in_files_is_that_of_the_clients(tmp_path, method, others):
    job, stack = trained_job(method, others)
    save_adapters(job.backbone, stack, job.config, tmp_path)
    shutil.move(tmp_path / "mean", tmp_path / "expected")
    average_adapters(tmp_path, job.config)
    models = [
        PeftModel.from_pretrained(tiny_model("bert"), tmp_path / name).eval().merge_and_unload()
        for name in ("mean", "expected")
    ]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_fedex_on_the_complete_graph_is_the_mean_of_all_models():
    """Ten rounds on the embedded model, with a rank for what each adds: (N - 1) r."""
    job = prepare(
        Config(
            task="trec", method="fedex", topology="complete", clients=3, rounds=10, local_steps=1,
            batch_size=2, rank=2, base_rank=40, top_layers=1, client_size=8, lr=1e-2, eval_every=10,
            eval_rows=8,
        ),
        Machine(cache_gib=0),
    )  # fmt: skip
    stack, layout = job.initial_stack(), job.backbone.layout
    for round_ in range(10):
        train_round(job, stack, round_, range(3), seeded_noise(0))
        before = all_added(layout, stack.state)
        W = neighbour_weights(job.schedule(round_))
        stack.state |= mix(job, stack.state, stack.state, W, round_, range(3))
        after = all_added(layout, stack.state)
        for name, each in before.items():
            expected = each.mean(dim=0, keepdim=True)
            assert (after[name] - expected).abs().max() <= 1e-5 * expected.abs().max()
    base = max(added(layout, stack.state, BASE_A, BASE_B).values(), key=torch.linalg.norm)
    assert base.norm() > 1e-3 * torch.cat(list(after.values()), dim=1).norm()


def all_added(layout, state):
    base = added(layout, state, BASE_A, BASE_B)
    return {name: one + base[name] for name, one in added(layout, state).items()}
