"""The memory allocator, told to keep what a training step frees for the next one."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def keep_freed() -> None:
    """Give no freed memory back to the system, but for blocks over 32 MB. Only glibc needs it.

    The activations of a step are some hundred megabytes in a few dozen arrays. By default glibc
    gives them back with every backward pass, and in the next forward pass Linux clears each page
    anew: 2 to 5 % of the time of a step, more at the first ones of a round.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(TRIM_THRESHOLD, -1)  # never
        mallopt(TOP_PAD, 64 << 20)  # a thread's heaps are that large, and stay
        mallopt(MMAP_THRESHOLD, 32 << 20)  # the most that can be asked for
