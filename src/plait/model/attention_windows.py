"""Attention within each of many short texts by PyTorch's operators, the gradient written out.

Texts lie side by side in small windows, and every product is a batched one over all windows of a
size. PyTorch's own fused attention is made for long texts, and slower on these.

Legend: T tokens, d the model's width, H heads; w windows of S slots, for each size of window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.data.tokens import Batch
from plait.machine.devices import moved


@dataclass(frozen=True)
class Places:
    """Where tokens go in windows that have more room than there are tokens.

    Attributes:
        index: (slots,) int64, the token in each slot; 0 where there is none.
        inverse: (T,) int64, the slot of each token; 0 for padding.
    """

    index: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, slots: np.ndarray, size: int, padding: int) -> Places:
        """Tokens at `slots` (T - padding,) of `size`; the padding goes nowhere."""
        index = np.zeros(size, dtype=np.int64)
        index[slots] = np.arange(len(slots))
        inverse = np.concatenate([slots, np.zeros(padding, dtype=np.int64)])
        return cls(torch.from_numpy(index), torch.from_numpy(inverse))

    def to(self, device: torch.device) -> Places:
        """The same places on a device."""
        return Places(moved(self.index, device), moved(self.inverse, device))


class Slices:
    """Where each head's slice of each token lies in the windows: one move there, one back.

    A slot without a text gets some token's slice; no text attends to it.
    """

    def __init__(self, windows: Places, apart: list[Tensor], num_heads: int, parts: int) -> None:
        """Places for arrays (T, parts d): 3 for query, key and value, 1 for one alone."""
        device = windows.index.device
        part = torch.arange(parts, device=device).view(-1, 1, 1, 1)
        head = torch.arange(num_heads, device=device).view(1, 1, -1, 1)
        sizes = [(one.shape[0], one.shape[1]) for one in apart]
        tokens = windows.index.split([w * S for w, S in sizes])
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
        self._back = torch.cat(back)[windows.inverse].flatten()

    def split(self, x: Tensor) -> Iterator[Tensor]:
        """(T, parts d) -> for each size of window (parts, w H, S, d / H)."""
        slices = x.reshape(-1, x.shape[1] // self.per_token)
        for there, shape in zip(self._there, self._shapes, strict=True):
            yield slices.index_select(0, there).view(*shape, -1)

    def views(self, slices: Tensor) -> list[Tensor]:
        """(count, d / H) in the order of `split`, without a copy."""
        blocks = slices.split([parts * wH * S for parts, wH, S in self._shapes])
        return [block.view(*shape, -1) for block, shape in zip(blocks, self._shapes, strict=True)]

    def join(self, slices: Tensor) -> Tensor:
        """(count, d / H) -> (T, parts d), the reverse of `split`."""
        return slices.index_select(0, self._back).view(-1, self.per_token * slices.shape[1])


class Windows:
    """The windows of a batch, as attention with so many heads needs them."""

    def __init__(
        self, batch: Batch, num_heads: int, dtype: torch.dtype, per_octave: int = 4
    ) -> None:
        """Work out all places, once for all layers; scores will be of `dtype`.

        There are at most `per_octave` sizes of window up to each power of two.
        """
        self.num_heads = num_heads
        padding = len(batch.ids) - batch.num_tokens
        # A softmax over rows that don't fill vector registers, 64 bytes, is several times slower.
        windows, apart = lay_out(batch.sizes, padding, 64 // dtype.itemsize, per_octave)
        windows = windows.to(batch.ids.device)
        apart = [moved(one, batch.ids.device) for one in apart]
        # (w H, S, S) for each size: what is added to the scores, -inf for another text's slot.
        self.masks = [
            torch.zeros(one.shape, dtype=dtype, device=one.device)
            .masked_fill_(one, float("-inf"))
            .repeat_interleave(num_heads, dim=0)
            for one in apart
        ]
        self.qkv = Slices(windows, apart, num_heads, 3)
        self.one = Slices(windows, apart, num_heads, 1)


def attention_in_windows(qkv: Tensor, windows: Windows) -> Tensor:
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


def lay_out(
    texts: np.ndarray, padding: int, slots: int, per_octave: int = 4
) -> tuple[Places, list[Tensor]]:
    """Whole texts side by side in windows of, say, 16, 32, 48, 64, 80, 96, 112, 128, 160 slots.

    Few slots are wasted, and the calls are far fewer than with a rectangle for each length. No
    window has texts of two clients: what a client computes, to the last bit, does not depend on
    who else is in the batch.

    Args:
        texts: (n, b), tokens of each text.
        padding: Tokens of no text at the end.
        slots: A power of two that the number of slots of a window is a multiple of.
        per_octave: At most so many sizes up to each power of two.

    Returns:
        Places of the tokens in w_1 windows of S_1 slots, then w_2 larger ones of S_2, and so on;
        and for each size (w_i, S_i, S_i) bool, whether two slots are of different texts.
    """
    lengths = texts.ravel()
    starts = np.cumsum(lengths) - lengths
    steps = 2.0 ** np.frexp(lengths - 1)[1] / 2 / per_octave
    steps = np.maximum(slots, steps).astype(np.int64)
    sizes = -(-lengths // steps) * steps
    begins = np.empty(len(lengths), dtype=np.int64)
    shapes = []
    num_slots = 0
    for size in np.unique(sizes).tolist():
        begin = num_slots
        alike = np.flatnonzero(sizes == size)
        for mine in np.split(alike, np.flatnonzero(np.diff(alike // texts.shape[1])) + 1):
            within, count = _side_by_side(lengths[mine], size)
            begins[mine] = num_slots + within
            num_slots += count * size
        shapes.append(((num_slots - begin) // size, size))
    places = np.arange(lengths.sum()) + np.repeat(begins - starts, lengths)
    text_of_slot = np.full(num_slots, -1)
    text_of_slot[places] = np.repeat(np.arange(len(lengths)), lengths)
    apart = []
    end = 0
    for count, size in shapes:
        begin, end = end, end + count * size
        windows = text_of_slot[begin:end].reshape(count, size)
        # Empty slots attend to each other, which keeps their unused softmax finite.
        apart.append(torch.from_numpy(windows[:, :, None] != windows[:, None, :]))
    return Places.of(places, num_slots, padding), apart


def _side_by_side(lengths: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Where each text begins in windows of `size` slots, end to end, and how many there are.

    A window takes the longest text that is left, and then the shortest ones while they fit.
    """
    begins = np.empty(len(lengths), dtype=np.int64)
    order = lengths.argsort(kind="stable").tolist()
    shortest, longest, window = 0, len(order) - 1, 0
    while shortest <= longest:
        text = order[longest]
        longest -= 1
        begins[text] = window * size
        used = int(lengths[text])
        while shortest <= longest and used + lengths[order[shortest]] <= size:
            begins[order[shortest]] = window * size + used
            used += int(lengths[order[shortest]])
            shortest += 1
        window += 1
    return begins, window
