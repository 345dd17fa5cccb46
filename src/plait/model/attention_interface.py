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
from plait.model.attention_windows import lay_out

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
    """

    def __init__(self, batch: Batch, per_octave: int) -> None:
        """Work out all places, once for all layers.

        Args:
            batch: The packed texts.
            per_octave: At most so many sizes of window up to each power of two.
        """
        device = batch.ids.device
        places, apart = lay_out(batch.sizes, len(batch.ids) - batch.num_tokens, SLOTS, per_octave)
        shapes = [one.shape[:2] for one in apart]
        filled = torch.zeros(len(places.index), dtype=torch.bool)
        filled[places.inverse[: batch.num_tokens]] = True
        self.index, self.inverse = (moved(one, device) for one in (places.index, places.inverse))
        self._sizes = [w * S for w, S in shapes]
        self._shapes = shapes
        self._together = [moved(~one, device) for one in apart]
        self._empty = self.split(moved(~filled, device))
        self._slots = self.split(self.index)
        self._masks: dict[Rule, list[Tensor]] = {}

    def split(self, slots: Tensor) -> list[Tensor]:
        """(slots, ...) -> for each size of window (w, S, ...)."""
        parts = slots.split(self._sizes)
        return [part.unflatten(0, shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def masks(self, rule: Rule) -> list[Tensor]:
        """For each size of window (w, 1, S, S) bool, whether a slot attends to another."""
        if rule not in self._masks:
            self._masks[rule] = [
                # Empty slots attend to each other, which keeps their unused softmax finite.
                (together & (rule(0, 0, slots[:, :, None], slots[:, None, :]) | empty[:, :, None]))[
                    :, None
                ]
                for together, slots, empty in zip(
                    self._together, self._slots, self._empty, strict=True
                )
            ]
        return self._masks[rule]


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
    there, back = windows.index, windows.inverse
    qkv = (windows.split(_moved(x[0].transpose(0, 1), there, back)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
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
