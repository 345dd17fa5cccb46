"""Connections to peers that accept none, carried inside streams that such a peer opens itself.

A peer behind a firewall keeps a stream open at every member that it can reach, and at the relay if
there is one: it *waits* to be called. Whoever has something for it opens a connection as to any
other peer, and its bytes travel in that stream to the server of the one that waits. The connection
inside has the same mutual TLS from end to end as any other, so whoever carries it sees no more than
its ciphertext, and can't pose as either of its ends.

    caller's channel -> Door (a socket of this machine) -> Switchboard, here or at a relay
        -> the stream of the one that waits -> its own server
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from grpc import StatusCode, aio

from plait.peers.guard import CARRY, Names
from plait.peers.refusals import Refused

NAME, TO = "plait-peer", "plait-to"
"""Metadata of a stream of `CARRY`: who opens it, and whom it wants; without the latter it waits."""

LOG = logging.getLogger("plait.peer")

CHUNK_BYTES = 1 << 20
WAIT_S = 2.0
"""How long a caller waits for one that is not there: it may be opening its next stream."""

MOST_CALLS = 4
"""Connections that one waiting peer serves at a time for one member, or for the relay."""

PAUSES_S = (0.1, 1.0)
"""Between two attempts to get through to a member: the first, and the longest."""


ENDED = (aio.AioRpcError, aio.UsageError)
"""What gRPC raises of a call that failed, or whose channel was closed before it began."""


class Closed(Exception):  # noqa: N818 - the other end is gone, which is nobody's error
    """There is nobody at the other end, or no longer."""


@dataclass(frozen=True)
class Ends:
    """One side of a stream of bytes: `read` returns nothing more at its end, as `b""`."""

    read: Callable[[], Awaitable[bytes]]
    write: Callable[[bytes], Awaitable[None]]


async def pipe(one: Ends, other: Ends) -> None:
    """Carry bytes both ways until either side ends."""
    ways = [asyncio.ensure_future(_pour(one, other)), asyncio.ensure_future(_pour(other, one))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _pour(source: Ends, sink: Ends) -> None:
    while data := await source.read():
        await sink.write(data)


def of_call(call: Any) -> Ends:
    """The ends of a gRPC stream of bytes, as its client or as its server has it."""

    async def read() -> bytes:
        data = await call.read()
        return b"" if data is aio.EOF else data

    return Ends(read, call.write)


def of_socket(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Ends:
    """The ends of a connection of this machine."""

    async def write(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    return Ends(lambda: reader.read(CHUNK_BYTES), write)


class Switchboard:
    """Those that wait to be called, each with a stream or more, and the joining of both sides."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._waiting: defaultdict[str, list[asyncio.Future[Ends]]] = defaultdict(list)
        self._came = asyncio.Condition()

    async def wait(self, name: str, ends: Ends) -> None:
        """Be there for a caller of `name`; returns when one has called and hung up."""
        called: asyncio.Future[Ends] = asyncio.get_running_loop().create_future()
        async with self._came:
            self._waiting[name].append(called)
            self._came.notify_all()
        try:
            caller = await called
        finally:
            if called in self._waiting[name]:  # the stream broke while nobody called
                self._waiting[name].remove(called)
        await pipe(ends, caller)

    async def connect(self, name: str, ends: Ends) -> None:
        """Join a caller with one that waits; returns when either has hung up.

        Raises:
            Closed: Nobody of that name waits.
        """
        hung_up = asyncio.Event()

        async def read() -> bytes:
            data = b""
            try:
                data = await ends.read()
            finally:
                if not data:
                    hung_up.set()
            return data

        try:
            async with asyncio.timeout(WAIT_S), self._came:
                await self._came.wait_for(lambda: self._waiting[name])
                called = self._waiting[name].pop()  # the latest: its stream is the surest to live
        except TimeoutError:
            raise Closed(f"{name} has no stream open here") from None
        called.set_result(Ends(read, ends.write))
        await hung_up.wait()

    def present(self) -> list[str]:
        """The names of those that wait."""
        return sorted(name for name, waiting in self._waiting.items() if waiting)


class Carrier:
    """The handler of `CARRY`."""

    def __init__(
        self,
        board: Switchboard,
        certified: Callable[[Any], Names],
        may_call: Callable[[str, str], bool],
    ) -> None:
        """Of one server.

        Args:
            board: Where both sides meet.
            certified: Context of a call -> the names in the caller's certificate.
            may_call: (caller, whom it wants) -> whether it may.
        """
        self._board, self._certified, self._may_call = board, certified, may_call

    async def carry(self, _stream: Any, context: Any) -> None:
        """Let a member wait, or join it with one that does."""
        metadata, names = dict(context.invocation_metadata()), self._certified(context)
        caller, wanted = metadata.get(NAME, ""), metadata.get(TO)
        if names is not None and caller not in names:
            await context.abort(StatusCode.PERMISSION_DENIED, f"{caller!r:.80} is another")
        if wanted is None:
            await self._board.wait(caller, of_call(context))
        elif not self._may_call(caller, wanted):
            await context.abort(StatusCode.PERMISSION_DENIED, "not to be called from here")
        else:
            try:
                await self._board.connect(wanted, of_call(context))
            except Closed as closed:
                await context.abort(StatusCode.UNAVAILABLE, str(closed))


class Doors:
    """Sockets of this machine, one for each peer that has to be called through a stream of its own.

    They lie in a folder that only this user may enter.
    """

    def __init__(self) -> None:
        """None yet."""
        self._folder: Path | None = None
        self._numbers = itertools.count()  # of doors, some of which are being made
        self._servers: list[asyncio.Server] = []
        self._guests: set[asyncio.Task[None]] = set()

    async def open(self, connect: Callable[[Ends], Awaitable[None]]) -> str:
        """A new door: its address, for a gRPC channel.

        Args:
            connect: Carries a connection to the peer; raises `Closed` where that can't be.
        """
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="plait-"))
        path = self._folder / str(next(self._numbers))

        async def come_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            guest = cast("asyncio.Task[None]", asyncio.current_task())
            self._guests.add(guest)
            guest.add_done_callback(self._guests.discard)
            # A stream's own task is asked for what it raised, which of one cancelled is an error.
            ended = (Closed, Refused, OSError, *ENDED, asyncio.CancelledError)
            with closing(writer), suppress(*ended):
                await connect(of_socket(reader, writer))

        self._servers.append(await asyncio.start_unix_server(come_in, path, limit=CHUNK_BYTES))
        return f"unix:{path}"

    async def close(self) -> None:
        """Shut all of them, and hang up."""
        for server in self._servers:
            server.close()
        for guest in self._guests:
            guest.cancel()
        await asyncio.gather(*self._guests, return_exceptions=True)
        self._servers.clear()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


async def call_through(channel: aio.Channel, own: str, to: str, ends: Ends) -> None:
    """Carry a connection to a peer through whoever is at the other end of a channel.

    Args:
        channel: To the relay, or to a member.
        own: This peer's name.
        to: Whom to reach.
        ends: Of the connection.
    """
    async with _carried(channel, (NAME, own), (TO, to)) as call:
        await pipe(ends, of_call(call))


async def wait_at(to: Callable[[], Awaitable[aio.Channel]], own: str, host: str, port: int) -> None:
    """Be reachable through whoever is at the other end of a channel, until cancelled.

    Args:
        to: The channel to a member or the relay, as it is then.
        own: This peer's name.
        host: Where this peer's own server listens.
        port: Its port.
    """
    free = asyncio.Semaphore(MOST_CALLS)
    pause = PAUSES_S[0]
    async with asyncio.TaskGroup() as group:
        while True:
            await free.acquire()
            called: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            serving = group.create_task(_serve_one(to, own, host, port, called))
            serving.add_done_callback(lambda _: free.release())
            if await called:  # another one waits from now on
                pause = PAUSES_S[0]
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSES_S[1])


async def _serve_one(
    to: Callable[[], Awaitable[aio.Channel]],
    own: str,
    host: str,
    port: int,
    called: asyncio.Future[bool],
) -> None:
    """Wait for one caller, and bring its connection to this peer's own server."""
    try:
        async with _carried(await to(), (NAME, own)) as call:
            first = await of_call(call).read()
            if not first:
                return
            called.set_result(True)
            reader, writer = await asyncio.open_connection(host, port, limit=CHUNK_BYTES)
            with closing(writer):
                server = of_socket(reader, writer)
                await server.write(first)
                await pipe(of_call(call), server)
    except (*ENDED, Refused, OSError):
        pass  # the stream broke, or its channel was closed; the next one is opened after a pause
    except Exception:  # a bug of ours must not leave a peer that nobody can call any more
        LOG.exception("a stream that waits to be called failed")
    finally:
        if not called.done():
            called.set_result(False)


@asynccontextmanager
async def _carried(channel: aio.Channel, *metadata: tuple[str, str]) -> AsyncIterator[Any]:
    call = channel.stream_stream(CARRY)(metadata=metadata)
    try:
        yield call
    finally:
        call.cancel()
