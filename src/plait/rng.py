"""Randomness is addressed, not consumed.

Every draw names its purpose and its place: `stream(seed, "batches", client, epoch)`. Two engines
that ask for the same address get the same numbers in whatever order they ask, so a peer agrees
with a simulation, and a resumed run with an unbroken one, without passing a generator around.
"""

from __future__ import annotations

import hashlib

import numpy as np

from plait.later import torch


def _key(seed: int, purpose: str, *address: int) -> int:
    text = ":".join([str(seed), purpose, *map(str, address)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def stream(seed: int, purpose: str, *address: int) -> np.random.Generator:
    """The NumPy generator that belongs to this address, always from its beginning.

    Args:
        seed: The seed of the run.
        purpose: What the numbers are for, such as `"batches"`.
        address: Where they are used, such as a client's and an epoch's number.

    Example:
        >>> stream(0, "batches", 3, 1).integers(100) == stream(0, "batches", 3, 1).integers(100)
        np.True_
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose, *address)))


def torch_stream(seed: int, purpose: str, *address: int) -> torch.Generator:
    """As `stream`, a CPU `torch.Generator`; draw on the CPU so that devices agree."""
    return torch.Generator().manual_seed(_key(seed, purpose, *address) >> 1)
