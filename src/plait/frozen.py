"""Frozen linear layers, their weights laid out for the machine beforehand.

Legend: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from plait.devices import bfloat16_units
from plait.native import frozen_kernels


class FrozenLinear:
    """x W^T + b with W frozen and, on the CPU, laid out for our kernel or for oneDNN's.

    Attributes:
        kernels: Ours, which multiply a bit faster than oneDNN and want no width beforehand; or
            None.
        weight: (d_out, d_in).
        bias: (d_out,).
        packed: W as the forward pass wants it.
        packed_t: W as the backward pass wants it.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        """The layers side by side, as one: (d_out_1 + d_out_2 + ..., d_in)."""
        self.weight = torch.cat([layer.weight for layer in layers]).detach().contiguous()
        self.bias = torch.cat([layer.bias for layer in layers]).detach()
        self.kernels = frozen_kernels(self.weight)
        self.prepacked = (
            self.weight.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and (self.weight.dtype is torch.float32 or bfloat16_units())
        )
        if self.kernels:
            self.packed = self.kernels.arrange(self.weight.t())
            self.packed_t = self.kernels.arrange(self.weight)
        elif self.prepacked:
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self.packed = reorder(self.weight)
            self.packed_t = reorder(self.weight.t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out)."""
        if self.kernels:
            return self.kernels.linear(x.contiguous(), self.packed, self.bias, len(self.weight))
        if self.prepacked:
            linear = torch.ops.mkldnn._linear_pointwise
            return linear(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return functional.linear(x, self.weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        """(T, d_out) -> (T, d_in)."""
        if self.kernels:
            return self.kernels.linear(grad.contiguous(), self.packed_t, None, self.weight.shape[1])
        if self.prepacked:
            linear = torch.ops.mkldnn._linear_pointwise
            return linear(grad.contiguous(), self.packed_t, None, "none", [], "")  # type: ignore[no-any-return]
        return grad @ self.weight
