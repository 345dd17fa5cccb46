"""A blind forwarder: where two peers meet that accept no connections.

It joins a member that calls with one that waits and passes their bytes on, which are the ciphertext
of a TLS connection between the two; the relay has the key of neither. It has no data, model or
state, and a certificate of its own for the name `relay`.
"""

from __future__ import annotations

import logging
import signal
import threading
from functools import partial
from pathlib import Path

from grpc import aio

from plait.peers.credentials import read_credentials
from plait.peers.event_loop import BACKGROUND
from plait.peers.federation import RELAY, Federation, PeerSettings, load_federation, load_peer
from plait.peers.grpc_server import Credentials, certified, serve
from plait.peers.guard import CARRY, Guard
from plait.peers.json_log import log_to_stderr
from plait.peers.refusals import Reason
from plait.peers.tunnel import Carrier, Switchboard

LOG = logging.getLogger("plait.peer")

SAY_S = 60.0
"""How often the log says who is there, where that has changed."""


class Relay:
    """The server of a relay."""

    def __init__(
        self, federation: Federation, settings: PeerSettings, insecure: bool = False
    ) -> None:
        """Read the certificates; nothing listens yet.

        Raises:
            ValueError: A certificate is missing or unfit, or the federation has no relay.
        """
        if federation.relay is None:
            raise ValueError(
                'The federation has no relay; write relay = "host:port" at the top of '
                "federation.toml at every peer."
            )
        self.board = Switchboard()
        self._federation, self._settings = federation, settings
        self._credentials: Credentials = None if insecure else read_credentials(settings)
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

    def stop(self) -> None:
        """Hang up on everybody."""
        if self._server:
            BACKGROUND.run(self._server.stop(0)).result()
        BACKGROUND.release()

    async def _serve(self) -> None:
        names = self._federation.names
        who = partial(certified, secure=self._credentials is not None)
        carrier = Carrier(self.board, who, lambda _caller, wanted: wanted in names)
        guard = Guard(names, who, 0.0, _refused)
        self._server = await serve(
            self._settings.listen, self._credentials, guard, {CARRY: carrier.carry}, len(names)
        )


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
    relay = Relay(load_federation(federation_file), settings)
    relay.start()
    LOG.info("listening on %s", settings.listen)
    said: list[str] = []
    while not leave.wait(SAY_S):
        if (there := relay.board.present()) != said:
            LOG.info("waiting to be called: %s", ", ".join(there) or "nobody")
            said = there
    relay.stop()


def _refused(caller: str, reason: Reason, detail: str) -> None:
    LOG.warning(
        "refused %s: %s", reason.name, detail, extra={"peer": caller, "reason": reason.name}
    )
