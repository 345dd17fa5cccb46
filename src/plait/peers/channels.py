"""Connections to the other members: straight, or through a stream of one that accepts none."""

from __future__ import annotations

import asyncio
from functools import partial

import grpc
from grpc import aio

from plait.peers.federation import (
    RELAY,
    Federation,
    Member,
    PeerSettings,
    is_loopback,
    split_address,
)
from plait.peers.grpc_server import OPTIONS, Credentials, Options
from plait.peers.refusals import Reason, Refused
from plait.peers.tunnel import Doors, Ends, Switchboard, call_through, wait_at


class Channels:
    """One for each member, made when it is first needed. Used on the transport's thread.

    Attributes:
        board: Those that wait here to be called; nobody where this process serves none.
    """

    def __init__(
        self, federation: Federation, settings: PeerSettings, credentials: Credentials
    ) -> None:
        """Nothing is opened yet.

        Args:
            federation: Who takes part, and where.
            settings: Of this peer.
            credentials: For mutual TLS.
        """
        self.board = Switchboard()
        self._federation, self._settings = federation, settings
        self._credentials = credentials
        self._serves = False
        self._open: dict[str, aio.Channel] = {}
        self._opening = asyncio.Lock()
        self._doors = Doors()
        self._waiting: list[asyncio.Task[None]] = []

    async def to(self, name: str) -> aio.Channel:
        """The channel to a member, or to the relay.

        Raises:
            Refused: There is no way to it.
        """
        async with self._opening:
            if name not in self._open:
                self._open[name] = self._channel(await self._address(name), name)
            return self._open[name]

    async def serve(self) -> None:
        """Be the peer itself, through whom others are called or who is called through others."""
        self._serves = True
        if self._own.reachable:
            return
        host, port = split_address(local(self._settings.listen))
        names = [one.name for one in self._federation.peers if one.reachable]
        for name in [*names, *([RELAY] if self._federation.relay else [])]:
            waiting = wait_at(await self.to(name), self._own.name, host, port)
            self._waiting.append(asyncio.create_task(waiting))

    async def close(self, grace_s: float) -> None:
        """Let open calls end, for so long, and close all."""
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)
        for channel in self._open.values():
            await channel.close(grace_s)
        self._open.clear()
        await self._doors.close()

    @property
    def _own(self) -> Member:
        return self._federation.member(self._settings.name)

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

    def _channel(self, address: str, name: str) -> aio.Channel:
        near = address.startswith("unix:") or is_loopback(split_address(address)[0])
        proxied: Options = [("grpc.enable_http_proxy", int(self._settings.http_proxy and not near))]
        if self._credentials is None:
            return aio.insecure_channel(address, OPTIONS + proxied)
        authority, own = self._credentials
        credentials = grpc.ssl_channel_credentials(authority, own.key, own.certificate)
        # Whatever the address is, the certificate must have the neighbour's name.
        named: Options = [("grpc.ssl_target_name_override", name)]
        return aio.secure_channel(address, credentials, OPTIONS + proxied + named)


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
