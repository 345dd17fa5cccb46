"""Frozen linear layers whose weights are kept in 8 or 4 bits, once for all clients.

A weight is made again some rows or columns at a time, when it is multiplied. 8 bits are exact to
1/254 of a row's largest entry; 4 bits are QLoRA's NF4 (arXiv 2305.14314).

Legend: T tokens, k rows or columns at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from plait.model.frozen_linear import FrozenLinear, weight_and_bias

AT_ONCE = 1 << 20
"""About so many entries of a weight are there as numbers at a time."""

GROUP = 64
"""So many entries of a row share a scale in 4 bits."""

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
"""NormalFloat: the levels that suit normally distributed weights, as bitsandbytes has them."""


class QuantizedLinear(FrozenLinear):
    """x W^T + b, with W kept in few bits.

    Attributes:
        shape: (d_out, d_in).
        codes: W in few bits, and `scales` what they are multiplied by.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Keep W (d_out, d_in) in few bits.

        Raises:
            ValueError: It has a width that doesn't do.
        """
        self.shape, self.bias = weight.shape, bias
        self.quantize(weight.float())

    def quantize(self, weight: Tensor) -> None:
        """Work out codes and scales."""
        raise NotImplementedError

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Some of W, in float32; whole groups of columns."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return self.codes.nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out)."""
        d_out, d_in = self.shape
        y = x.new_empty(len(x), d_out)
        for rows in _slices(d_out, d_in):
            W = self.part(rows, slice(None)).to(x.dtype)
            if self.bias is None:
                torch.mm(x, W.mT, out=y[:, rows])
            else:
                torch.addmm(self.bias[rows], x, W.mT, out=y[:, rows])
        return y

    def backward(self, grad: Tensor) -> Tensor:
        """(T, d_out) -> (T, d_in)."""
        d_out, d_in = self.shape
        grad_x = grad.new_empty(len(grad), d_in)
        for columns in _slices(d_in, d_out):
            W = self.part(slice(None), columns).to(grad.dtype)
            torch.mm(grad, W, out=grad_x[:, columns])
        return grad_x


def _slices(long: int, wide: int) -> Iterator[slice]:
    """Slices of 0, ..., long - 1 that are whole groups, with about `AT_ONCE / wide` entries."""
    each = max(1, AT_ONCE // (wide * GROUP)) * GROUP
    return (slice(begin, min(begin + each, long)) for begin in range(0, long, each))


class Int8Linear(QuantizedLinear):
    """Entries are -127 to 127 times the row's scale, the nearest ones."""

    def quantize(self, weight: Tensor) -> None:
        """Codes (d_out, d_in) int8 and scales (d_out, 1)."""
        self.scales = _largest(weight) / 127
        self.codes = (weight / self.scales).round().to(torch.int8)

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Some of W."""
        return self.codes[rows, columns] * self.scales[rows]


class Nf4Linear(QuantizedLinear):
    """Entries are one of `NF4`'s levels times the scale of a group of `GROUP`, the nearest ones."""

    def quantize(self, weight: Tensor) -> None:
        """Codes (d_out, d_in / 2) uint8, two in each, and scales (d_out, groups, 1)."""
        width = weight.shape[1]
        self.group = math.gcd(width, GROUP)
        if self.group == 1:
            raise ValueError(f"4bit is for even widths, and a layer has {width}; take 8bit.")
        levels = weight.new_tensor(NF4)
        # What a byte stands for: its lower and its upper half.
        byte = torch.arange(256, device=weight.device)
        self.pairs = levels[torch.stack([byte % 16, byte // 16], dim=1)]
        grouped = weight.unflatten(1, (-1, self.group))
        self.scales = _largest(grouped)
        between = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(grouped / self.scales, between, out_int32=True)
        codes = codes.to(torch.uint8).flatten(1)
        self.codes = codes[:, 0::2] + 16 * codes[:, 1::2]

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Some of W."""
        halves = slice(*(end and end // 2 for end in (columns.start, columns.stop)))
        groups = slice(*(end and end // self.group for end in (columns.start, columns.stop)))
        entries: Tensor = functional.embedding(self.codes[rows, halves].int(), self.pairs)
        return (entries.reshape(len(entries), -1, self.group) * self.scales[rows, groups]).flatten(
            1
        )


def _largest(weight: Tensor) -> Tensor:
    """(..., n) -> (..., 1), the largest absolute value, above zero."""
    return weight.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 127)


FORMATS: dict[str, type[QuantizedLinear]] = {"8bit": Int8Linear, "4bit": Nf4Linear}
"""`load_in` -> how weights are kept."""


class QuantizedLayer(nn.Module):
    """A model's linear layer with its weights in few bits."""

    def __init__(self, frozen: QuantizedLinear) -> None:
        super().__init__()
        self.frozen, self.bias = frozen, frozen.bias

    @property
    def weight(self) -> Tensor:
        """There is none: code that looks at it can't run."""
        raise ValueError("it looks at weights that --load-in keeps in few bits; leave that out.")

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return self.frozen(x.flatten(0, -2)).view(*x.shape[:-1], -1)


def block_layers(base: nn.Module) -> dict[str, Any]:
    """Name -> linear layer of an encoder's numbered blocks."""
    return {
        name: module
        for name, module in base.named_modules()
        if type(module) in (nn.Linear, Conv1D, QuantizedLayer)
        and any(map(str.isdigit, name.split(".")))
    }


def quantize(base: Any, load_in: str, device: torch.device, dtype: torch.dtype) -> None:
    """Put `QuantizedLayer` in the place of the linear layers of an encoder's numbered blocks.

    Args:
        base: The encoder.
        load_in: A key of `FORMATS`.
        device: Where they are to compute.
        dtype: In which type.

    Raises:
        ValueError: There are none, or they have widths that don't do.
    """
    if not (layers := block_layers(base)):
        raise ValueError(f"A {base.config.model_type} model has no linear layers for --load-in.")
    while layers:  # each is gone when the next one's turn comes
        name, layer = layers.popitem()
        weight, bias = weight_and_bias(layer)
        bias = None if bias is None else bias.to(device, dtype)
        base.set_submodule(name, QuantizedLayer(FORMATS[load_in](weight.to(device), bias)))
