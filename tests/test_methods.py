"""Methods as values: what a row brings along, and that no tool knows one by name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import plait
from plait.config import Config
from plait.engines.job import Rules
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
    for method in set(METHODS) - {"fedavg"}:
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
