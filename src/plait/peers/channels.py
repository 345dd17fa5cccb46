"""Connections to the other members: straight, or through a stream of one that accepts none."""

from __future__ import annotations

import asyncio
from functools import partial

from grpc import aio

from plait.peers.federation import (
    RELAY,
    Federation,
    Member,
    PeerSettings,
    is_loopback,
    split_address,
)
from plait.peers.grpc_server import OPTIONS, Options
from plait.peers.keyring import Keyring
from plait.peers.membership import Members
from plait.peers.refusals import Reason, Refused
from plait.peers.revocation import Route
from plait.peers.tunnel import Doors, Ends, Switchboard, call_through, wait_at


class Channels:
    """One for each member, made when it is first needed. Used on the transport's thread.

    Attributes:
        board: Those that wait here to be called; nobody where this process serves none.
    """

    def __init__(self, members: Members, settings: PeerSettings, keyring: Keyring | None) -> None:
        """Nothing is opened yet.

        Args:
            members: Who takes part, and where.
            settings: Of this peer.
            keyring: For mutual TLS; None without.
        """
        self.board = Switchboard()
        self._members, self._settings = members, settings
        self._keyring = keyring
        self._serves = False
        self._open: dict[str, aio.Channel] = {}
        self._opening = asyncio.Lock()
        self._doors = Doors()
        self._routes: dict[str, Route] = {}
        self._waiting: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def to(self, name: str) -> aio.Channel:
        """The channel to a member, or to the relay.

        Raises:
            Refused: There is no way to it.
        """
        async with self._opening:
            if name not in self._open:
                self._open[name] = self._channel(await self.route(name), name)
            return self._open[name]

    async def serve(self) -> None:
        """Be the peer itself, through whom others are called or who is called through others."""
        self._serves = True
        self._wait()

    def _wait(self) -> None:
        """Be there to be called, where this peer accepts no connection."""
        if self._own.reachable or not self._serves:
            return
        host, port = split_address(local(self._settings.listen))
        names = [one.name for one in self._federation.peers if one.reachable]
        for name in [*names, *([RELAY] if self._federation.relay else [])]:
            if name not in self._waiting:
                waiting = wait_at(partial(self.to, name), self._own.name, host, port)
                self._waiting[name] = asyncio.create_task(waiting)

    async def renew(self, grace_s: float) -> None:
        """Make new channels for what comes; what is on its way over the old ones may yet arrive."""
        self._routes = {
            n: one for n, one in self._routes.items() if one.address.startswith("unix:")
        }
        self._wait()
        for channel in self._open.values():
            closing = asyncio.create_task(channel.close(grace_s))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._open.clear()

    async def close(self, grace_s: float) -> None:
        """Let open calls end, for so long, and close all."""
        tasks = [*self._waiting.values(), *self._closing]
        self._waiting.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self._open.values():
            await channel.close(grace_s)
        self._open.clear()
        await self._doors.close()

    @property
    def _federation(self) -> Federation:
        return self._members.newest

    @property
    def _own(self) -> Member:
        return self._federation.member(self._settings.name)

    async def route(self, name: str) -> Route:
        """Where a connection to a member, or to the relay, is opened.

        Raises:
            Refused: There is no way to it.
        """
        if name not in self._routes:
            address = await self._address(name)
            near = address.startswith("unix:") or is_loopback(split_address(address)[0])
            self._routes[name] = Route(address, self._settings.http_proxy and not near)
        return self._routes[name]

    async def _address(self, name: str) -> str:
        if name == RELAY and self._federation.relay:
            return self._federation.relay
        member = self._federation.member(name)
        if member.reachable:
            return member.address
        if name == self._own.name:  # one who only asks, on the machine of a peer
            return local(self._settings.listen)
        if not self._own.reachable and not self._federation.relay:
            raise Refused(
                Reason.UNREACHABLE,
                f"neither {name} nor {self._own.name} can be called, and there is no relay",
            )
        return await self._doors.open(partial(self._connect, name))

    async def _connect(self, name: str, ends: Ends) -> None:
        """Carry a connection to a member that can't be called."""
        if self._serves and self._own.reachable:
            await self.board.connect(name, ends)
            return
        host = RELAY if self._federation.relay else self._own.name
        await call_through(await self.to(host), self._own.name, name, ends)

    def _channel(self, route: Route, name: str) -> aio.Channel:
        proxied: Options = [("grpc.enable_http_proxy", int(route.proxied))]
        if self._keyring is None:
            return aio.insecure_channel(route.address, OPTIONS + proxied)
        credentials = self._keyring.for_channel(name)
        # Whatever the address is, the certificate must have the neighbour's name.
        named: Options = [("grpc.ssl_target_name_override", name)]
        return aio.secure_channel(route.address, credentials, OPTIONS + proxied + named)


def local(listen: str) -> str:
    """Where a server that listens so is reached from its own machine.

    Example:
        >>> local("0.0.0.0:7600"), local("[::]:7600"), local("10.0.0.1:7600")
        ('127.0.0.1:7600', '[::1]:7600', '10.0.0.1:7600')
    """
    wild = {"0.0.0.0:": "127.0.0.1:", "[::]:": "[::1]:"}
    return next(
        (here + listen[len(any_) :] for any_, here in wild.items() if listen.startswith(any_)),
        listen,
    )
