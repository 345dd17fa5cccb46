"""Attention within each of many short texts: by the CPU's own kernel, or in windows.

Legend: T tokens, d the model's width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plait.data.tokens import Batch
from plait.model.attention_windows import Windows, attention_in_windows
from plait.model.kernels.compiled import Kernels, kernels

Attention = Callable[[Tensor], Tensor]
"""softmax(q k^T / sqrt(d / H)) v within each text, (T, 3 d) -> (T, d)."""


def attention(batch: Batch, num_heads: int, like: Tensor) -> Attention:
    """Attention over a batch's texts, with all that its layers share worked out once.

    Args:
        batch: The texts.
        num_heads: H.
        like: Some array of the type in which the model computes.
    """
    fused = kernels(like)
    if fused:
        return lambda qkv: _FusedAttention.apply(qkv, batch, num_heads, fused)  # type: ignore[no-untyped-call]
    windows = Windows(batch, num_heads, like.dtype)
    return lambda qkv: attention_in_windows(qkv, windows)


class _FusedAttention(torch.autograd.Function):
    """The kernel's; the softmax is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, batch: Batch, num_heads: int, fused: Kernels) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.batch, ctx.num_heads, ctx.fused = batch, num_heads, fused
        return fused.attention(qkv, batch, num_heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (qkv,) = ctx.saved_tensors
        grad_qkv = ctx.fused.attention(qkv, ctx.batch, ctx.num_heads, grad.contiguous())
        return grad_qkv, None, None, None
