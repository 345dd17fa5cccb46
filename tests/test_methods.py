"""Methods as values: what a row brings along, and that no tool knows one by name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import plait
from conftest import tiny_job
from plait.config import Config
from plait.engines.job import Rules
from plait.engines.simulate import simulate
from plait.events import RoundDone
from plait.experiments.comparison import entries
from plait.experiments.plan import Plan, slug
from plait.methods import METHODS, Control, Method, build_method, settled
from plait.topology import rho_of

# `local` is also a word of `head` and of peer.toml.
NAMES = "|".join(set(METHODS) - {"local"})


@pytest.mark.parametrize("weights", ["metropolis", "laplacian", "sequential"])
def test_fedavg_averages_exactly_whatever_the_weights(weights):
    rules = Rules.of(Config(method="fedavg", topology="ring", weights=weights, clients=6))
    assert rho_of(rules.config) < 1e-12
    np.testing.assert_allclose(rules.schedule(3), np.full((6, 6), 1 / 6), rtol=0, atol=1e-15)


def test_other_methods_leave_topology_and_weights_to_the_user():
    for method in set(METHODS) - {"fedavg", "rw-lora"}:
        config = Config(method=method, topology="ring", weights="laplacian")
        assert settled(config) == config


@pytest.mark.parametrize(
    ("settings", "T"),
    [({"topology": "complete"}, 1), ({"topology": "ring"}, 3), ({"p": 0, "clients": 2}, 20),
     ({"topology": "ring", "switch_scale": 2}, 6), ({"topology": "hypercube", "clients": 8}, 2)],
)  # fmt: skip
def test_tad_is_adf_with_an_interval_from_rho(settings, T):
    tad = build_method(Config(method="tad", **settings))
    adf = build_method(Config(method="adf", switch_every=T, **settings))
    assert f"T = {T} on" in tad.summary
    assert (tad.control, tad.mix, tad.kinds) == (adf.control, adf.mix, adf.kinds)
    for t in range(3 * T):
        assert (tad.train(t), tad.share(t)) == (adf.train(t), adf.share(t))


def plan_of(*methods: str, **lrs: float) -> Plan:
    return Plan(config=Config(lr=1e-2), methods=methods, lrs=lrs, out=Path("out"))


def test_a_method_brings_its_control(monkeypatch):
    own = METHODS["ffa"](Config())
    for name, control in (("own", Control(method="rolora", lr_factor=3.0)),
                          ("other", Control(method="dec-lora", lr_factor=0.25))):  # fmt: skip
        values = {**vars(own), "control": control}
        monkeypatch.setitem(METHODS, name, lambda _, values=values: Method(**values))
    plan = plan_of("own", "adf", "other", own=2e-3)
    assert plan.labels == (
        "own", "adf", "other", "rolora (matched)", "dec-lora (matched)", "dec-lora (matched-other)"
    )  # fmt: skip
    assert [(one.method, one.lr) for one in entries(plan)[3:]] == [
        ("rolora", pytest.approx(6e-3)), ("dec-lora", 5e-3), ("dec-lora", 2.5e-3)
    ]  # fmt: skip
    assert len({slug(label) for label in plan.labels}) == 6
    assert plan_of("ffa", "rolora").labels == ("ffa", "rolora")


def test_no_tool_knows_a_method_by_name():
    root = Path(plait.__file__).parent
    defaults = {"config.py": 1, "presets.py": 1}
    for path in root.rglob("*.py"):
        found = re.findall(rf'"(?:{NAMES})"', path.read_text())
        if path.name != "methods.py":
            assert len(found) == defaults.get(path.name, 0), f"{path}: {found}"


def shares(**settings):
    config = Config(method="adf", switch_every=6, rounds=18, **settings)
    share = build_method(config).share
    return " ".join(str(share(t).name) for t in range(18))


def test_the_frozen_factor_travels_in_every_kth_round_of_a_phase():
    expected = "AB B B AB B B " + "AB A A AB A A " + "AB B B AB B B"
    assert shares(topology="ring", frozen_every=3) == expected


@pytest.mark.parametrize(
    ("topology", "clients", "phase"),
    [("hypercube", 8, 2), ("complete", 5, 0), ("one_peer_exponential", 8, 2), ("ring", 8, 6)],
)
def test_or_until_it_is_equal_everywhere(topology, clients, phase):
    a, b = (f"{'AB ' * phase}{f'{one} ' * (6 - phase)}" for one in "AB")
    found = shares(topology=topology, clients=clients, frozen_every=0)
    assert found == ("B " * 6 + a + b).strip(), "A is at the common start in the first phase"


def test_clients_of_different_rank_are_never_all_equal():
    settings = {"topology": "complete", "clients": 4, "ranks": "2,4"}
    assert shares(frozen_every=0, **settings) == " ".join(["AB"] * 18)


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_rounded_messages_make_nobody_equal_but_at_the_start(wire):
    found = shares(topology="complete", clients=4, frozen_every=0, wire=wire)
    assert found == " ".join(["B"] * 6 + ["AB"] * 12)


@pytest.mark.parametrize(
    "method", ["decaf", "flexlora", "hetlora", "raflora", "fedrot", "rw-lora", "fedex", "flora"]
)
def test_what_goes_on_from_what_is_sent_needs_all_of_it(method):
    with pytest.raises(ValueError, match="sends only a part: take another --wire"):
        build_method(Config(method=method, wire="top-k:0.1"))
    build_method(Config(method=method, wire="int8"))


@pytest.mark.parametrize(("topology", "degree"), [("hypercube", None), ("base", 2)])
def test_what_is_equal_need_not_be_sent(topology, degree):
    settings = {
        "topology": topology, "degree": degree, "clients": 8, "rounds": 9, "switch_every": 3,
        "local_steps": 1, "batch_size": 3, "rank": 2, "lr": 1e-2, "eval_every": 99,
    }  # fmt: skip
    ends, sent = [], []
    for every in (1, 0):
        job = tiny_job(Config(**settings, frozen_every=every))
        stack = job.initial_stack()
        events = [e for e in simulate(job, stack) if isinstance(e, RoundDone)]
        ends.append(stack.factors)
        sent.append(sum(event.sent_bytes for event in events))
    for factor, value in ends[0].items():
        torch.testing.assert_close(ends[1][factor], value, rtol=0, atol=1e-5)
    assert sent[1] < 0.8 * sent[0]


def test_the_shares_of_the_docs_are_those_of_the_schedule():
    page = (Path(__file__).parents[1] / "docs" / "which-method.md").read_text()
    for row, graph in (
        ("`hypercube`, 8 clients", {"topology": "hypercube", "clients": 8}),
        ("`base`, 10 clients, degree 1", {"topology": "base", "clients": 10, "degree": 1}),
        ("`base`, 10 clients, degree 2", {"topology": "base", "clients": 10, "degree": 2}),
        ("`complete`", {"topology": "complete", "clients": 10}),
    ):
        found = []
        for T in (5, 10, 20):
            share = build_method(Config(**graph, frozen_every=0, switch_every=T, rounds=300)).share
            found.append(sum(len(str(share(t).name)) for t in range(300)) / 600)
        cells = " | ".join(f"{one:.2f}".lstrip("0") for one in found)
        assert f"| {row} | {cells} |" in page
