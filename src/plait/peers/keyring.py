"""What a peer shows and whom it trusts while it runs: its files, looked at again now and then.

New files are taken when they are fit for use; until then what was read before stays in use. A
server takes new ones with the next connection, a client with a new channel: gRPC can't change
those of an old one. Whoever is on the list of revoked certificates is called only where it shows
another, and over a channel that takes no certificate but that one: its key may be in use by
somebody on the way.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import grpc

from plait.peers.credentials import Credentials, read_credentials
from plait.peers.federation import PeerSettings
from plait.peers.refusals import Reason, Refused
from plait.peers.revocation import fingerprint_of, read_revoked

LOG = logging.getLogger("plait.peer")

LOOK_S = 5.0
"""Pause between two looks at the files."""

SOON = dt.timedelta(days=30)
"""Whatever ends sooner is said each day."""

UNFIT = {"kind": "unfit"}

Read = TypeVar("Read")


class Watched(Generic[Read]):
    """What was read from some files, and is read again when they have changed.

    Attributes:
        now: What was read last.
    """

    def __init__(self, paths: Sequence[Path | None], read: Callable[[], Read]) -> None:
        """Read for the first time; raises what `read` does."""
        self._paths, self._read = [path for path in paths if path], read
        self._seen = self._taken = self._said = self._marks()
        self.now = read()

    def look(self) -> bool:
        """Whether something else is there now. Of files that can't be read one line is said.

        They are read when they have been the same for two looks: a key and its certificate are
        rarely written in one moment.
        """
        marks, before = self._marks(), self._seen
        self._seen = marks
        if marks == self._taken or marks != before:
            return False
        try:
            found = self._read()
        except (ValueError, OSError) as error:
            if marks != self._said:
                LOG.error("not taken, the old one stays in use: %s", error, extra=UNFIT)
            self._said = marks
            return False
        changed, self.now, self._taken = found != self.now, found, marks
        return changed

    def _marks(self) -> object:
        """What is another when a file was written, replaced or removed."""
        return [_mark(path) for path in self._paths]


def _mark(path: Path) -> object:
    try:
        found = path.stat()
    except OSError as error:
        return error.errno
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


class Keyring:
    """A peer's credentials and its list of revoked certificates, as its files have them now."""

    def __init__(
        self,
        settings: PeerSettings,
        others: Callable[[], Collection[str]],
        show: Callable[[str], bytes],
    ) -> None:
        """Read the files.

        Args:
            settings: Which files they are.
            others: The names of those who may be called, at the time.
            show: The name of one of them -> the certificate, PEM, that its server shows; an
                `OSError` or `Refused` of who can't be reached, or shows none.

        Raises:
            ValueError: A file is missing or unfit.
        """
        self.settings, self._others, self._show = settings, others, show
        papers = (settings.ca, settings.certificate, settings.key)
        self._papers = Watched(papers, lambda: read_credentials(settings))
        self._revoked = Watched([settings.revoked], lambda: read_revoked(settings.revoked))
        self._pins: dict[str, bytes | None] = {}
        self._warned: dict[str, dt.date] = {}

    def look(self) -> bool:
        """Take what is new in the files; whether channels have to be made anew. Takes a while."""
        try:
            return self._look()
        except Exception:  # a bug of ours; the next look comes nevertheless
            LOG.exception("the look at the files of certificates failed")
            return False

    def _look(self) -> bool:
        news = [watched.look() for watched in (self._papers, self._revoked)]
        if any(news):
            LOG.info("taken: what is new in the files of certificates", extra={"kind": "renewed"})
        self._warn()
        return any([*news, self._see()])

    def for_server(self) -> grpc.ServerCredentials:
        """What a server shows and whom it trusts; each new connection gets what is there then."""
        given = self._papers.now

        def latest() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            before, given = given, self._papers.now
            return None if given is before else _configuration(given)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given), latest, require_client_authentication=True
        )

    def for_channel(self, to: str) -> grpc.ChannelCredentials:
        """What a channel to a member shows and trusts.

        Raises:
            Refused: A certificate of it is revoked, and it hasn't shown another.
        """
        papers = self._papers.now
        trusted = self._pins.get(to, papers.authority)
        if trusted is None:
            detail = f"{to} is not called: a certificate of it is revoked, and it shows no other"
            raise Refused(Reason.UNREACHABLE, detail)
        return grpc.ssl_channel_credentials(trusted, papers.own.key, papers.own.certificate)

    @property
    def authority(self) -> bytes:
        """Whose certificates are trusted, PEM."""
        return self._papers.now.authority

    def is_revoked(self, pem: bytes) -> bool:
        """Whether a certificate counts no more."""
        return fingerprint_of(pem) in self._revoked.now

    def expires(self) -> dict[str, int]:
        """Until when this peer's certificate and the authority's are valid, seconds since 1970."""
        return {what: int(end.timestamp()) for what, end in self._papers.now.expires.items()}

    def _warn(self) -> None:
        """Say what ends soon, once a day."""
        now = dt.datetime.now(dt.UTC)
        files = {"certificate": self.settings.certificate, "authority": self.settings.ca}
        for what, end in self._papers.now.expires.items():
            if end - now > SOON or self._warned.get(what) == now.date():
                continue
            self._warned[what] = now.date()
            LOG.warning(
                "%s ends on %s, in %d days: have a new one signed and put it in its place, at any "
                "time; no restart is needed",
                files[what], f"{end:%Y-%m-%d}", max(0, (end - now).days),
                extra={"kind": "expires"},
            )  # fmt: skip

    def _see(self) -> bool:
        """Look at what those on the list show, to trust that alone; whether it is news."""
        listed, before = sorted(set(self._others()) & set(self._revoked.now.values())), self._pins
        with ThreadPoolExecutor(len(listed) or 1) as pool:
            found = pool.map(self._certificate_of, listed)
        self._pins = dict(zip(listed, found, strict=True))
        return self._pins != before

    def _certificate_of(self, name: str) -> bytes | None:
        """What a member shows, or of one that can't be reached showed; None if it is revoked."""
        try:
            found: bytes | None = self._show(name)
        except (OSError, Refused):
            found = self._pins.get(name)
        return found if found and not self.is_revoked(found) else None


def _configuration(papers: Credentials) -> grpc.ServerCertificateConfiguration:
    pair = (papers.own.key, papers.own.certificate)
    return grpc.ssl_server_certificate_configuration([pair], papers.authority)
