"""Who gets to call a peer at all, and how many calls at a time: in front of every method.

A call of somebody who is no member ends before any of it is read, and so does one above its
caller's quota. Both end with a status alone: that is not subject to the caller's flow control, so
nobody holds a call open by not reading. What a member's call holds counts until it has really
ended.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Any, NoReturn

import grpc
from grpc import aio

from plait.peers.pace import paced
from plait.peers.refusals import Reason

Names = frozenset[str] | None
"""The names in a certificate; None where there is no TLS."""

OPEN_CALLS = 4
"""Calls that one sender may have open at a time: bounds what a flood can hold in memory."""

CARRY = "/plait.v1.Tunnel/Carry"
"""A stream of bytes each way (tunnel.py). It lasts as long as both sides like."""

TUNNELS = 8
"""Streams of `CARRY` that one sender may have open at a time."""

HANDSHAKE_S = 5.0
"""Longest that a connection may take to show a certificate."""

IDLE_S = 300.0
"""Connections without a call for so long are closed; a peer that has one to make opens another."""

STATUS = {
    Reason.WRONG_SENDER: grpc.StatusCode.PERMISSION_DENIED,
    Reason.REVOKED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.NO_ANSWER: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""How a refusal is said where there is no message to say it in."""

REASONS = {status: reason for reason, status in STATUS.items()}


class Guard(aio.ServerInterceptor):  # type: ignore[misc]
    """Membership and quota for every method that the server has; others it has none of."""

    def __init__(
        self,
        members: Callable[[], Collection[str]],
        certified: Callable[[Any], Names],
        revoked: Callable[[Any], bool],
        call_timeout_s: float,
        refused: Callable[[str, Reason, str], None],
    ) -> None:
        """Of one server.

        Args:
            members: The names of those who may call, at the time.
            certified: Context of a call -> the names in the caller's certificate.
            revoked: Context of a call -> whether that certificate counts no more.
            call_timeout_s: The longest that a call may stand still, but for `CARRY`.
            refused: Told (caller, reason, detail) of each refusal.
        """
        self._members, self._certified, self._revoked = members, certified, revoked
        self._call_timeout_s, self._refused = call_timeout_s, refused
        self._open: Counter[tuple[str, bool]] = Counter()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The same method, behind this guard."""
        handler = await continuation(details)
        if handler is None:
            return None
        guarded = partial(self._guarded, handler.stream_stream, details.method == CARRY)
        return grpc.stream_stream_rpc_method_handler(guarded)

    async def _guarded(
        self,
        method: Callable[[Any, Any], Awaitable[None]],
        lasts: bool,
        stream: Any,
        context: Any,
    ) -> None:
        names = self._certified(context)
        members = frozenset(self._members())
        caller = caller_of(names, members, context)
        if names is not None and not names & members:
            await self._end(context, caller, Reason.WRONG_SENDER, f"{caller:.200} is no member")
        if self._revoked(context):
            detail = f"{caller:.200}'s certificate is revoked"
            await self._end(context, caller, Reason.REVOKED, detail)
        kind, most = (caller, lasts), TUNNELS if lasts else OPEN_CALLS
        if self._open[kind] >= most:
            await self._end(context, caller, Reason.BUSY, f"more than {most} calls at a time")
        self._open[kind] += 1
        context.add_done_callback(partial(self._close, kind))
        try:
            async with paced(None if lasts else self._call_timeout_s):
                await method(stream, context)
        except TimeoutError:
            await self._end(context, caller, Reason.NO_ANSWER, "the call did not end in time")

    async def _end(self, context: Any, caller: str, reason: Reason, detail: str) -> NoReturn:
        self._refused(caller, reason, detail)
        await context.abort(STATUS[reason], detail)
        raise AssertionError("abort raises")

    def _close(self, kind: tuple[str, bool], _context: Any) -> None:
        self._open[kind] -= 1
        self._open += Counter()  # forget who has none open


def caller_of(names: Names, members: Collection[str], context: Any) -> str:
    """What to call whoever calls: the member that its certificate names among others, if any."""
    known = sorted((names or frozenset()) & frozenset(members))
    return known[0] if known else "|".join(sorted(names or ())) or str(context.peer())


def raise_descriptor_limit() -> None:
    """Take as many file descriptors as the system gives; the usual limit is made for programs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def most_connections() -> int:
    """Connections that strangers and members may hold: half of what this process can open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(soft, 1 << 16) // 2) if soft != resource.RLIM_INFINITY else 1 << 15
