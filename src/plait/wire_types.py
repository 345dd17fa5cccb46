"""What a value becomes in a message: float32 as it is, rounded to fewer bits, or not sent at all.

Engines mix with what comes out at the other end, so all agree to the last bit.

`top-k` is CHOCO-SGD's (Koloskova, Stich, Jaggi 2019, arXiv 1902.00340): each client has a public
copy of its values, which those who hear it know. In a round the k values that are farthest from
their copies travel, and the copy takes them over; mixed is with the copies. What wasn't sent stays
in the difference, so nothing is lost. The paper sends differences, which are added; here it is the
values themselves, to as many bytes, so that no rounding comes between a value and its copy.

Legend: P values of a slot, which lie in parts: those of each layer, or each parameter of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from plait.later import Tensor, torch
from plait.lookup import lookup

Data = memoryview | bytes | bytearray
Sizes = Sequence[int]
"""How many values each part has; P in all."""


@dataclass(frozen=True)
class WireType:
    """A type of the values in messages.

    Attributes:
        dtype: Its name in a safetensors head.
        item_bytes: Of a value.
        rounded: (..., P) float32 -> as it comes out at the other end; twice is once.
        to_array: (P,) float32 on the CPU -> an array whose bytes travel: values, then scales.
        from_bytes: These bytes -> (P,) float32; of float32 a view of them.
        scale: Of what type the scales are, one for each part, where there are any.
        share: How much of a slot travels in a round, if not all of it: the values that are farthest
            from their public copies.
    """

    dtype: str
    item_bytes: int
    rounded: Callable[[Tensor, Sizes], Tensor]
    to_array: Callable[[Tensor, Sizes], npt.NDArray[np.generic]]
    from_bytes: Callable[[Data, Sizes], npt.NDArray[np.float32]]
    scale: WireType | None = None
    share: float | None = None

    def num_bytes(self, sizes: Sizes) -> int:
        """Of the values in some parts, and their scales."""
        scale_bytes = self.scale.item_bytes if self.scale else 0
        return self.item_bytes * sum(sizes) + scale_bytes * len(sizes)

    def count(self, size: int) -> int:
        """How many of so many values travel in a round."""
        return size if self.share is None else max(1, round(self.share * size))

    def change_bytes(self, size: int) -> int:
        """Of these values, and where they lie."""
        return (self.item_bytes + INDEX_BYTES) * self.count(size)


INDEX_BYTES = 4
"""Of the place of a value that travels without its neighbours."""


def farthest(x: Tensor, copy: Tensor, count: int) -> Tensor:
    """(P,) bool, so many values that are farthest from their copies; of equals the first ones."""
    far = (x - copy).abs()
    least = far.topk(count).values[-1]
    found, equal = far > least, far == least
    return found | (equal & (equal.cumsum(0) <= count - found.sum()))


def _widened(data: Data, _sizes: Sizes = ()) -> npt.NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


FLOAT32 = WireType(
    "F32", 4, lambda x, _: x, lambda x, _: x.numpy(), lambda data, _: np.frombuffer(data, "<f4")
)
BFLOAT16 = WireType(
    "BF16",
    2,
    lambda x, _: x.to(torch.bfloat16).float(),
    lambda x, _: x.to(torch.bfloat16).view(torch.int16).numpy(),
    _widened,
)


def _quantized(part: Tensor) -> tuple[Tensor, Tensor]:
    """(..., p) -> whole numbers int8, the largest of them +-127, and their scale (..., 1).

    The scale is a bfloat16: so 127 times it is exact, and the numbers of what comes out are these.
    Within its bounds no product is infinite, and none has fewer bits than others.
    """
    scale = (part.abs().amax(dim=-1, keepdim=True) / 127).to(torch.bfloat16).float()
    scale = scale.clamp(2.0**-126, 2.0**121)
    return (part / scale).round().clamp(-127, 127).to(torch.int8), scale


def _dequantized(data: Data, sizes: Sizes) -> npt.NDArray[np.float32]:
    numbers, scales = np.frombuffer(data, np.int8, sum(sizes)), _widened(data[sum(sizes) :])
    with np.errstate(over="ignore", invalid="ignore"):  # who reads them looks whether all is finite
        return np.multiply(numbers, np.repeat(scales, sizes), dtype=np.float32)


def _bytes_of_quantized(x: Tensor, sizes: Sizes) -> npt.NDArray[np.generic]:
    numbers, scales = map(torch.cat, zip(*map(_quantized, x.split(list(sizes))), strict=True))
    rows = numbers.numpy(), BFLOAT16.to_array(scales, ())
    return np.concatenate([row.view(np.uint8) for row in rows])


INT8 = WireType(
    "I8",
    1,
    lambda x, sizes: torch.cat(
        [numbers * scale for numbers, scale in map(_quantized, x.split(list(sizes), dim=-1))],
        dim=-1,
    ),
    _bytes_of_quantized,
    _dequantized,
    scale=BFLOAT16,
)

WIRE_TYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}
TOP_K = "top-k"

OF_DTYPE = {one.dtype: one for one in WIRE_TYPES.values()}
"""The same by their names in a head."""


def wire_type(name: str) -> WireType:
    """The type that `name` means, or `top-k:` with a share.

    Raises:
        ValueError: There is no such type, or its share can't be; the message has the fix.

    Example:
        >>> wire_type("top-k:0.01").count(250)
        2
    """
    key, _, share = name.partition(":")
    if key != TOP_K:
        return lookup(WIRE_TYPES | {f"{TOP_K}:0.01": FLOAT32}, name, "wire type")
    try:
        number = float(share)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise ValueError(f"Wire type {name!r} needs a share above 0 and up to 1: {TOP_K}:0.01.")
    return replace(FLOAT32, share=number)
