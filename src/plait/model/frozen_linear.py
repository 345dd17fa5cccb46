"""Frozen linear layers: as they are, or prepacked for oneDNN or for our kernels.

Legend: T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init
from transformers.pytorch_utils import Conv1D

from plait.model.kernels.compiled import Kernels


def weight_and_bias(layer: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    """Weight (d_out, d_in) and bias of a layer; GPT-2's Conv1D has its weight transposed."""
    weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
    bias = layer.bias
    return weight.detach().contiguous(), None if bias is None else bias.detach()


def side_by_side(layers: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weight (d_out_1 + d_out_2 + ..., d_in) and bias of several layers as one."""
    weight = torch.cat([layer.weight for layer in layers]).detach().contiguous()
    return weight, torch.cat([layer.bias for layer in layers]).detach()


class FrozenLinear:
    """x W^T + b with W frozen.

    Attributes:
        weight: (d_out, d_in).
        bias: (d_out,), if there is one.
        batch_invariant: What a token gets, and how fast, doesn't depend on how many there are.
    """

    batch_invariant = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out), with a gradient for x."""
        return _Frozen.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out)."""
        return functional.linear(x, self.weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        """(T, d_out) -> (T, d_in)."""
        return grad @ self.weight


class OneDnnLinear(FrozenLinear):
    """W prepacked for oneDNN's products, on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.packed, self.packed_t = reorder(weight), reorder(weight.t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out)."""
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def backward(self, grad: Tensor) -> Tensor:
        """(T, d_out) -> (T, d_in)."""
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(grad.contiguous(), self.packed_t, None, "none", [], "")  # type: ignore[no-any-return]


class KernelLinear(FrozenLinear):
    """W prepacked for our kernels, which multiply a bit faster than oneDNN.

    Attributes:
        kernels: The kernels, which must suit W.
        packed: W as the forward pass wants it.
        packed_t: W as the backward pass wants it.
    """

    batch_invariant = True

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        super().__init__(weight, bias)
        self.kernels = kernels
        self.packed, self.packed_t = kernels.prepack(weight.t()), kernels.prepack(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out)."""
        return self.kernels.linear(x.contiguous(), self.packed, self.bias, len(self.weight))

    def backward(self, grad: Tensor) -> Tensor:
        """(T, d_out) -> (T, d_in)."""
        return self.kernels.linear(grad.contiguous(), self.packed_t, None, self.weight.shape[1])


class _Frozen(torch.autograd.Function):
    """A frozen layer; its weights have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.linear.backward(grad) if ctx.needs_input_grad[0] else None, None


class FrozenModule(nn.Module):
    """A `FrozenLinear` in a model's place for a linear layer."""

    def __init__(self, frozen: FrozenLinear) -> None:
        super().__init__()
        self.frozen, self.weight, self.bias = frozen, frozen.weight, frozen.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return self.frozen(x.flatten(0, -2)).unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


class BatchInvariantLinear(nn.Module):
    """A frozen `nn.Linear` by our kernels: what a row gets doesn't depend on how many there are."""

    def __init__(self, linear: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self.width = len(linear.weight)
        whole = skip_init(nn.Linear, linear.in_features, -(-self.width // 16) * 16)
        for to, value in ((whole.weight.data, linear.weight), (whole.bias.data, linear.bias)):
            to.zero_()[: self.width] = value
        self.frozen = KernelLinear(*side_by_side([whole]), kernels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        y = self.frozen(x.flatten(0, -2))[:, : self.width]
        return y.reshape(*x.shape[:-1], self.width)


def make_batch_invariant(module: nn.Module, kernels: Kernels) -> bool:
    """Put `BatchInvariantLinear` in the place of a frozen module's linear layers.

    Returns:
        Whether the module now is batch-invariant. There are no kernels for other widths and types,
        and nobody knows what another layer with weights does.
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
        child.bias is not None and kernels.suit(child.weight[:0]) for *_, child in linear
    )
    if suits:
        for parent, name, child in linear:
            setattr(parent, name, BatchInvariantLinear(child, kernels))
    return suits
