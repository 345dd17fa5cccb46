"""Parts of decoders by the kernels are what PyTorch's operators say, and so are their gradients."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.cohere.modeling_cohere import (
    apply_rotary_pos_emb as interleaved,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from plait.data.tokens import Tokens, pack
from plait.model.attention_interface import TextWindows, attend, attending_within, mask_of
from plait.model.fused_parts import FusedRotary, Gated, fused_rms_norm, is_usual_rotary
from plait.model.kernels.compiled import kernels

WIDTH = 32
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.06}


@pytest.fixture(params=TOLERANCES, ids=str)
def dtype(request, compiler):
    """What is computed in."""
    torch.manual_seed(0)
    return request.param


def agree(dtype, ours, reference, *inputs):
    """Two functions' values and gradients, the second one's in float32."""
    found = []
    for compute, kind in ((ours, dtype), (reference, torch.float32)):
        x = [one.to(dtype).to(kind).requires_grad_() for one in inputs]
        y = compute(*x)
        together = torch.cat([one.flatten() for one in (y if isinstance(y, tuple) else (y,))])
        weights = torch.linspace(-1, 1, together.numel()).to(dtype).to(kind)
        found.append([together, *torch.autograd.grad(together, x, weights)])
    for one, other in zip(*found, strict=True):
        assert one.dtype is dtype
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(one.float(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", [LlamaRMSNorm, GemmaRMSNorm])
def test_a_norm(norm, dtype):
    own = norm(WIDTH, eps=1e-5)
    own.weight.data = torch.randn(WIDTH).to(dtype).float()
    ours = fused_rms_norm(deepcopy(own).to(dtype), kernels(dtype))
    agree(dtype, ours, own, torch.randn(1, 5, WIDTH))


def test_a_norm_that_does_something_else_stays(dtype):
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x).tanh()

    assert fused_rms_norm(OtherRMSNorm(WIDTH), kernels(dtype)) is None
    assert fused_rms_norm(LlamaRMSNorm(WIDTH - 1), kernels(dtype)) is None
    assert fused_rms_norm(nn.LayerNorm(WIDTH), kernels(dtype)) is None


def test_rotary_positions(dtype):
    cos, sin = torch.randn(2, 1, 5, WIDTH)
    q, k = torch.randn(1, 5, 4, WIDTH).transpose(1, 2), torch.randn(1, 2, 5, WIDTH)
    ours = FusedRotary(apply_rotary_pos_emb, kernels(dtype))
    place = [one.to(dtype) for one in (cos, sin)]
    there = [one.float() for one in place]
    agree(dtype, lambda *x: ours(*x, *place), lambda *x: apply_rotary_pos_emb(*x, *there), q, k)


def test_rotary_positions_of_another_kind_stay():
    assert is_usual_rotary(apply_rotary_pos_emb)
    assert not is_usual_rotary(interleaved)
    assert not is_usual_rotary(lambda x: x)


def test_a_gated_mlp(dtype):
    x = 4 * torch.randn(1, 5, 2 * WIDTH)
    agree(
        dtype, Gated(kernels(dtype)), lambda x: functional.silu(x[..., :WIDTH]) * x[..., WIDTH:], x
    )


def causal(_text, _head, query, key):
    return key <= query


RULES = {
    "causal": causal,
    "sliding": lambda *at: causal(*at) & (at[3] > at[2] - 7),
    "both ways": lambda _t, _h, query, key: (query >= 0) & (key >= 0),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", [WIDTH, 20])
def test_attention(rule, width, dtype):
    lengths = np.array([[1, 50], [130, 17]])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.zeros(starts[-1], np.int32)
    tokens = Tokens(ids, ids, starts, np.zeros(4, np.int64))
    batch = pack(tokens, np.arange(4).reshape(2, 2), padded=False)

    def ours(*qkv):
        with attending_within(TextWindows(batch, 4, kernels(dtype))):
            mask = mask_of(mask_function=RULES[rule])
            return attend(None, *qkv, mask, scaling=0.3)[0]

    def reference(q, k, v):
        found = []
        for begin, end in pairwise(starts):
            text = [x[0, :, begin:end].repeat_interleave(4 // x.shape[1], 0) for x in (q, k, v)]
            places = torch.arange(end - begin)
            seen = RULES[rule](0, 0, places[:, None], places[None])
            own = functional.scaled_dot_product_attention(*text, seen, scale=0.3)
            found.append(own.transpose(0, 1))
        return torch.cat(found)[None]

    q = torch.randn(1, 4, starts[-1], width)
    k, v = torch.randn(2, 1, starts[-1], 2, width).transpose(2, 3)
    agree(dtype, ours, reference, q, k, v)
