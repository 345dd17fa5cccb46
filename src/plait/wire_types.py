"""What a value becomes in a message: float32 as it is, or rounded to fewer bits.

Engines mix with the rounded values and peers send them, so all agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class WireType:
    """A type of the values in messages.

    Attributes:
        dtype: Its name in a safetensors head.
        item_bytes: Of a value.
        rounded: float32 -> float32, as it comes out at the other end; twice is once.
        to_array: (P,) float32 on the CPU -> (P,) an array whose bytes travel.
        from_bytes: These bytes -> (P,) float32; of float32 a view of them.
    """

    dtype: str
    item_bytes: int
    rounded: Callable[[Tensor], Tensor]
    to_array: Callable[[Tensor], npt.NDArray[np.generic]]
    from_bytes: Callable[[memoryview | bytes | bytearray], npt.NDArray[np.float32]]


def _widened(data: memoryview | bytes | bytearray) -> npt.NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


WIRE_TYPES: dict[str, WireType] = {
    "float32": WireType(
        "F32", 4, lambda x: x, Tensor.numpy, lambda data: np.frombuffer(data, "<f4")
    ),
    "bfloat16": WireType(
        "BF16",
        2,
        lambda x: x.to(torch.bfloat16).float(),
        lambda x: x.to(torch.bfloat16).view(torch.int16).numpy(),
        _widened,
    ),
}

OF_DTYPE = {one.dtype: one for one in WIRE_TYPES.values()}
"""The same by their names in a head."""
