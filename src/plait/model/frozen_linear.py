"""Frozen linear layers, their weights laid out for the machine beforehand.

Legend: T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from plait.machine.devices import bfloat16_units
from plait.model.kernels.compiled import frozen_kernels


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

    def __call__(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out), with a gradient for x."""
        return _Frozen.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]

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


class _Frozen(torch.autograd.Function):
    """A frozen layer; its weights have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.linear.backward(grad) if ctx.needs_input_grad[0] else None, None


class RowsApart(nn.Module):
    """A frozen `nn.Linear` by our kernels: what a row gets doesn't depend on how many there are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.width = len(linear.weight)
        whole = skip_init(nn.Linear, linear.in_features, -(-self.width // 16) * 16)
        for to, value in ((whole.weight.data, linear.weight), (whole.bias.data, linear.bias)):
            to.zero_()[: self.width] = value
        self.frozen = FrozenLinear([whole])

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        y = self.frozen(x.flatten(0, -2))[:, : self.width]
        return y.reshape(*x.shape[:-1], self.width)


def take_rows_apart(module: nn.Module) -> bool:
    """Put `RowsApart` in the place of a frozen module's linear layers.

    Returns:
        Whether rows are apart everywhere. There are no kernels for other widths and types, and
        nobody knows what another layer with weights does.
    """
    weighted = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if next(child.parameters(recurse=False), None) is not None
    ]
    linear = [(p, name, child) for p, name, child in weighted if isinstance(child, nn.Linear)]
    others = [child for *_, child in weighted if not isinstance(child, nn.Linear | nn.LayerNorm)]
    suits = not others and all(
        child.bias is not None and child.in_features % 16 == 0 and frozen_kernels(child.weight[:0])
        for *_, child in linear
    )
    if suits:
        for parent, name, child in linear:
            setattr(parent, name, RowsApart(child))
    return suits
