"""The layers of a BERT-like encoder as one call each way, where the CPU has the kernels.

A layer is computed in two parts. The first is query, key and value with their LoRA branches and
attention, a few texts of one client at a time; the second all that follows, a few hundred tokens at
a time. So what one product makes is still in cache when the next one reads it, and only what the
backward pass needs goes to memory. packed_encoder.py computes the same step by step, and stands in
where layers aren't of this kind.

Legend: T tokens of a batch, R its texts, n its clients, d the model's width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.data.tokens import Batch
from plait.model.frozen_linear import KernelLinear
from plait.model.kernels.compiled import LONG, POINTER

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
        ("part", LONG * 3), ("place", LONG * 3), ("count", LONG),
    )  # fmt: skip


class _Adapters(ctypes.Structure):
    """Of kernels.c: struct adapters."""

    _fields_ = (
        ("A", POINTER), ("B", POINTER), ("places", LONG), ("r", LONG), ("scale", ctypes.c_float),
    )  # fmt: skip


class _Pieces(ctypes.Structure):
    """Of kernels.c: struct pieces."""

    _fields_ = (
        ("text", POINTER), ("portion", POINTER), ("starts", POINTER), ("lengths", POINTER),
        ("count", LONG), ("texts_each", LONG), ("rows", LONG), ("longest", LONG),
        ("texts", LONG), ("tokens", LONG),
    )  # fmt: skip


class _Kept(ctypes.Structure):
    """Of kernels.c: struct kept."""

    _fields_ = tuple(
        (name, POINTER) for name in ("out", "qkv", "low", "sum_1", "sum_2", "derivative")
    )


class Pieces:
    """A batch's texts in pieces of one client each.

    Gradients are summed over portions of a piece, which depend on their client alone. So the sums
    don't depend on who else is in the batch, nor on how many threads share it.
    """

    def __init__(self, batch: Batch) -> None:
        """Cut a batch without padding: for one thread in large pieces, for several in small."""
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
            batch.sizes.size, batch.num_tokens,
        )  # fmt: skip


class FusedLayer:
    """An encoder layer's frozen weights, as the kernels want them.

    Attributes:
        d: The model's width.
        f: The width between up and down.
        count: At how many of query, key and value LoRA sits.
        struct: Of kernels.c: struct layer.
    """

    def __init__(
        self,
        linears: dict[str, KernelLinear],
        norms: dict[str, nn.LayerNorm],
        num_heads: int,
        places: dict[int, int],
    ) -> None:
        """Take note of where everything lies.

        Args:
            linears: qkv, merge, up, down.
            norms: norm_1, norm_2.
            num_heads: H.
            places: 0 for query, 1 for key, 2 for value -> the number of the place, where LoRA sits.
        """
        self._keep = linears, norms
        self.kernels = linears["qkv"].kernels
        self.f, self.d = linears["up"].weight.shape
        self.count = len(places)
        fields: dict[str, Any] = {"d": self.d, "f": self.f, "H": num_heads, "count": self.count}
        for name, linear in linears.items():
            fields[name] = linear.packed.data_ptr()
            fields[name + "_back"] = linear.packed_t.data_ptr()
            assert linear.bias is not None
            fields[name + "_bias"] = linear.bias.data_ptr()
        for name, norm in norms.items():
            fields[name] = _Norm(norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps)
        fields |= {"part": (LONG * 3)(*places), "place": (LONG * 3)(*places.values())}
        self.struct = _Weights(**fields)


class FusedLayers:
    """Layers one after another."""

    def __init__(self, layers: Sequence[FusedLayer], places: int, scale: float) -> None:
        """Put the layers together.

        Args:
            layers: The layers, none of whose inputs needs a gradient but for what LoRA adds.
            places: Adapted layers of the whole model.
            scale: What the branches are multiplied by.
        """
        self.layers, self.places, self.scale = layers, places, scale
        self.structs = (_Weights * len(layers))(*(layer.struct for layer in layers))

    def __call__(
        self, h: Tensor, pieces: Pieces, A: Tensor, B: Tensor, first_tokens: bool
    ) -> Tensor:
        """(T, d) -> (T, d), or (R, d) of the first tokens.

        Args:
            h: The first layer's input, which has no gradient.
            pieces: The texts of n clients, cut.
            A: (n, P) the clients' A factors.
            B: (n, P) their B factors.
            first_tokens: Only these are wanted.
        """
        return _FusedLayers.apply(A, B, h, self, pieces, first_tokens)  # type: ignore[no-any-return, no-untyped-call]


class _FusedLayers(torch.autograd.Function):
    """The gradient of a factor that doesn't train is never formed."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        h: Tensor,
        own: FusedLayers,
        pieces: Pieces,
        first_tokens: bool,
    ) -> Tensor:
        A, B, h, threads = A.contiguous(), B.contiguous(), h.contiguous(), torch.get_num_threads()
        count, d, (T, R) = len(own.layers), own.layers[0].d, (len(h), pieces.struct.texts)
        rank = A.shape[1] // (own.places * d)
        kept = any(ctx.needs_input_grad)
        arrays: list[list[Tensor]] = []
        for number, layer in enumerate(own.layers):
            height = R if first_tokens and number == count - 1 else T
            wide = -(-layer.count * rank // 16) * 16
            inner = [(T, 3 * d), (T, wide), (height, d), (height, d), (height, layer.f)]
            # What isn't kept goes to and fro between two arrays.
            out = h.new_empty(height, d) if kept or number < 2 or height == R else arrays[-2][0]
            arrays.append([out, *(h.new_empty(shape) for shape in inner if kept)])
        structs = (_Kept * count)(*(_Kept(*(a.data_ptr() for a in one)) for one in arrays))
        lora = _Adapters(A.data_ptr(), B.data_ptr(), own.places, rank, own.scale)
        own.layers[0].kernels.call(
            "layers", structs, h, own.structs, lora, count, pieces.struct, first_tokens, threads
        )
        result = arrays[-1][0]
        if kept:
            ctx.own, ctx.pieces, ctx.first_tokens = own, pieces, first_tokens
            # The order in which the kernels keep numbers depends on how many threads there were.
            ctx.structs, ctx.lora, ctx.threads = structs, lora, threads
            arrays[-1] = arrays[-1][1:]  # nobody needs the result again
            ctx.save_for_backward(A, B, h, *(array for one in arrays for array in one))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        A, B, h, *_ = ctx.saved_tensors
        own, lora = ctx.own, ctx.lora
        trains_A, trains_B, *_ = ctx.needs_input_grad
        grad_A = torch.empty_like(A) if trains_A else None
        grad_B = torch.empty_like(B) if trains_B else None
        pointers = (None if one is None else one.data_ptr() for one in (grad_A, grad_B))
        grads = _Adapters(*pointers, lora.places, lora.r, lora.scale)
        own.layers[0].kernels.call(
            "layers_gradient", grads, grad.contiguous(), ctx.structs, h, own.structs, lora,
            len(own.layers), ctx.pieces.struct, ctx.first_tokens, ctx.threads,
        )  # fmt: skip
        if grad_B is not None:  # each place's is transposed
            grad_B = grad_B.view(len(B), lora.places, lora.r, -1).mT.reshape(B.shape)
        return grad_A, grad_B, *[None] * 4
