"""Gradient checkpointing: the same numbers, with less in memory."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch

from conftest import asked_tokens, random_tokens, tiny_causal_model, tiny_model
from plait.config import Config, Machine
from plait.data.objectives import CLASSIFICATION, LANGUAGE
from plait.engines.local_training import local_phase
from plait.factors import Factor
from plait.lora import initial_stack
from plait.model.backbone import Backbone
from plait.model.loading import Loaded
from plait.model.memory import activation_bytes

CONFIG = Config(rank=4, clients=3, local_steps=2, batch_size=4, lr=1e-2, lora_dropout=0.1)


def setup(architecture, config=CONFIG):
    classifies = architecture == "distilbert"
    tokens = random_tokens() if classifies else asked_tokens()
    model = (tiny_model if classifies else tiny_causal_model)(architecture)
    objective = CLASSIFICATION if classifies else LANGUAGE
    backbone = Backbone(Loaded(model, None, ()), config, objective=objective)
    return backbone, initial_stack(backbone.layout, {}, 3, 0, backbone.device), tokens


def trained(architecture, memory_gib):
    backbone, stack, tokens = setup(architecture)
    backbone.machine = Machine(memory_gib=memory_gib)
    shares = np.array_split(np.arange(len(tokens)), 3)
    losses = local_phase(backbone, stack, Factor.AB, 0, tokens, shares, range(3), CONFIG)
    return losses, stack.factors, backbone.encoder.recompute


def one_batch(architecture):
    """GiB that hold a little less than all activations of a client's batch, and the state."""
    backbone, stack, tokens = setup(architecture)
    batch = CONFIG.batch_size * tokens.lengths.mean()
    state = sum(slot.nbytes for slot in stack.state.values())
    return (state + 0.9 * batch * activation_bytes(backbone, stack, tokens)) / 2**30


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "distilbert"])
def test_layers_are_computed_twice_where_memory_asks_for_it(architecture):
    expected, factors, twice = trained(architecture, memory_gib=1.0)
    assert not twice
    losses, same, twice = trained(architecture, one_batch(architecture))
    assert twice
    np.testing.assert_array_equal(losses, expected)
    for factor, value in factors.items():
        assert torch.equal(same[factor], value)


def test_a_backward_pass_elsewhere_finds_the_clients():
    backbone, stack, tokens = setup("llama")
    leaves = {f: value.clone().requires_grad_() for f, value in stack.factors.items()}
    grads = []
    for backbone.encoder.recompute in (False, True):
        batch = backbone.batch(tokens, np.arange(12).reshape(3, 4))
        loss = backbone.losses(batch, leaves).sum()
        # As on a graphics card, whose backward pass has a thread of its own.
        other = threading.Thread(target=loss.backward)
        other.start()
        other.join()
        grads.append([leaf.grad for leaf in leaves.values()])
        for leaf in leaves.values():
            leaf.grad = None
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_a_token_leaves_the_layers_inputs():
    backbone, stack, tokens = setup("llama")
    whole = activation_bytes(backbone, stack, tokens)
    backbone.encoder.recompute = True
    few = activation_bytes(backbone, stack, tokens)
    assert 2 * 32 * 4 <= few < whole / 4  # of two layers, 32 wide


@pytest.mark.parametrize("recompute", [False, True])
def test_what_was_measured_is_freed_at_once(recompute):
    backbone, stack, tokens = setup("llama")
    backbone.encoder.recompute = recompute

    def tensors():
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    activation_bytes(backbone, stack, tokens)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        activation_bytes(backbone, stack, tokens)
        assert tensors() <= before
    finally:
        gc.enable()


def test_evaluation_keeps_nothing_and_the_model_is_put_back():
    backbone, stack, tokens = setup("llama")
    backbone.encoder.recompute = True
    batch = backbone.batch(tokens, np.arange(12).reshape(3, 4))
    losses, _ = backbone.judge(batch, stack.factors)
    assert losses.isfinite().all()
    layer = backbone.encoder.layers[0]
    backbone.encoder.remove()
    assert "forward" not in vars(layer)
