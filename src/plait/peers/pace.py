"""Time limits that a transfer moves along: what keeps coming is not cut off, what stands still is.

A transfer begins with the time of a call, and every byte that moves adds what it may take on the
slowest link that is waited for. So a limit needs no estimate of a link's speed, and a sender that
trickles can't hold a call, or a round, for longer than its message would take at that pace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

SLOWEST = 10_000.0
"""Bytes per second: a transfer that is slower on the whole is cut off."""

_LIMITS: ContextVar[tuple[asyncio.Timeout, ...]] = ContextVar("limits", default=())


@asynccontextmanager
async def paced(seconds: float | None) -> AsyncIterator[None]:
    """A block that may take so long, and longer by what `moved` in it; None for no limit.

    Raises:
        TimeoutError: It took longer.
    """
    async with asyncio.timeout(seconds) as limit:
        outer = _LIMITS.set((*_LIMITS.get(), limit))
        try:
            yield
        finally:
            _LIMITS.reset(outer)


def moved(num_bytes: int) -> float:
    """Say that so many bytes have moved.

    Returns:
        Until when the rest may come, as `time.monotonic` tells time.
    """
    ends = [asyncio.get_running_loop().time()]
    for limit in _LIMITS.get():
        if (end := limit.when()) is not None:
            limit.reschedule(end + num_bytes / SLOWEST)
            ends.append(end + num_bytes / SLOWEST)
    return max(ends)
