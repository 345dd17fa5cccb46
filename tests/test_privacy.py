"""Differential privacy: what is clipped, what noise is added, what it amounts to, who knows it."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq

from conftest import tiny_job
from fake_network import Hub, member, start_peer, together
from plait.config import Config, Machine
from plait.engines.job import Rules
from plait.engines.steps import train_round
from plait.events import Evaluated, RoundDone
from plait.factors import VALUE, Factor
from plait.figures import summarize
from plait.methods import METHODS, Method, always
from plait.peers.process import KEY_BYTES, noise_of
from plait.privacy import clipped, epsilon, privatise, secret_noise, seeded_noise
from plait.runs.run import Run
from plait.runs.run_folder import RunFolder, load_summary

CLIP, NOISE = 0.02, 0.5
SETTINGS = {
    "clients": 3, "rounds": 4, "local_steps": 1, "batch_size": 2, "rank": 2, "switch_every": 2,
    "lr": 1e-2, "topology": "ring", "eval_every": 4,
}  # fmt: skip
PRIVATE = SETTINGS | {"dp_clip": CLIP, "dp_noise": NOISE}


@pytest.fixture(autouse=True)
def tiny_jobs(monkeypatch):
    monkeypatch.setattr("plait.runs.run.prepare", tiny_job)


def silence(_client, _round, change):
    return np.zeros_like(change)


def change_of_a_round(noise, round_=0, **settings):
    """Factor -> (n, P) float64: how far a round of local training brought each client."""
    job = tiny_job(Config(**(PRIVATE | settings)))
    stack = job.initial_stack()
    before = {factor: value.clone().double() for factor, value in stack.factors.items()}
    train_round(job, stack, round_, range(3), noise)
    return {factor: value.double() - before[factor] for factor, value in stack.factors.items()}


# -- clipping


@pytest.mark.parametrize("size", [1e-3, 0.99, 1.01, 30.0, 1e30])
def test_a_change_is_never_longer_than_the_bound_and_keeps_its_direction(size):
    change = size * np.random.default_rng(0).normal(size=1000) / math.sqrt(1000)
    found = clipped(change, 1.0)
    assert np.linalg.norm(found) <= 1 + 1e-15
    if np.linalg.norm(change) <= 1:
        assert np.array_equal(found, change)
    else:
        assert np.linalg.norm(found) == pytest.approx(1)
        np.testing.assert_allclose(found / found[0], change / change[0])


def test_a_change_that_is_no_number_counts_as_none():
    assert not clipped(np.array([1.0, np.nan]), 1.0).any()
    assert not clipped(np.array([1.0, np.inf]), 1.0).any()


@pytest.mark.parametrize(
    ("method", "round_", "protected"),
    [
        ("adf", 0, {Factor.B, Factor.HEAD}),
        ("adf", 2, {Factor.A, Factor.HEAD}),
        ("dec-lora", 0, {Factor.A, Factor.B, Factor.HEAD}),
        ("ffa", 3, {Factor.B, Factor.HEAD}),
        ("rolora", 1, {Factor.A, Factor.HEAD}),
    ],
)
def test_all_that_trains_and_travels_is_clipped_together(method, round_, protected):
    changes = change_of_a_round(silence, round_, method=method, head="mixed", clip_norm=None)
    norms = torch.cat([changes[factor] for factor in protected], dim=1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((3,), CLIP, dtype=torch.double), rtol=1e-5, atol=0)
    assert not any(changes[factor].any() for factor in changes.keys() - protected)


def test_what_else_travels_of_a_factor_is_clipped_with_it(monkeypatch):
    monkeypatch.setitem(METHODS, "moments", lambda _: Method(
        summary="", train=always(Factor.B), share=always(Factor.AB), kinds=(VALUE, "m"),
    ))  # fmt: skip
    job = tiny_job(Config(**(PRIVATE | {"method": "moments", "clip_norm": None})))
    stack = job.initial_stack()
    before = {slot: value.clone().double() for slot, value in stack.state.items()}
    train_round(job, stack, 0, range(3), silence)
    changes = {slot: value.double() - before[slot] for slot, value in stack.state.items()}
    protected = [(VALUE, Factor.B), ("m", Factor.B)]
    assert all(changes[slot].norm(dim=1).min() > 0 for slot in protected)
    norms = torch.cat([changes[slot] for slot in protected], dim=1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((3,), CLIP, dtype=torch.double), rtol=1e-5, atol=0)
    assert changes["v", Factor.B].any()
    assert not any(changes[slot].any() for slot in changes if slot[1] is Factor.A)


def test_a_head_that_stays_at_home_is_left_alone():
    private = change_of_a_round(silence, head="local")
    free = change_of_a_round(silence, head="local", dp_clip=None, dp_noise=None)
    assert torch.equal(private[Factor.HEAD], free[Factor.HEAD])
    assert free[Factor.B].norm(dim=1).min() > CLIP


def test_without_exchange_nothing_is_changed():
    private = change_of_a_round(silence, method="local")
    free = change_of_a_round(silence, method="local", dp_clip=None, dp_noise=None)
    assert all(torch.equal(private[factor], free[factor]) for factor in free)


# -- noise


@pytest.mark.parametrize("noise", [seeded_noise(0), secret_noise(bytes(32))])
def test_noise_is_standard_normal_and_its_own_for_each_client_and_round(noise):
    change = np.zeros(200_000)
    draws = [noise(client, round_, change) for client, round_ in ((0, 0), (1, 0), (0, 1))]
    for draw in draws:
        assert stats.kstest(draw, "norm").pvalue > 1e-3
    correlations = np.corrcoef(draws)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.01
    assert np.array_equal(draws[0], noise(0, 0, change))


def test_noise_has_the_deviation_that_was_asked_for():
    size = 100_000
    before = {(VALUE, Factor.A): torch.ones(1, size), (VALUE, Factor.B): torch.zeros(1, size)}
    after = {slot: value.clone() for slot, value in before.items()}
    privatise(before, after, 3, [1], Config(dp_clip=2.0, dp_noise=0.7), seeded_noise(0))
    added = torch.cat([after[slot] - before[slot] for slot in before], dim=1)[0]
    assert float(added.std()) == pytest.approx(1.4, rel=0.01)
    assert abs(float(added.mean())) < 0.02


def test_secret_noise_depends_on_the_key_and_on_the_change():
    change = np.linspace(0, 1, 1000)
    noise = secret_noise(b"k" * 32)(0, 0, change)
    assert np.array_equal(secret_noise(b"k" * 32)(0, 0, change), noise)
    for other in (
        secret_noise(b"l" * 32)(0, 0, change),
        secret_noise(b"k" * 32)(0, 0, change + 1e-9),
    ):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.15


def test_a_peers_key_is_its_own_and_outlives_a_restart(tmp_path):
    config, change = Config(**PRIVATE), np.zeros(10)
    draws = []
    for name in ("a", "b", "a"):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        draws.append(noise_of(folder, config)(0, 0, change))
    assert np.array_equal(draws[0], draws[2])
    assert not np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], seeded_noise(config.seed)(0, 0, change))
    key = tmp_path / "a" / "noise.key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.write_bytes(b"cut off")
    noise_of(RunFolder(tmp_path / "a"), config)
    assert key.stat().st_size == KEY_BYTES


# -- runs


def factors_of(config, folder=None, stop_after=None):
    run = Run(config, folder, resume=True, machine=Machine(save_every=1))
    for event in run:
        if isinstance(event, RoundDone) and event.round == stop_after:
            break
    return run._engine.stack.factors, run.events


def test_a_run_that_was_resumed_equals_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr("plait.engines.simulate.save_adapters", lambda *_: None)
    config = Config(**PRIVATE | {"optimizer_state": "keep"})
    unbroken, _ = factors_of(config)
    factors_of(config, tmp_path / "run", stop_after=1)
    resumed, events = factors_of(config, tmp_path / "run")
    assert [event.round for event in events if isinstance(event, RoundDone)] == [0, 1, 2, 3]
    assert all(torch.equal(unbroken[factor], resumed[factor]) for factor in unbroken)
    summary = load_summary(tmp_path / "run")
    assert summary["dp_epsilon"] == pytest.approx(epsilon(NOISE, 4, 1e-5))
    free, _ = factors_of(Config(**SETTINGS))
    assert not torch.equal(free[Factor.B], unbroken[Factor.B])


def test_peers_and_a_simulation_do_the_same_and_a_peers_noise_is_not_the_simulations():
    config = Config(**PRIVATE)
    simulated, _ = factors_of(config)
    members = [member(f"p{k}") for k in range(3)]
    for noise, same in ((None, True), (secret_noise(bytes(32)), False)):
        hub = Hub()
        peers = [start_peer(hub, k, config, members, noise=noise) for k in range(3)]
        together(peers, config.rounds)
        for peer in peers:
            for factor, value in simulated.items():
                assert torch.equal(value[peer.me], peer.stack.factors[factor][0]) == same


# -- accounting


def closed_form(multiplier, delta):
    """The epsilon of one Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
    mu = 1 / multiplier

    def excess(eps):
        other = math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu))
        return stats.norm.cdf(mu / 2 - eps / mu) - other - delta

    return brentq(excess, 0, 1e3) if excess(0) > 0 else 0.0


@pytest.mark.parametrize("noise", [1.0, 4.0, 20.0, 1e6])
@pytest.mark.parametrize("releases", [1, 20])
def test_epsilon_is_the_one_of_the_closed_form(noise, releases):
    expected = closed_form(noise / 2 / math.sqrt(releases), 1e-5)
    assert epsilon(noise, releases, 1e-5) == pytest.approx(expected, abs=1e-9)


def test_epsilon_is_the_one_of_the_librarys_own_composition():
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(10 / 2), 20)
    assert epsilon(10, 20, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-4)


@pytest.mark.parametrize(("method", "releases"), [("adf", 4), ("rolora", 4), ("local", 0)])
def test_a_summary_counts_the_rounds_where_something_travels(method, releases):
    config = Config(**PRIVATE | {"method": method})
    _, events = factors_of(config)
    assert isinstance(events[-1], Evaluated)
    summary = summarize(config, events)
    assert summary["dp_epsilon"] == pytest.approx(epsilon(NOISE, releases, 1e-5))
    assert summary["dp_delta"] == 1e-5


def test_without_privacy_a_summary_says_nothing_of_it():
    config = Config(**SETTINGS)
    assert not [key for key in summarize(config, factors_of(config)[1]) if key.startswith("dp")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dp_clip": 1.0}, "belong together"),
        ({"dp_noise": 1.0}, "belong together"),
        ({"dp_clip": 0.0, "dp_noise": 1.0}, "dp_clip is 0.0"),
        ({"dp_clip": 1.0, "dp_noise": -1.0}, "dp_noise is -1.0"),
        ({"dp_clip": 1.0, "dp_noise": math.inf}, "dp_noise is inf"),
        ({"dp_delta": 1.0}, "dp_delta is 1.0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_a_run_does_not_begin_where_its_epsilon_could_not_be_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.pld.privacy_loss_mechanism", None)
    Rules.of(Config(**SETTINGS))
    with pytest.raises(ValueError, match=r"pip install 'plait\[dp\]'"):
        Rules.of(Config(**PRIVATE))
