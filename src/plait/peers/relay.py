"""A blind forwarder: where two peers meet that accept no connections.

It joins a member that calls with one that waits and passes their bytes on, which are the ciphertext
of a TLS connection between the two; the relay has the key of neither. It has no data, model or
state, and a certificate of its own for the name `relay`.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from functools import partial
from pathlib import Path

from grpc import aio

from plait.peers.event_loop import BACKGROUND
from plait.peers.federation import RELAY, PeerSettings, load_peer
from plait.peers.grpc_server import certified, revoked, serve
from plait.peers.guard import CARRY, Guard
from plait.peers.json_log import log_to_stderr
from plait.peers.keyring import LOOK_S, Keyring
from plait.peers.membership import Members, load_members, take_list
from plait.peers.refusals import Reason
from plait.peers.tunnel import Carrier, Switchboard

LOG = logging.getLogger("plait.peer")

SAY_S = 60.0
"""How often the log says who is there, where that has changed."""


class Relay:
    """The server of a relay."""

    def __init__(self, members: Members, settings: PeerSettings, insecure: bool = False) -> None:
        """Read the certificates; nothing listens yet.

        Raises:
            ValueError: A certificate is missing or unfit, or the federation has no relay.
        """
        if members.newest.relay is None:
            raise ValueError(
                'The federation has no relay; write relay = "host:port" at the top of '
                "federation.toml at every peer."
            )
        self.board = Switchboard()
        self._members, self._settings = members, settings
        self._keyring = None if insecure else Keyring(settings, tuple, lambda _: b"")
        self._server: aio.Server | None = None

    def start(self) -> None:
        """Listen.

        Raises:
            ValueError: The address is in use, or not of this machine.
        """
        BACKGROUND.acquire()
        try:
            BACKGROUND.run(self._serve()).result()
        except BaseException:
            BACKGROUND.release()
            raise

    def look(self) -> None:
        """Take what is new of its certificates, and of those that count no more."""
        if self._keyring:
            self._keyring.look()

    def stop(self) -> None:
        """Hang up on everybody."""
        if self._server:
            BACKGROUND.run(self._server.stop(0)).result()
        BACKGROUND.release()

    async def _serve(self) -> None:
        who = partial(certified, secure=self._keyring is not None)
        carrier = Carrier(self.board, who, lambda _caller, wanted: wanted in self._names())
        guard = Guard(self._names, who, partial(revoked, keyring=self._keyring), 0.0, _refused)
        self._server = await serve(
            self._settings.listen, self._keyring, guard, {CARRY: carrier.carry}, len(self._names())
        )

    def _names(self) -> tuple[str, ...]:
        return self._members.newest.names


def run_relay(federation_file: Path) -> None:
    """Relay until told to leave (SIGTERM, SIGINT).

    Args:
        federation_file: `federation.toml`; `relay/peer.toml` lies beside it.

    Raises:
        ValueError: The files ask for what can't be.
    """
    log_to_stderr(RELAY)
    leave = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leave.set())
    settings = load_peer(federation_file, RELAY)
    members = load_members(federation_file, settings)
    relay = Relay(members, settings)
    relay.start()
    LOG.info("listening on %s", settings.listen)
    said, due, wrong = [""], 0.0, ""
    while not leave.wait(LOOK_S):
        relay.look()
        try:
            take_list(members, federation_file.parent, settings)
        except ValueError as error:
            if wrong != (wrong := str(error)):
                LOG.warning("refused: %s", error)
        if time.monotonic() > due and (there := relay.board.present()) != said:
            LOG.info("waiting to be called: %s", ", ".join(there) or "nobody")
            said, due = there, time.monotonic() + SAY_S
    relay.stop()


def _refused(caller: str, reason: Reason, detail: str) -> None:
    LOG.warning(
        "refused %s: %s", reason.name, detail, extra={"peer": caller, "reason": reason.name}
    )
