"""The stacked engine against plain PEFT, one client after another."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from plait.config import Config, Machine
from plait.engines.local_training import batch_rows, local_phase
from plait.factors import Factor
from plait.machine.devices import bfloat16_units, resolve_dtype
from twin import ARCHITECTURES, OTHERS, PHASES, all_logits, setup, twin_evaluation, twin_local_phase


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(
    ("train", "head"), [*((phase, "frozen") for phase in PHASES), (Factor.AB, "mixed")]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_local_phase_equals_peft(architecture, train, head, ragged_tokens):
    config = Config(
        clients=4, local_steps=5, batch_size=6, rank=4, head=head, lr=5e-3, clip_norm=0.5
    )
    same_training(architecture, train, config, ragged_tokens)


@pytest.mark.parametrize("train", PHASES)
@pytest.mark.parametrize("architecture", OTHERS)
def test_so_it_does_for_others(architecture, train, ragged_tokens):
    config = Config(clients=3, local_steps=5, batch_size=4, rank=4, lr=5e-3, clip_norm=0.5)
    same_training(architecture, train, config, ragged_tokens)


def same_training(architecture, train, config, tokens):
    model, backbone, stack, shares, targets = setup(
        architecture, config, tokens, machine=Machine(chunk_tokens=150)
    )
    if backbone.layout.head:
        train |= Factor.HEAD
    expected_losses, expected = twin_local_phase(
        model, backbone.layout, stack, train, 1, tokens, shares, config, targets
    )
    frozen = {f: value.clone() for f, value in stack.factors.items() if f not in train}

    losses = local_phase(backbone, stack, train, 1, tokens, shares, range(config.clients), config)

    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-5)
    for factor in backbone.layout.factors:
        torch.testing.assert_close(stack.factors[factor], expected[factor], rtol=0, atol=1e-5)
    for factor, value in frozen.items():
        assert torch.equal(stack.factors[factor], value)
    for factor in train:
        assert not torch.equal(expected[factor], torch.zeros_like(expected[factor]))


@pytest.mark.parametrize(
    "targets",
    ["key", "query,key,value", "attention.output.dense", "query,intermediate.dense,output.dense"],
)
@pytest.mark.usefixtures("ways")
def test_any_linear_layer_can_be_adapted(targets, ragged_tokens):
    config = Config(clients=3, local_steps=3, batch_size=4, rank=2, target_modules=targets)
    model, backbone, stack, shares, names = setup("bert", config, ragged_tokens)
    expected_losses, expected = twin_local_phase(
        model, backbone.layout, stack, Factor.AB, 0, ragged_tokens, shares, config, names
    )
    losses = local_phase(backbone, stack, Factor.AB, 0, ragged_tokens, shares, range(3), config)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(stack.factors[Factor.A], expected[Factor.A], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_equals_peft(architecture, ragged_tokens):
    config = Config(clients=3, rank=4)
    model, backbone, stack, _, targets = setup(architecture, config, ragged_tokens)
    logits = all_logits(backbone, stack.factors, ragged_tokens)
    expected = twin_evaluation(model, backbone.layout, stack, ragged_tokens, config, targets)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_backend_equals_the_slow_one(architecture, dropout, ragged_tokens):
    config = Config(clients=4, local_steps=3, batch_size=5, rank=4, lora_dropout=dropout)
    results = []
    for backend in (None, "slow"):
        _, backbone, stack, shares, _ = setup(
            architecture, config, ragged_tokens, Machine(backend=backend)
        )
        losses = local_phase(backbone, stack, Factor.AB, 0, ragged_tokens, shares, range(4), config)
        results.append((losses, stack.factors[Factor.B]))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_weights_give_nearly_the_same_losses(units, ragged_tokens, monkeypatch):
    if units and not bfloat16_units():
        pytest.skip("this CPU doesn't multiply in bfloat16")
    monkeypatch.setattr("plait.model.backend.bfloat16_units", lambda: units)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = Config(clients=4, local_steps=5, batch_size=5, rank=4, lr=5e-3, dtype=dtype)
        _, backbone, stack, shares, _ = setup("bert", config, ragged_tokens)
        args = (Factor.AB, 0, ragged_tokens, shares, range(4), config)
        losses[dtype] = local_phase(backbone, stack, *args)
        assert stack.factors[Factor.A].dtype is torch.float32
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0, atol=0.02)
    assert not np.array_equal(losses["bfloat16"], losses["float32"])


def test_auto_takes_bfloat16_only_where_there_are_units(monkeypatch):
    monkeypatch.setattr("plait.machine.devices.bfloat16_units", lambda: True)
    assert resolve_dtype("auto", torch.device("cpu")) is torch.bfloat16
    assert resolve_dtype("float32", torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto", torch.device("mps")) is torch.float32
    monkeypatch.setattr("plait.machine.devices.bfloat16_units", lambda: False)
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_chunks_do_not_change_the_result(dropout, ragged_tokens):
    config = Config(clients=5, local_steps=3, batch_size=4, lora_dropout=dropout)
    results = []
    for chunk_tokens in (50, 150, 10_000):
        machine = Machine(chunk_tokens=chunk_tokens)
        _, backbone, stack, shares, _ = setup("bert", config, ragged_tokens, machine=machine)
        local_phase(backbone, stack, Factor.AB, 0, ragged_tokens, shares, range(5), config)
        results.append(stack.factors)
    for factor, value in results[0].items():
        assert torch.equal(results[1][factor], value)
        assert torch.equal(results[2][factor], value)


@pytest.mark.usefixtures("operators")
def test_a_client_alone_gets_what_it_gets_in_the_stack(ragged_tokens):
    config = Config(
        clients=5, local_steps=8, batch_size=7, rank=3, head="mixed", lora_dropout=0.1, lr=1e-2,
        clip_norm=0.1,
    )  # fmt: skip
    _, backbone, stack, shares, _ = setup("bert", config, ragged_tokens)
    alone = [copy.deepcopy(stack) for _ in shares]
    together = local_phase(
        backbone, stack, Factor.AB | Factor.HEAD, 0, ragged_tokens, shares, range(5), config
    )
    for k, own in enumerate(alone):
        own.state = {slot: rows[k : k + 1] for slot, rows in own.state.items()}
        losses = local_phase(
            backbone, own, Factor.AB | Factor.HEAD, 0, ragged_tokens, shares, [k], config
        )
        np.testing.assert_array_equal(losses[0], together[k])
        for factor, value in stack.factors.items():
            assert torch.equal(own.factors[factor][0], value[k])


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("cached", [True, False])
def test_adapting_the_top_layers_only(cached, ragged_tokens):
    config = Config(clients=3, local_steps=3, batch_size=4, rank=2, top_layers=1)
    machine = Machine(cache_gib=1.0 if cached else 0.0)
    model, backbone, stack, shares, _ = setup("bert", config, ragged_tokens, machine=machine)
    assert {site.name.split(".")[3] for site in backbone.layout.sites} == {"1"}
    targets = [site.name for site in backbone.layout.sites]
    expected_losses, expected = twin_local_phase(
        model, backbone.layout, stack, Factor.AB, 0, ragged_tokens, shares, config, targets
    )
    tokens = backbone.with_hidden(ragged_tokens)
    assert (tokens.hidden is not None) == cached
    losses = local_phase(backbone, stack, Factor.AB, 0, tokens, shares, range(3), config)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(stack.factors[Factor.A], expected[Factor.A], rtol=0, atol=1e-5)
    part = tokens.take(np.array([7, 3, 30]))
    logits = all_logits(backbone, stack.factors, part)
    whole = all_logits(backbone, stack.factors, ragged_tokens)
    torch.testing.assert_close(logits, whole[:, [7, 3, 30]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [5, 16, 23])
def test_every_pass_has_every_row_once_in_an_order_of_its_own(size):
    share, config = np.arange(100, 100 + size), Config(batch_size=4)
    rows = batch_rows(share, 3, range(3 * size), config)  # twelve passes
    passes = rows.ravel().reshape(12, size)
    assert (np.sort(passes, axis=1) == share).all()
    assert len({tuple(one) for one in passes.tolist()}) > 6
    np.testing.assert_array_equal(batch_rows(share, 3, range(7, 9), config), rows[7:9])
