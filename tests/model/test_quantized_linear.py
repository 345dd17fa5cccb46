"""The frozen model in few bits: the same as one whose weights were rounded beforehand."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from conftest import asked_tokens, random_tokens, tiny_causal_model, tiny_model
from plait.config import Config
from plait.data.objectives import CLASSIFICATION, LANGUAGE
from plait.engines.local_training import evaluate, local_phase
from plait.factors import Factor
from plait.lora import initial_stack
from plait.model.backbone import Backbone
from plait.model.loading import Loaded
from plait.model.quantized_linear import (
    FORMATS,
    NF4,
    Int8Linear,
    Nf4Linear,
    QuantizedLayer,
    block_layers,
    quantize,
)

CONFIG = Config(rank=4, clients=3, local_steps=2, batch_size=4, lr=1e-2)


def rounded_8bit(weight):
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / step).round() * step


def rounded_4bit(weight):
    grouped = weight.unflatten(1, (-1, min(64, weight.shape[1])))
    largest = grouped.abs().amax(dim=2, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = ((grouped / largest)[..., None] - levels).abs().argmin(dim=-1)
    return (levels[nearest] * largest).flatten(1)


ROUNDED = {"8bit": rounded_8bit, "4bit": rounded_4bit}


@pytest.mark.parametrize("load_in", FORMATS)
@pytest.mark.parametrize("at_once", [1 << 20, 64 * 40])  # whole, and in parts of 64
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_one_of_rounded_weights(load_in, at_once, dtype, monkeypatch):
    monkeypatch.setattr("plait.model.quantized_linear.AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(160, 192, generator=generator)
    bias = torch.randn(160, generator=generator).to(dtype)
    frozen = FORMATS[load_in](weight, bias)
    expected = ROUNDED[load_in](weight).to(dtype)
    x = torch.randn(5, 192, generator=generator).to(dtype).requires_grad_()
    y = frozen(x)
    near = {"rtol": 1e-2, "atol": 0.5} if dtype is torch.bfloat16 else {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(y, x @ expected.T + bias, **near)
    (found,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(found, y.detach() @ expected, **near)


@pytest.mark.parametrize(
    ("kind", "bytes_per_entry", "error"), [(Int8Linear, 1.02, 0.008), (Nf4Linear, 0.57, 0.1)]
)
def test_weights_take_a_byte_or_half_of_one_and_are_near(kind, bytes_per_entry, error):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    kept = kind(weight, None)
    found = kept.part(slice(None), slice(None))
    assert kept.nbytes <= bytes_per_entry * weight.numel()
    assert (found - weight).norm() < error * weight.norm()
    assert not found[3].any()


def test_an_odd_width_is_refused_in_4_bits():
    with pytest.raises(ValueError, match="a layer has 33; take 8bit"):
        Nf4Linear(torch.ones(2, 33), None)


def test_code_that_multiplies_by_a_weight_itself_is_refused():
    layer = QuantizedLayer(Int8Linear(torch.ones(2, 32), None))
    with pytest.raises(ValueError, match="looks at weights that --load-in keeps"):
        functional.linear(torch.ones(1, 32), layer.weight)
    bare = tiny_model("bert").base_model
    bare.encoder.layer = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="has no linear layers for --load-in"):
        quantize(bare, "8bit", torch.device("cpu"), torch.float32)


CASES = {
    "llama": ("InterfaceEncoder", "operators"), "gpt2": ("InterfaceEncoder", "operators"),
    "gemma2": ("InterfaceEncoder", "accelerator"), "qwen2": ("RectangleEncoder", "slow"),
    "bert": ("InterfaceEncoder", "kernels"), "deberta-v2": ("RectangleEncoder", "operators"),
}  # fmt: skip


@pytest.mark.parametrize("load_in", FORMATS)
@pytest.mark.parametrize("architecture", CASES)
def test_a_run_is_one_on_rounded_weights(architecture, load_in, monkeypatch):
    encoder, backend = CASES[architecture]
    monkeypatch.setattr("plait.model.backend.fastest", lambda _device, _dtype: backend)
    classifies = architecture in ("bert", "deberta-v2")
    model = (tiny_model if classifies else tiny_causal_model)(architecture)
    objective = CLASSIFICATION if classifies else LANGUAGE
    tokens = random_tokens() if classifies else asked_tokens()
    rounded = copy.deepcopy(model)
    for layer in block_layers(rounded.base_model).values():
        transposed = architecture == "gpt2"
        weight = layer.weight.data.T if transposed else layer.weight.data
        weight.copy_(ROUNDED[load_in](weight))
    found = []
    for base, setting in ((rounded, None), (model, load_in)):
        config = dataclasses.replace(CONFIG, load_in=setting)
        backbone = Backbone(Loaded(copy.deepcopy(base), None, ()), config, objective=objective)
        stack = initial_stack(backbone.layout, backbone.head_start, 3, 0, backbone.device)
        shares = np.array_split(np.arange(len(tokens)), 3)
        losses = local_phase(backbone, stack, Factor.AB, 0, tokens, shares, range(3), config)
        judged = evaluate(backbone, stack.factors, tokens.take(np.arange(9)))[0]
        found.append((torch.from_numpy(losses).float(), judged, backbone))
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-6)
    assert type(found[1][2].encoder).__name__ == encoder
