"""Where to compute, in which type, and how arrays get there.

How to compute is the backend's to say (model/backend.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from plait.later import Tensor, torch

PREFERRED = ("cuda", "mps", "cpu")


def resolve_device(name: str) -> torch.device:
    """A device that is named must be there; `auto` is the first of `PREFERRED` that is."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind in PREFERRED if available[kind])
    if not available[name]:
        raise ValueError(f"There is no {name} device here; take --device cpu or auto.")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device has units for it, else float32."""
    if name == "auto":
        units = {"cuda": torch.cuda.is_bf16_supported, "cpu": bfloat16_units}.get(device.type)
        name = "bfloat16" if units and units() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def bfloat16_units() -> bool:
    """Whether oneDNN multiplies in bfloat16 on this CPU, for which it wants AVX-512 or newer."""
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def free_bytes(device: torch.device) -> float:
    """What of a graphics card's memory nobody has taken; infinity where it can't be known."""
    if device.type != "cuda":
        return float("inf")
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def moved(array: Tensor, device: torch.device) -> Tensor:
    """The same array on a device. The host doesn't wait for it."""
    if device.type != "cuda":
        return array.to(device)
    return array.pin_memory().to(device, non_blocking=True)


def exact(array: Tensor) -> Tensor:
    """The same numbers in float64, on `exact_device`."""
    return array.to(exact_device(array.device)).double()


def exact_device(device: torch.device) -> torch.device:
    """The device, or the CPU if it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core of the CPU: what LAPACK returns depends on how many share its work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
