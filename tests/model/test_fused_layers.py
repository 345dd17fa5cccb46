"""All layers in one call each way: whatever the pieces and threads, and what is not finite.

That they compute what PEFT computes is in test_twin.py.
"""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from conftest import tiny_model
from plait.config import Config, Machine
from plait.engines.local_training import local_phase
from plait.factors import VALUE, Factor
from plait.lora import initial_stack
from plait.model.backbone import Backbone
from plait.model.frozen_linear import make_batch_invariant
from plait.model.fused_layers import Pieces
from plait.model.kernels import compiled as native
from plait.model.kernels.compiled import Kernels, kernels
from plait.model.loading import Loaded
from twin import all_logits

CONFIG = Config(clients=3, local_steps=3, batch_size=9, rank=3, lr=5e-3)


def trained(tokens, clients, model):
    """Losses, factors and logits after the local phase of some clients, all from the same start."""
    backbone = Backbone(Loaded(copy.deepcopy(model), None, ()), CONFIG)
    stack = initial_stack(backbone.layout, backbone.head_start, 3, 0, torch.device("cpu"))
    B = stack.state[VALUE, Factor.B]
    B += 0.05 * torch.randn(B.shape, generator=torch.Generator().manual_seed(1))
    stack.state = {slot: rows[clients].clone() for slot, rows in stack.state.items()}
    shares = np.array_split(np.random.default_rng(2).permutation(len(tokens)), 3)
    losses = local_phase(backbone, stack, Factor.AB, 0, tokens, shares, clients, CONFIG)
    logits = all_logits(backbone, stack.factors, tokens)
    return [torch.from_numpy(losses), *stack.factors.values(), logits]


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("architecture", ["bert", "mean-pooled"])
def test_the_size_of_pieces_changes_nothing(
    compiler, architecture, ragged_tokens, monkeypatch, threads
):
    threads(1)
    monkeypatch.setattr("plait.model.fused_layers.PORTION_TOKENS", 30)
    results = []
    for tokens in (30, 70, 1000):
        monkeypatch.setattr("plait.model.fused_layers.PIECE_TOKENS", tokens)
        results.append(trained(ragged_tokens, [0, 1, 2], tiny_model(architecture)))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_the_size_of_portions_changes_only_the_rounding(compiler, ragged_tokens, monkeypatch):
    results = []
    for tokens in (1, 40, 1000):
        monkeypatch.setattr("plait.model.fused_layers.PORTION_TOKENS", tokens)
        results.append(trained(ragged_tokens, [0, 1, 2], tiny_model("bert")))
    for result in results[1:]:
        assert not same(results[0], result)
        for one, other in zip(results[0], result, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [80, 112])
def test_wider_layers_equal_transformers_own(compiler, ragged_tokens, width):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=1000, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=2 * width, max_position_embeddings=64, num_labels=3,
        )
    )  # fmt: skip
    results = []
    for backend in (None, "slow"):
        machine = Machine(backend=backend)
        backbone = Backbone(Loaded(copy.deepcopy(model), None, ()), CONFIG, machine)
        stack = initial_stack(backbone.layout, backbone.head_start, 2, 0, torch.device("cpu"))
        torch.manual_seed(1)
        factors = {
            factor: (value + 0.05 * torch.randn(value.shape)).requires_grad_()
            for factor, value in stack.factors.items()
        }
        logits = backbone.logits(
            backbone.batch(ragged_tokens, np.arange(20).reshape(2, 10)), factors
        )
        logits.square().sum().backward()
        results.append([logits, *(value.grad for value in factors.values())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first_tokens", [True, False])
def test_the_number_of_threads_changes_nothing(compiler, ragged_tokens, threads, first_tokens):
    backbone = Backbone(Loaded(tiny_model("bert"), None, ()), CONFIG)
    batch = backbone.batch(ragged_tokens, np.arange(20).reshape(1, 20))
    results = []
    for forward, backward in ((1, 1), (2, 2), (2, 1)):
        threads(forward)
        stack = initial_stack(backbone.layout, backbone.head_start, 1, 0, torch.device("cpu"))
        for value in stack.factors.values():
            value.requires_grad_()
        A, B = stack.factors[Factor.A], stack.factors[Factor.B]
        hidden = backbone.encoder(batch, A, B, None, first_tokens)
        threads(backward)
        hidden.square().sum().backward()
        results.append([hidden, stack.factors[Factor.A].grad, stack.factors[Factor.B].grad])
    assert len(results[0][0]) == (20 if first_tokens else batch.num_tokens)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_what_is_not_finite_is_seen_in_its_own_text_alone(compiler, ragged_tokens):
    backbone = Backbone(Loaded(tiny_model("mean-pooled"), None, ()), CONFIG)
    stack = initial_stack(backbone.layout, backbone.head_start, 2, 0, torch.device("cpu"))
    batch = backbone.batch(ragged_tokens, np.arange(8).reshape(2, 4))
    layers, h = backbone.encoder.fused, backbone.encoder.embed(batch)
    args = (Pieces(batch), stack.factors[Factor.A], stack.factors[Factor.B], False)
    expected = layers(h, *args)
    start, end = int(batch.starts[5]), int(batch.starts[6])
    spoilt = h.clone()
    spoilt[start + 1, 7] = float("nan")
    result = layers(spoilt, *args)
    assert result[start:end].isnan().all()
    result[start:end] = expected[start:end]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 7, 97, 801])
@pytest.mark.parametrize(("K", "N"), [(16, 48), (64, 16), (48, 112), (400, 32)])
def test_a_product_with_a_frozen_matrix(compiler, K, N, count, bias, threads):
    generator = torch.Generator().manual_seed(N)
    x = torch.randn(count, K, generator=generator)
    W = torch.randn(N, K, generator=generator) / K**0.5
    b = torch.randn(N, generator=generator) if bias else None
    fused = kernels(torch.float32)
    expected = functional.linear(x.double(), W.double(), None if b is None else b.double())
    results = []
    for number in (1, 2):
        threads(number)
        results.append(fused.linear(x, fused.prepack(W.t()), b, N))
        torch.testing.assert_close(results[-1].double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(*results)
    assert torch.equal(fused.linear(x[-1:], fused.prepack(W.t()), b, N), results[0][-1:])


def test_a_sum_alone_is_rounded_as_among_others_whatever_the_compiler_likes(compiler, monkeypatch):
    # GCC 13 multiplies and adds in two steps where a loop has but one sum; this makes others do so.
    monkeypatch.setenv("CC", os.environ.get("CC", "cc") + " --param=avoid-fma-max-bits=512")
    fused = native.kernels.__wrapped__(torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(shape, generator=generator) for shape in ((7, 64), (64, 16)))
    together = fused.linear(x, fused.prepack(W), None, 16)
    assert torch.equal(fused.linear(x[-1:], fused.prepack(W), None, 16), together[-1:])


@pytest.mark.parametrize("threads_", [1, 2])
def test_a_frozen_head_is_batch_invariant(compiler, threads, threads_):
    threads(threads_)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 3))
    head.requires_grad_(False)
    x = torch.randn(5, 9, 48)
    expected = head(x)
    assert make_batch_invariant(head, kernels(torch.float32))
    together = head(x)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)
    for one, own in zip(x, together, strict=True):
        assert torch.equal(head(one), own)


@pytest.mark.parametrize(
    "head",
    [nn.Linear(20, 3), nn.Linear(32, 3, bias=False), nn.Bilinear(32, 32, 3), nn.Conv1d(32, 3, 1)],
)
def test_a_head_of_another_kind_stays_as_it_is(compiler, head):
    whole = nn.Sequential(nn.Linear(32, 32), head)
    assert not make_batch_invariant(whole, kernels(torch.float32))
    assert whole[1] is head
    assert isinstance(whole[0], nn.Linear)


def test_only_where_they_suit(monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert Kernels.suit(torch.zeros(32, 16))
    assert not Kernels.suit(torch.zeros(32, 20))
    assert not Kernels.suit(torch.zeros(20, 32))
    assert not Kernels.suit(torch.zeros(32, 16, dtype=torch.bfloat16))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "SVE256")
    assert not Kernels.suit(torch.zeros(32, 16))


def test_other_activations_go_step_by_step(compiler):
    model = tiny_model("bert")
    assert all(layer.fused for layer in encoder(model).layers)
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.ReLU()
    assert not any(layer.fused for layer in encoder(model).layers)


def encoder(model):
    return Backbone(Loaded(copy.deepcopy(model), None, ()), CONFIG).encoder
