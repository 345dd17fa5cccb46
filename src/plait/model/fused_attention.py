"""Attention within each of many short texts by the CPU's own kernel.

Legend: T tokens, d the model's width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.data.tokens import Batch
from plait.model.kernels.compiled import Kernels


def fused_attention(qkv: Tensor, batch: Batch, num_heads: int, kernels: Kernels) -> Tensor:
    """softmax(q k^T / sqrt(d / H)) v within each text, (T, 3 d) -> (T, d)."""
    return _FusedAttention.apply(qkv, batch, num_heads, kernels)  # type: ignore[no-any-return, no-untyped-call]


class _FusedAttention(torch.autograd.Function):
    """The kernel's; the softmax is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, batch: Batch, num_heads: int, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.batch, ctx.num_heads, ctx.kernels = batch, num_heads, kernels
        return kernels.attention(qkv, batch, num_heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (qkv,) = ctx.saved_tensors
        grad_qkv = ctx.kernels.attention(qkv, ctx.batch, ctx.num_heads, grad.contiguous())
        return grad_qkv, None, None, None
