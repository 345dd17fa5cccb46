"""LoRA branches of many clients on one frozen layer.

Legend: T tokens of a batch, n its clients, r the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from plait.data.tokens import Batch

if TYPE_CHECKING:
    from plait.model.backend import Backend


def grouped_branches(
    y: Tensor,
    x: Tensor,
    batch: Batch,
    scale: float,
    columns: list[slice],
    backend: Backend,
    *factors: Tensor,
) -> Tensor:
    """Y with the branches added in place, by the backend's grouped products."""
    return _Branches.apply(y, x, batch, scale, columns, backend, *factors)  # type: ignore[no-any-return, no-untyped-call]


class _Branches(torch.autograd.Function):
    """LoRA branches of n clients, added to y in place, and the gradient written out.

    y[:, columns] += s (x A^T) B^T for each branch. A client's tokens lie side by side, so its
    products need no move, and add to what is there. All branches see the same x, so their A's are
    multiplied as one. Kept for the backward pass: x A^T, which is r wide, and x only where an A
    trains. The gradient of a factor that doesn't train, or of the first input, is never formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        batch: Batch,
        scale: float,
        columns: list[slice],
        backend: Backend,
        *factors: Tensor,
    ) -> Tensor:
        A = torch.cat(factors[::2], dim=1).to(x.dtype)
        Bs = [B.to(x.dtype) for B in factors[1::2]]
        low = x.new_empty(len(x), A.shape[1])
        backend.grouped_matmul(low, x, A.mT, batch)
        low.mul_(scale)
        for part, own, B in zip(columns, low.chunk(len(columns), 1), Bs, strict=True):
            backend.grouped_matmul(y[:, part], own, B.mT, batch, add=True)
        ctx.batch, ctx.scale, ctx.columns, ctx.backend = batch, scale, columns, backend
        trains_A = any(ctx.needs_input_grad[6::2])
        ctx.save_for_backward(A, low, x if trains_A else None, *Bs)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        batch, backend, count = ctx.batch, ctx.backend, len(ctx.columns)
        A, low, x, *Bs = ctx.saved_tensors
        _, needs_x, *_ = ctx.needs_input_grad
        trains_A, trains_B = (any(ctx.needs_input_grad[6 + k :: 2]) for k in (0, 1))
        parts = [grad[:, part] for part in ctx.columns]
        grad_x: Tensor | None = None
        grad_A: Sequence[Tensor | None] = [None] * count
        grad_B = grad_A
        if trains_B:
            lows = low.chunk(count, dim=1)
            grad_B = [
                backend.grouped_matmul_t(*pair, batch).mT for pair in zip(lows, parts, strict=True)
            ]
        if trains_A or needs_x:
            grad_low = torch.empty_like(low)
            for own, part, B in zip(grad_low.chunk(count, dim=1), parts, Bs, strict=True):
                backend.grouped_matmul(own, part, B, batch)
            grad_low.mul_(ctx.scale)
        if trains_A:
            grad_A = backend.grouped_matmul_t(grad_low, x, batch).chunk(count, dim=1)
        if needs_x:
            grad_x = grad.new_empty(len(grad), A.shape[2])
            grad_x[batch.num_tokens :] = 0  # the padding has no branch
            backend.grouped_matmul(grad_x, grad_low, A, batch)
        each = zip(grad_A, grad_B, strict=True)
        return grad, grad_x, *[None] * 4, *(one for pair in each for one in pair)


def batched_branches(
    y: Tensor, x: Tensor, batch: Batch, scale: float, columns: list[slice], *factors: Tensor
) -> Tensor:
    """The same in few products, of a rectangle with a row for each client."""
    A = torch.cat(factors[::2], dim=1).to(x.dtype)
    wide = [
        functional.pad(B.mT.to(x.dtype), (part.start, y.shape[1] - part.stop))
        for part, B in zip(columns, factors[1::2], strict=True)
    ]
    low = torch.bmm(batch.rectangle(x), A.mT) * scale
    added = torch.bmm(low, torch.cat(wide, dim=1)).flatten(0, 1)[batch.slots]
    return y + added
