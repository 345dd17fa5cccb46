"""A layer of a BERT-like encoder as two kernels each way, where the CPU has them.

The first computes query, key and value with their LoRA branches and attention, a few texts of one
client at a time; the second all that follows, a few hundred tokens at a time. So what one product
makes is still in cache when the next one reads it, and only what the backward pass needs goes to
memory. packed.py computes the same step by step, and stands in where a layer isn't of this kind.

Legend: T tokens of a batch, R its texts, n its clients, d the model's width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from plait.frozen import FrozenLinear
from plait.native import LONG, POINTER
from plait.tokens import Batch

PORTION_TOKENS, PIECE_TOKENS = 64, 256
"""About how many tokens of a client are summed at once, and at most computed together."""


class _Norm(ctypes.Structure):
    _fields_ = (("gain", POINTER), ("shift", POINTER), ("epsilon", ctypes.c_double))


class _Weights(ctypes.Structure):
    """Of kernels.c: struct layer."""

    _fields_ = (
        *(
            (linear + part, POINTER)
            for linear in ("qkv", "merge", "up", "down")
            for part in ("", "_back", "_bias")
        ),
        ("norm_1", _Norm), ("norm_2", _Norm), ("d", LONG), ("f", LONG), ("H", LONG),
    )  # fmt: skip


class _Adapters(ctypes.Structure):
    """Of kernels.c: struct adapters."""

    _fields_ = (
        ("A", POINTER * 3), ("B", POINTER * 3), ("client_A", LONG), ("client_B", LONG),
        ("part", LONG * 3), ("count", LONG), ("r", LONG), ("scale", ctypes.c_float),
    )  # fmt: skip


class _Pieces(ctypes.Structure):
    """Of kernels.c: struct pieces."""

    _fields_ = (
        ("text", POINTER), ("portion", POINTER), ("starts", POINTER), ("lengths", POINTER),
        ("count", LONG), ("texts_each", LONG), ("rows", LONG), ("longest", LONG),
    )  # fmt: skip


class Pieces:
    """A batch's texts in pieces of one client each.

    Gradients are summed over portions of a piece, which depend on their client alone. So the sums
    don't depend on who else is in the batch, nor on how many threads share it.
    """

    def __init__(self, batch: Batch) -> None:
        """Cut the batch: for one thread in large pieces, for several in small ones."""
        most = PIECE_TOKENS if torch.get_num_threads() == 1 else PORTION_TOKENS
        portions: list[int] = []  # their first texts
        pieces: list[int] = []  # their first portions
        rows: list[int] = []  # their tokens
        texts_each = batch.sizes.shape[1]
        for client, lengths in enumerate(batch.sizes.tolist()):
            tokens = PORTION_TOKENS  # of the portion; a client begins another
            for text, length in enumerate(lengths):
                if tokens + length > PORTION_TOKENS:
                    if text == 0 or rows[-1] + PORTION_TOKENS > most:
                        pieces.append(len(portions))
                        rows.append(0)
                    portions.append(client * texts_each + text)
                    tokens = 0
                tokens += length
                rows[-1] += length
        self._texts = torch.tensor([*portions, batch.sizes.size])
        self._portions = torch.tensor([*pieces, len(portions)])
        self._batch = batch
        self.struct = _Pieces(
            self._texts.data_ptr(), self._portions.data_ptr(), batch.starts.data_ptr(),
            batch.lengths.data_ptr(), len(pieces), texts_each, max(rows), int(batch.sizes.max()),
        )  # fmt: skip


class FusedLayer:
    """An encoder layer's frozen weights, as the kernels want them."""

    def __init__(
        self, linears: dict[str, FrozenLinear], norms: dict[str, nn.LayerNorm], num_heads: int
    ) -> None:
        """Take note of where everything lies.

        Args:
            linears: qkv, merge, up, down.
            norms: norm_1, norm_2.
            num_heads: H.
        """
        self._keep = linears, norms
        self.kernels: Any = linears["qkv"].kernels
        places: dict[str, Any] = {}
        for name, linear in linears.items():
            places[name] = linear.packed.data_ptr()
            places[name + "_back"] = linear.packed_t.data_ptr()
            places[name + "_bias"] = linear.bias.data_ptr()
        for name, norm in norms.items():
            places[name] = _Norm(norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps)
        self.f, self.d = linears["up"].weight.shape
        self.weights = _Weights(**places, d=self.d, f=self.f, H=num_heads)

    def __call__(
        self,
        h: Tensor,
        batch: Batch,
        pieces: Pieces,
        branches: dict[int, tuple[Tensor, Tensor]],
        scale: float,
        first_tokens: bool,
    ) -> Tensor:
        """(T, d) -> (T, d), or (R, d) of the first tokens.

        Args:
            h: The layer's input.
            batch: The packed texts of n clients, without filler.
            pieces: The same, cut.
            branches: 0 for query, 1 for key, 2 for value -> A (n, r, d) and B (n, d, r).
            scale: What the branches are multiplied by.
            first_tokens: Only these are wanted.
        """
        factors = [factor for pair in branches.values() for factor in pair]
        return _FusedLayer.apply(  # type: ignore[no-any-return, no-untyped-call]
            h, self, batch, pieces, list(branches), scale, first_tokens, *factors
        )


NUM_OTHERS = 7
"""Arguments of the function below before the factors."""


class _FusedLayer(torch.autograd.Function):
    """The gradient of a factor that doesn't train, or of the first input, is never formed."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        layer: FusedLayer,
        batch: Batch,
        pieces: Pieces,
        parts: list[int],
        scale: float,
        first_tokens: bool,
        *factors: Tensor,
    ) -> Tensor:
        kept = any(ctx.needs_input_grad)
        call, h, threads = layer.kernels.call, h.contiguous(), torch.get_num_threads()
        lora = _Adapters(count=len(parts), scale=scale)
        for k, (part, A, B) in enumerate(zip(parts, factors[::2], factors[1::2], strict=True)):
            lora.A[k], lora.B[k], lora.part[k] = A.data_ptr(), B.data_ptr(), part
            lora.client_A, lora.client_B, lora.r = A.stride(0), B.stride(0), A.shape[1]
        context = torch.empty_like(h)
        wide = -(-lora.count * lora.r // 16) * 16
        qkv, low = (h.new_empty(len(h), width) if kept else None for width in (3 * layer.d, wide))
        call("adapted_attention", context, qkv, low, h, layer.weights, lora, pieces.struct, threads)

        # Past attention tokens don't meet again.
        rest, own = (context[batch.starts], h[batch.starts]) if first_tokens else (context, h)
        out = torch.empty_like(own)
        inner = [
            own.new_empty(len(own), width) if kept else None
            for width in (layer.d, layer.d, layer.f)
        ]
        call("past_attention", out, *inner, rest, own, layer.weights, len(own), threads)
        ctx.layer, ctx.batch, ctx.pieces, ctx.lora = layer, batch, pieces, lora
        # The order in which the kernels keep numbers depends on how many threads there were.
        ctx.first_tokens, ctx.threads = first_tokens, threads
        ctx.save_for_backward(*inner, qkv, low, h, *factors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, batch, lora = ctx.layer, ctx.batch, ctx.lora
        sum_1, sum_2, derivative, qkv, low, h, *_ = ctx.saved_tensors
        needs_h, *_ = ctx.needs_input_grad
        trains_A, trains_B = (any(ctx.needs_input_grad[NUM_OTHERS + k :: 2]) for k in (0, 1))
        call, grad = layer.kernels.call, grad.contiguous()
        grad_context, grad_h = torch.empty_like(grad), torch.empty_like(grad)
        call(
            "past_attention_gradient", grad_context, grad_h, grad, sum_1, sum_2, derivative,
            layer.weights, len(grad), ctx.threads,
        )  # fmt: skip
        if ctx.first_tokens:
            grad_context, grad_h = (
                torch.zeros_like(h).index_copy_(0, batch.starts, one)
                for one in (grad_context, grad_h)
            )
        shape = (batch.num_clients, lora.count * lora.r, layer.d)
        grad_A, grad_B = (h.new_empty(shape) if trains else None for trains in (trains_A, trains_B))
        call(
            "adapted_attention_gradient", grad_h if needs_h else None, grad_A, grad_B, grad_context,
            qkv, low, h, layer.weights, lora, ctx.pieces.struct, ctx.threads,
        )  # fmt: skip
        each_A, each_B = (
            [None] * lora.count if one is None else one.chunk(lora.count, dim=1)
            for one in (grad_A, grad_B)
        )
        of_factors = (
            one
            for own_A, own_B in zip(each_A, each_B, strict=True)
            for one in (own_A, None if own_B is None else own_B.mT)
        )
        return grad_h if needs_h else None, *[None] * (NUM_OTHERS - 1), *of_factors
