"""Attention of any architecture of transformers over packed tokens.

transformers lets others compute attention (`AttentionInterface`) and masks
(`AttentionMaskInterface`). A model that is told to use ours, `ATTENTION`, runs its own code on all
texts side by side as one long row, and asks here for attention: within each text, and by the
architecture's own rule, causal, within a sliding window, or whatever the mask function says that
transformers hands over.

Legend: T tokens, H heads of queries and G of keys and values, e a head's width; w windows of S
slots, for each size of window.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
)

from plait.data.tokens import Batch
from plait.machine.devices import moved
from plait.model.attention_windows import Places, lay_out
from plait.model.fused_parts import interval_attention
from plait.model.kernels.compiled import Kernels

ATTENTION = "plait"
"""What a model's config calls it."""

Rule = Callable[..., Any]
"""(text, head, place of a query, place of a key) -> whether the one attends to the other."""

SLOTS = 8
"""Windows have a multiple of so many slots."""


class TextWindows:
    """Where a batch's texts lie in windows, and what may attend to what there.

    No window has texts of two clients, so that a client's numbers don't depend on who else is
    there.

    Attributes:
        batch: The packed texts.
        kernels: What computes attention to intervals, if anything does.
    """

    def __init__(self, batch: Batch, per_octave: int, kernels: Kernels | None = None) -> None:
        """All places are worked out once for all layers, when they are asked for.

        Args:
            batch: The packed texts.
            per_octave: At most so many sizes of window up to each power of two.
            kernels: What computes attention to intervals.
        """
        self.batch, self.kernels, self._per_octave = batch, kernels, per_octave
        self._masks: dict[Rule, list[Tensor]] = {}
        self._intervals: dict[Rule, tuple[Tensor, Tensor] | None] = {}

    @cached_property
    def _layout(self) -> tuple[Places, list[Tensor]]:
        padding = len(self.batch.ids) - self.batch.num_tokens
        return lay_out(self.batch.sizes, padding, SLOTS, self._per_octave)

    @cached_property
    def index(self) -> Tensor:
        """(slots,) the token in each slot."""
        return moved(self._layout[0].index, self.batch.ids.device)

    @cached_property
    def inverse(self) -> Tensor:
        """(T,) the slot of each token."""
        return moved(self._layout[0].inverse, self.batch.ids.device)

    def split(self, slots: Tensor) -> list[Tensor]:
        """(slots, ...) -> for each size of window (w, S, ...)."""
        shapes = [one.shape[:2] for one in self._layout[1]]
        parts = slots.split([w * S for w, S in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def masks(self, rule: Rule) -> list[Tensor]:
        """For each size of window (w, 1, S, S) bool, whether a slot attends to another."""
        if rule not in self._masks:
            device = self.batch.ids.device
            filled = torch.zeros(len(self.index), dtype=torch.bool)
            filled[self._layout[0].inverse[: self.batch.num_tokens]] = True
            self._masks[rule] = [
                # Empty slots attend to each other, which keeps their unused softmax finite.
                (
                    moved(~apart, device)
                    & (rule(0, 0, slots[:, :, None], slots[:, None, :]) | empty[:, :, None])
                )[:, None]
                for apart, slots, empty in zip(
                    self._layout[1],
                    self.split(self.index),
                    self.split(moved(~filled, device)),
                    strict=True,
                )
            ]
        return self._masks[rule]

    def intervals(self, rule: Rule) -> tuple[Tensor, Tensor] | None:
        """(T,) int32 twice, the first token that each attends to and the first after the last one.

        Both are counted from the text's first token. None if some attend to others than those
        between two.
        """
        if rule not in self._intervals:
            self._intervals[rule] = self._find_intervals(rule)
        return self._intervals[rule]

    def _find_intervals(self, rule: Rule) -> tuple[Tensor, Tensor] | None:
        found = torch.zeros(2, len(self.batch.ids), dtype=torch.int32)
        for start, length in zip(self.batch.starts.tolist(), self.batch.sizes.flat, strict=True):
            places = torch.arange(start, start + length)
            seen = torch.as_tensor(rule(0, 0, places[:, None], places[None])).expand(length, length)
            first = seen.int().argmax(dim=1)
            last = length - seen.flip(1).int().argmax(dim=1)
            if not (seen.sum(dim=1) == last - first).all():
                return None
            found[:, start : start + length] = torch.stack([first, last])
        return found[0], found[1]


class _Now(threading.local):
    windows: TextWindows | None = None


_NOW = _Now()


@contextmanager
def attending_within(windows: TextWindows) -> Iterator[None]:
    """While this lasts, models of this thread attend within these windows."""
    _NOW.windows = windows
    try:
        yield
    finally:
        _NOW.windows = None


def _moved(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return _Move.apply(x, index, inverse)  # type: ignore[no-any-return, no-untyped-call]


class _Move(torch.autograd.Function):
    """x[index], where no token that counts is taken twice: the gradient is grad[inverse]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: (1, H, T, e), (1, G, T, e) twice -> (1, T, H, e).

    Raises:
        ValueError: The architecture adds to its scores what isn't known here.
    """
    for name in ("position_bias", "s_aux", "head_mask"):
        if others.get(name) is not None:
            raise ValueError(f"Attention with {name} isn't computed over packed tokens.")
    windows = _NOW.windows
    assert windows is not None
    if isinstance(attention_mask, _Mask):
        rule = attention_mask.rule
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        rule = causal_mask_function if causal else bidirectional_mask_function
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if windows.kernels and softcap is None and (seen := windows.intervals(rule)) is not None:
        own = interval_attention(query, key, value, seen, windows.batch, scale, windows.kernels)
        return own, None
    there, back = windows.index, windows.inverse
    qkv = (windows.split(_moved(x[0].transpose(0, 1), there, back)) for x in (query, key, value))
    parts = [
        _in_windows(q, k, v, mask, scale, softcap)
        for q, k, v, mask in zip(*qkv, windows.masks(rule), strict=True)
    ]
    return _moved(torch.cat(parts), back, there)[None], None


def _in_windows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """(w, S, H, e), (w, S, G, e) twice -> (w S, H, e)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if softcap is None:
        context = functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    else:
        scores = softcap * torch.tanh(q @ k.mT * (scale / softcap))
        context = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
    return context.transpose(1, 2).flatten(0, 1)


class _Mask:
    """What stands for a mask in a model that uses our attention: its rule."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule


def mask_of(*, mask_function: Rule, use_vmap: bool = False, **_others: Any) -> _Mask:
    """What transformers calls for a mask.

    Raises:
        ValueError: The rule doesn't take many places at once.
    """
    if use_vmap:
        raise ValueError("A mask function of its own isn't computed over packed tokens.")
    return _Mask(mask_function)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, mask_of)
