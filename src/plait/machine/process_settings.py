"""What plait sets for the process that it computes in: waiting threads, pages, and freed memory.

Every way into plait goes through `configure_process`, as does each process that it starts.
"""

from __future__ import annotations

import ctypes
import os
import sys

ENVIRONMENT = {
    # OpenMP's threads spin while they wait for each other, by default so long that a run slows
    # down tenfold where another process wants the cores too. Read when torch is imported.
    "GOMP_SPINCOUNT": "20000",
    # Activations come and go in megabytes: in pages of 4 KB, finding them takes up to a tenth of a
    # step. With this, torch asks Linux for pages of 2 MB. Read when torch first takes memory.
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Read once by libraries, so it is in force in a process that has loaded none of them yet, such as
the command line, and in the processes that this one starts. What the user has set stays."""

MALLOC = {
    -1: -1,  # M_TRIM_THRESHOLD: never
    -2: 64 << 20,  # M_TOP_PAD: a thread's heaps are that large, and stay
    -3: 32 << 20,  # M_MMAP_THRESHOLD: the most that can be asked for
}
"""Options of glibc's malloc.h, by their numbers there."""


def configure_process(threads: int | None = None) -> None:
    """Settle what belongs to the whole process; called again, it changes nothing more.

    No freed memory goes back to the system, but for blocks over 32 MB; only glibc needs to be told.
    The activations of a step are some hundred megabytes in a few dozen arrays. By default glibc
    gives them back with every backward pass, and in the next forward pass Linux clears each page
    anew: 2 to 5 % of the time of a step, more at the first ones of a round. gRPC, which allocates
    and frees each message several times over, gains too (benchmarks/transport.py).

    Args:
        threads: How many CPU threads PyTorch computes with; as many as it has by default.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, amount in MALLOC.items():
            mallopt(option, amount)
    if threads is not None:
        import torch  # takes seconds, and reads the environment

        torch.set_num_threads(threads)
