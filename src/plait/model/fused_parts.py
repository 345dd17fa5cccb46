"""Parts of decoders by the CPU's own kernels: RMSNorm, rotary positions, gated MLPs, attention.

transformers computes each of them in many passes over memory; the kernels in one or two each way.

Legend: T tokens, H heads of queries and G of keys and values, e a head's width, d the model's
width, f that between the two layers of an MLP.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.data.tokens import Batch
from plait.model.kernels.compiled import Kernels

LANES = 16
"""Widths must be multiples of so many numbers."""


# -- RMSNorm


class FusedRmsNorm(nn.Module):
    """x / rms(x) * gain, over the last dimension."""

    def __init__(self, gain: Tensor, epsilon: float, kernels: Kernels) -> None:
        super().__init__()
        self.gain, self.epsilon, self.kernels = gain.float().contiguous(), epsilon, kernels

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return _RmsNorm.apply(x.contiguous(), self)  # type: ignore[no-any-return, no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: FusedRmsNorm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        y = torch.empty_like(x)
        norm.kernels.call("rms_norm", y, x, norm.gain, *_rows(x), norm.epsilon, _threads())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        gain, epsilon, kernels = ctx.norm.gain, ctx.norm.epsilon, ctx.norm.kernels
        to, grad = torch.empty_like(x), grad.contiguous()
        kernels.call("rms_norm_gradient", to, grad, x, gain, *_rows(x), epsilon, _threads())
        return to, None


def fused_rms_norm(norm: Any, kernels: Kernels) -> FusedRmsNorm | None:
    """The same norm, where it is one: some architectures multiply by 1 + weight."""
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    named = type(norm).__name__.endswith("RMSNorm")
    if not named or epsilon is None or weight is None or len(weight) % LANES:
        return None
    for gain in (weight, 1 + weight):
        ours = FusedRmsNorm(gain.detach(), epsilon, kernels)
        if alike(ours, norm, len(weight), weight.dtype):
            return ours
    return None


# -- rotary positions


@dataclass(frozen=True)
class FusedRotary:
    """What modeling files call `apply_rotary_pos_emb`, by the kernel where it is the usual rule.

    Attributes:
        own: The architecture's.
        kernels: The kernels.
    """

    own: Callable[..., tuple[Tensor, Tensor]]
    kernels: Kernels

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """(1, H, T, e), (1, G, T, e), and (1, T, e) twice -> what q and k become."""
        width = q.shape[-1]
        usual = cos.shape == (1, q.shape[-2], width) and not width % (2 * LANES)
        if not usual or others or named:
            return self.own(q, k, cos, sin, *others, **named)
        cos, sin = cos.contiguous(), sin.contiguous()
        return tuple(_Rotary.apply(x, cos, sin, self.kernels) for x in (q, k))  # type: ignore[no-untyped-call]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return _rotated(x, cos, sin, kernels, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, ctx.kernels, back=True), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels, back: bool) -> Tensor:
    """(1, H, T, e) -> (1, H, T, e), in memory (T, H, e)."""
    _, heads, tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(1, tokens, heads, width)
    sizes = tokens, heads, width, back, _threads()
    kernels.call("rotary", out, x, x.stride(2), x.stride(1), cos, sin, *sizes)
    return out.transpose(1, 2)


ROTARY = "apply_rotary_pos_emb"


def with_fused_rotary(attention: Any, kernels: Kernels) -> types.MethodType | None:
    """The module's own `forward` that calls our rotary function, if that is the usual rule."""
    forward = type(attention).forward
    own = getattr(forward, "__globals__", {}).get(ROTARY)
    if own is None or ROTARY not in forward.__code__.co_names or not is_usual_rotary(own):
        return None
    ours = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, ROTARY: FusedRotary(own, kernels)},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(ours, attention)


def is_usual_rotary(own: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether an architecture's rule is the usual one, which the kernel computes."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 8, generator=generator)
    usual = [x * cos + torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * sin for x in (q, k)]
    try:
        found = own(q, k, cos, sin)
    except Exception:  # it takes something else
        return False
    return all(_close(*pair) for pair in zip(found, usual, strict=True))


# -- gated MLPs


class Gated(nn.Module):
    """silu(gate) up, which lie side by side."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2 f) -> (..., f)."""
        return _Gated.apply(x.contiguous(), self.kernels)  # type: ignore[no-any-return, no-untyped-call]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kernels = kernels
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        kernels.call("gated", y, x, *_rows(y), _threads())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        to, grad = torch.empty_like(x), grad.contiguous()
        ctx.kernels.call("gated_gradient", to, grad, x, *_rows(grad), _threads())
        return to, None


# -- attention


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, intervals: tuple[Tensor, Tensor], batch: Batch, scale: float,
    kernels: Kernels,
) -> Tensor:  # fmt: skip
    """Softmax attention within each text, where a query sees the keys of an interval.

    Args:
        q: (1, H, T, e).
        k: (1, G, T, e).
        v: (1, G, T, e).
        intervals: (T,) int32, the first key that a query sees and the first after the last one,
            counted from the text's first token.
        batch: Where the texts lie.
        scale: What q k^T is multiplied by.
        kernels: The kernels.

    Returns:
        (1, T, H, e).
    """
    return _Attention.apply(q, k, v, intervals, batch, scale, kernels)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    """The softmax is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, intervals: tuple[Tensor, Tensor], batch: Batch,
        scale: float, kernels: Kernels,
    ) -> Tensor:  # fmt: skip
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        ctx.save_for_backward(q, k, v)
        _, heads, tokens, width = q.shape
        ctx.others = (
            *intervals, batch.starts, batch.lengths, len(batch.starts), int(batch.sizes.max()),
            heads, k.shape[1], width, scale, _threads(),
        )  # fmt: skip
        ctx.kernels, ctx.padding = kernels, batch.num_tokens
        out = q.new_empty(1, tokens, heads, width)
        out[:, batch.num_tokens :] = 0
        kernels.call("interval_attention", out, *_placed(q, k, v), *ctx.others)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grads = [x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v)]
        for one in grads:
            one[:, ctx.padding :] = 0
        grad = grad.contiguous()
        placed = _placed(grad.transpose(1, 2), q, k, v)
        ctx.kernels.call("interval_attention_gradient", *grads, *placed, *ctx.others)
        return *(one.transpose(1, 2) for one in grads), None, None, None, None


def _placed(*arrays: Tensor) -> list[Tensor | int]:
    """Each of (1, H, T, e), and how far apart its tokens and its heads are."""
    return [part for x in arrays for part in (x, x.stride(2), x.stride(1))]


# -- for all of them


def fuse(base: Any, kernels: Kernels) -> Callable[[], None]:
    """Put ours in the place of a model's norms and rotary functions.

    Returns:
        What puts the model's own back.
    """
    undo = ExitStack()
    for name, module in list(base.named_modules()):
        if (norm := fused_rms_norm(module, kernels)) is not None:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, norm)
            undo.callback(setattr, base.get_submodule(parent), child, module)
        if (forward := with_fused_rotary(module, kernels)) is not None:
            module.forward = forward
            undo.callback(delattr, module, "forward")
    return undo.close


def _rows(x: Tensor) -> tuple[int, int]:
    """How many rows, and how wide."""
    return x.numel() // x.shape[-1], x.shape[-1]


def _threads() -> int:
    return torch.get_num_threads()


def alike(ours: nn.Module, own: nn.Module, width: int, dtype: torch.dtype) -> bool:
    """Whether two modules make the same of some rows."""
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        return _close(ours(x), own(x))


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-4 if found.dtype is torch.float32 else 3e-2
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
