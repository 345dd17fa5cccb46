"""GELU that writes over what it is given, the largest arrays of a layer.

Autograd forbids that where somebody else may look at them; here nobody does, since they are what
the frozen layers below and above have just computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plait.model.kernels.compiled import Kernels


def gelu_in_place(x: Tensor, kernels: Kernels | None = None) -> Tensor:
    """GELU of x, whose memory is used again; by the kernels, or by PyTorch's operators."""
    return _Gelu.apply(x, kernels)  # type: ignore[no-any-return, no-untyped-call]


class _Gelu(torch.autograd.Function):
    """The kernel leaves the derivative where x was, PyTorch's operator x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels | None) -> Tensor:
        y = kernels.gelu(x) if kernels else functional.gelu(x)
        ctx.holds_derivative = kernels is not None
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.holds_derivative:
            return grad.mul_(x), None
        return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad), None
