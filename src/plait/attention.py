"""Attention within each of many short texts: small windows, and the gradient written out.

Texts lie side by side in windows (tokens.py), and every product is a batched one over all windows
of a size. Fused attention kernels are made for long texts, and slower on these.

Legend: T tokens, d the model's width, H heads; w windows of S slots, for each size of window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from plait.tokens import Batch


class Slices:
    """Where each head's slice of each token lies in the windows: one move there, one back.

    A slot without a text gets some token's slice; no text attends to it.
    """

    def __init__(self, batch: Batch, num_heads: int, parts: int) -> None:
        """Places for arrays (T, parts d): 3 for query, key and value, 1 for one alone."""
        device = batch.ids.device
        part = torch.arange(parts, device=device).view(-1, 1, 1, 1)
        head = torch.arange(num_heads, device=device).view(1, 1, -1, 1)
        sizes = [(apart.shape[0], apart.shape[1]) for apart in batch.apart]
        tokens = batch.windows.index.split([w * S for w, S in sizes])
        self.per_token = parts * num_heads
        self._shapes = [(parts, w * num_heads, S) for w, S in sizes]
        self._there: list[Tensor] = []
        back: list[Tensor] = []
        begin = 0
        for token, (w, S) in zip(tokens, sizes, strict=True):
            rows = token.view(1, w, 1, S) * self.per_token + part * num_heads + head
            places = torch.arange(begin, begin + rows.numel(), device=device).view(rows.shape)
            self._there.append(rows.flatten())
            back.append(places.permute(1, 3, 0, 2).reshape(w * S, -1))
            begin += rows.numel()
        self.count = begin
        self._back = torch.cat(back)[batch.windows.inverse].flatten()

    def split(self, x: Tensor) -> Iterator[Tensor]:
        """(T, parts d) -> for each size of window (parts, w H, S, d / H)."""
        slices = x.reshape(-1, x.shape[1] // self.per_token)
        for there, shape in zip(self._there, self._shapes, strict=True):
            yield slices.index_select(0, there).view(*shape, -1)

    def views(self, slices: Tensor) -> list[Tensor]:
        """(count, d / H) in the arrangement of `split`, without a copy."""
        blocks = slices.split([parts * wH * S for parts, wH, S in self._shapes])
        return [block.view(*shape, -1) for block, shape in zip(blocks, self._shapes, strict=True)]

    def join(self, slices: Tensor) -> Tensor:
        """(count, d / H) -> (T, parts d), the reverse of `split`."""
        return slices.index_select(0, self._back).view(-1, self.per_token * slices.shape[1])


class Windows:
    """The windows of a batch, as attention with so many heads needs them."""

    def __init__(self, batch: Batch, num_heads: int, dtype: torch.dtype) -> None:
        """Work out all places, once for all layers; scores will be of `dtype`."""
        self.num_heads = num_heads
        # (w H, S, S) for each size: what is added to the scores, -inf for another text's slot.
        self.masks = [
            torch.zeros(apart.shape, dtype=dtype, device=apart.device)
            .masked_fill_(apart, float("-inf"))
            .repeat_interleave(num_heads, dim=0)
            for apart in batch.apart
        ]
        self.qkv = Slices(batch, num_heads, 3)
        self.one = Slices(batch, num_heads, 1)


def attention(qkv: Tensor, windows: Windows) -> Tensor:
    """softmax(q k^T / sqrt(d / H)) v within each text, (T, 3 d) -> (T, d)."""
    return _Attention.apply(qkv, windows)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    """The softmax, w H S^2 numbers, is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, windows: Windows) -> Tensor:
        width = qkv.shape[1] // windows.qkv.per_token
        contexts = qkv.new_empty(windows.one.count, width)
        ctx.windows, ctx.scale = windows, width**-0.5
        saved = []
        for (q, k, v), mask, (context,) in zip(
            windows.qkv.split(qkv), windows.masks, windows.one.views(contexts), strict=True
        ):
            scores = torch.baddbmm(mask, q, k.mT, alpha=ctx.scale)
            weights = scores.softmax(dim=-1)
            torch.bmm(weights, v, out=context)
            saved += [q, k, v, weights]
        ctx.save_for_backward(*saved)
        return windows.one.join(contexts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        windows, saved = ctx.windows, iter(ctx.saved_tensors)
        grads = grad.new_empty(windows.qkv.count, grad.shape[1] // windows.num_heads)
        for (grad_context,), (grad_q, grad_k, grad_v) in zip(
            windows.one.split(grad), windows.qkv.views(grads), strict=True
        ):
            q, k, v, weights = (next(saved) for _ in range(4))
            grad_weights = torch.bmm(grad_context, v.mT)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores.mul_(ctx.scale)
            torch.bmm(grad_scores, k, out=grad_q)
            torch.bmm(grad_scores.mT, q, out=grad_k)
            torch.bmm(weights.mT, grad_context, out=grad_v)
        return windows.qkv.join(grads), None
