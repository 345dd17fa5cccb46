"""How messages get from peer to peer: gRPC over mutual TLS, with a deadline on every call.

A peer is a server, and a client to its neighbours. Who it talks to is what the certificates say:
a client checks the server's for the neighbour's name, and the server takes a sender's name from
the sender's. gRPC runs on one background thread; `send` and `ask` may be called from any others.

A header is checked before any of its body is read, and a body has no more bytes than its header
declared. gRPC's own limits, on metadata and on a piece, hold for whatever comes before that.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from grpc import aio
from grpc_health.v1 import health_pb2
from torch import Tensor

from plait.factors import VALUE, Slot
from plait.lora import Layout
from plait.peers.changes import Rows
from plait.peers.channels import Channels
from plait.peers.codec import NO_ROWS, Ack, Answer, Header, Identity, Message, Question, decode
from plait.peers.envelope import (
    Assembly,
    read_ack,
    read_answer,
    read_header,
    read_question,
    write_ack,
    write_answer,
    write_header,
    write_question,
    write_refusal,
)
from plait.peers.event_loop import BACKGROUND
from plait.peers.federation import RELAY, PeerSettings, is_loopback, split_address
from plait.peers.grpc_server import certified, revoked, serve
from plait.peers.guard import CARRY, REASONS, Guard, Names, caller_of
from plait.peers.keyring import LOOK_S, Keyring
from plait.peers.membership import Members
from plait.peers.pace import SLOWEST, moved, paced
from plait.peers.refusals import Reason, Refused
from plait.peers.revocation import shown
from plait.peers.tunnel import Carrier

CLOSED = "the channel was closed, as new certificates are taken"
WORD_S = 1.0
"""How long the last word of a call may take."""

DELIVER, ASK = "/plait.v1.Peer/Deliver", "/plait.v1.Peer/Ask"
HEALTH = "/grpc.health.v1.Health/Check"
HEADER = "plait-header-bin"
"""The metadata of a delivery: its header."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back on a question: facts, and factors or a list of members if it was for them."""

    facts: dict[str, Any]
    header: Header | None = None
    factors: dict[Slot, Tensor] | None = None
    roster: str = ""


@dataclass(frozen=True)
class Counts:
    """Bytes of bodies by peer, since the start."""

    sent_bytes: Counter[str] = field(default_factory=Counter)
    received_bytes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Kept:
    """What came of a body before its transfer broke off."""

    digest: bytes
    assembly: Assembly


class Stream(Protocol):
    """What both sides of gRPC read from, at less cost than iterating over it."""

    async def read(self) -> Any:
        """The next message, or `aio.EOF`."""


class Desk(Protocol):
    """Whoever takes the messages. Called on the transport's thread, so it must be quick."""

    def admit(self, header: Header) -> None:
        """A message is about to come; raise `Refused` to have none of its body."""

    def known(self, sender: str, slots: Collection[Slot]) -> Rows:
        """What is here of a peer, for its change of it."""

    def take(self, header: Header, factors: dict[Slot, Tensor]) -> None:
        """A message has come and was checked; raise `Refused` to have the sender told."""

    def answer(self, question: Question) -> Answer:
        """A peer asks; raise `Refused` for no answer."""

    def gave(self, asker: str, message: Message) -> None:
        """An answer's message has gone out whole."""

    def moving(self, sender: str, until: float) -> None:
        """A body is coming; its next piece is here by then, in the time of `time.monotonic`."""

    def refused(self, sender: str, reason: Reason, detail: str) -> None:
        """Something from a peer was refused, here or by one of the above."""


class Transport(Protocol):
    """What the round protocol needs of a network."""

    def start(self) -> None:
        """Begin to listen."""

    def send(self, to: str, message: Message, deadline_s: float) -> Ack:
        """Deliver a message; returns within the deadline."""

    def ask(self, to: str, question: Question, deadline_s: float) -> Reply:
        """Ask a peer; returns, or raises `Refused`, within the deadline."""

    def stop(self, grace_s: float) -> None:
        """Let open calls end, for so long, and stop."""


class GrpcTransport:
    """The one transport: gRPC, with mutual TLS unless told that all is on this machine."""

    def __init__(
        self,
        members: Members,
        settings: PeerSettings,
        layout: Layout,
        desk: Desk,
        *,
        kinds: tuple[str, ...] = (VALUE,),
        rank_of: Callable[[str], int] | None = None,
        insecure_loopback: bool = False,
    ) -> None:
        """Read the certificates; nothing listens yet.

        Args:
            members: Who takes part.
            settings: Of this peer.
            layout: Of the factors of a client of the largest rank.
            desk: Takes what comes.
            kinds: The kinds of slot that the method sends.
            rank_of: Name -> that peer's rank; all have the layout's if not given.
            insecure_loopback: No TLS and no certificates, and no address but of this machine.

        Raises:
            ValueError: A certificate is missing or unfit, or an address is not of this machine.
        """
        federation = members.newest
        limits = federation.limits
        self.counts = Counts()
        self.identity = Identity(
            name=settings.name,
            federation=federation.id,
            config_digest=members.digest,
            layout=layout,
            rank_of=rank_of,
            wire=federation.config.wire,
            max_message_bytes=limits.max_message_bytes,
            norm_bound=limits.norm_bound,
            kinds=kinds,
        )
        self._listen = settings.listen
        self._members = members
        self._keyring = None if insecure_loopback else Keyring(settings, self._others, self.shows)
        self._certified = partial(certified, secure=not insecure_loopback)
        if insecure_loopback:
            for address in (
                self._listen,
                *(peer.address for peer in federation.peers if peer.reachable),
            ):
                _check_loopback(address)
        self._desk = desk
        self._call_timeout_s = limits.round_timeout_s
        self._channels = Channels(members, settings, self._keyring)
        self._kept: dict[str, Kept] = {}
        self._server: aio.Server | None = None
        self._watch: asyncio.Task[None] | None = None

    # -- what the round protocol calls, from any thread

    def start(self, serve: bool = True) -> None:
        """Begin to listen; or only be able to call others, without `serve`.

        Raises:
            ValueError: The address is in use, or not of this machine.
        """
        BACKGROUND.acquire()
        try:
            if self._keyring:
                self._keyring.look()
            if serve:
                BACKGROUND.run(self._serve()).result()
        except BaseException:
            BACKGROUND.release()
            raise

    def send(self, to: str, message: Message, deadline_s: float) -> Ack:
        """Deliver a message; whatever goes wrong is in the acknowledgement."""
        try:
            return BACKGROUND.run(self._send(to, message, deadline_s)).result()
        except Refused as refused:
            return Ack(False, refused.reason, refused.detail)
        except CancelledError:
            return Ack(False, Reason.UNREACHABLE, CLOSED)

    def ask(self, to: str, question: Question, deadline_s: float) -> Reply:
        """Ask a peer.

        Raises:
            Refused: By the peer, or because it can't be reached, or because its answer is bad.
        """
        try:
            return BACKGROUND.run(self._ask(to, question, deadline_s)).result()
        except CancelledError:
            raise Refused(Reason.UNREACHABLE, CLOSED) from None

    def alive(self, to: str, deadline_s: float) -> bool:
        """Whether a peer's health service says that it serves."""
        return BACKGROUND.run(self._alive(to, deadline_s)).result()

    def renew(self) -> None:
        """Reach the members where the newest list has them, from the next call on."""
        BACKGROUND.run(self._channels.renew(self._call_timeout_s)).result()

    def _others(self) -> set[str]:
        return {*self._members.newest.names, RELAY} - {self.identity.name}

    def expires(self) -> dict[str, int]:
        """Until when this peer's `certificate` and `authority` are valid, seconds since 1970."""
        return self._keyring.expires() if self._keyring else {}

    def shows(self, name: str) -> bytes:
        """The certificate, PEM, that a member shows whoever connects to it.

        Raises:
            Refused: There is no way to it.
            OSError: It isn't there, or shows none that counts (`ssl.SSLError`).
        """
        assert self._keyring, "without TLS there are none"
        route = BACKGROUND.run(self._channels.route(name)).result()
        return shown(route, name, self._keyring.authority)

    def stop(self, grace_s: float) -> None:
        """Let open calls end, for so long, and stop."""
        BACKGROUND.run(self._stop(grace_s)).result()
        BACKGROUND.release()

    # -- on the background thread: as a server

    async def _serve(self) -> None:
        # A call gets a little longer than what it is for, so that the caller still hears why.
        guard = Guard(
            lambda: self._members.newest.names,
            self._certified,
            partial(revoked, keyring=self._keyring),
            self._call_timeout_s + WORD_S,
            self._desk.refused,
        )
        own = self.identity.name
        carrier = Carrier(self._channels.board, self._certified, lambda caller, _: caller == own)
        methods = {
            DELIVER: self._deliver,
            ASK: self._answer,
            HEALTH: _healthy,
            CARRY: carrier.carry,
        }
        self._server = await serve(
            self._listen, self._keyring, guard, methods, len(self._members.newest.names)
        )
        await self._channels.serve()
        if self._keyring:
            self._watch = asyncio.create_task(self._keep_current(self._keyring))

    async def _deliver(self, _stream: Any, context: Any) -> None:
        """The handler of a delivery."""
        certified = self._certified(context)
        work = partial(self._receive, certified, context)
        await context.write(write_ack(await self._attempt(work, certified, context)))

    async def _receive(self, certified: Names, context: Any) -> None:
        """Take a message: every check, in the order of what it costs."""
        header = read_header(dict(context.invocation_metadata()).get(HEADER, b""))
        self._check(header, certified)
        template = self.identity.template(header)
        self._desk.admit(header)
        body = await self._body(context, header, header.sender)
        self.counts.received_bytes[header.sender] += len(body)
        changes = header.kind == "change"
        before = self._desk.known(header.sender, template.slots) if changes else NO_ROWS
        self._desk.take(header, decode(header, body, self.identity, before))

    async def _answer(self, _stream: Any, context: Any) -> None:
        """The handler of a question."""
        certified = self._certified(context)
        data = await _next(context) or b""
        work = partial(self._reply_to, data, certified, context)
        refused = await self._attempt(work, certified, context)
        # One who doesn't read what it asked for would not read this either.
        if refused and refused.reason is not Reason.NO_ANSWER:
            await context.write(write_refusal(refused))

    async def _reply_to(self, data: bytes, certified: Names, context: Any) -> None:
        question = read_question(data)
        self._check(question, certified)
        answer = self._desk.answer(question)
        if answer.message is None:
            await context.write(write_answer(answer, question.sender))
        else:
            offset, pieces = answer.message.rest(question)
            await context.write(write_answer(answer, question.sender, offset))
            for piece in pieces:
                await context.write(piece)
                moved(len(piece))
            self.counts.sent_bytes[question.sender] += len(answer.message.body)
            self._desk.gave(question.sender, answer.message)

    def _check(self, header: Header | Question, certified: Names) -> None:
        self.identity.check(header, certified)
        if header.sender not in self._members.newest.names:
            raise Refused(Reason.WRONG_SENDER, f"{header.sender!r:.80} is no member")

    async def _attempt(
        self, work: Callable[[], Awaitable[None]], certified: Names, context: Any
    ) -> Refused | None:
        """Do a peer's bidding within a time. A refusal is counted."""
        caller = caller_of(certified, self._members.newest.names, context)
        try:
            async with paced(self._call_timeout_s):
                await work()
            return None
        except Refused as error:
            refused = error
        except TimeoutError:
            refused = Refused(Reason.NO_ANSWER, "the call did not end in time")
        self._desk.refused(caller, refused.reason, refused.detail)
        return refused

    # -- on the background thread: as a client

    async def _send(self, to: str, message: Message, deadline_s: float) -> Ack:
        channel, pieces = await self._channels.to(to), message.pieces
        seconds = deadline_s + len(message.body) / SLOWEST
        how = {"timeout": seconds, "metadata": ((HEADER, write_header(message.header, to)),)}
        with _grpc_errors(to):
            # On the wire one piece is the same either way; as a stream it takes gRPC more steps.
            call = (
                channel.unary_unary(DELIVER)(pieces[0], **how)
                if len(pieces) == 1
                else channel.stream_unary(DELIVER)(iter(pieces), **how)
            )
            ack = read_ack(await call)
        self.counts.sent_bytes[to] += len(message.body) if ack.accepted else 0
        return ack

    async def _ask(self, to: str, question: Question, deadline_s: float) -> Reply:
        kept = self._kept.get(to)
        asked = write_question(
            Question(
                kind=question.kind,
                round=question.round,
                asker_round=question.asker_round,
                sender=self.identity.name,
                receiver=to,
                federation=self.identity.federation,
                config_digest=self.identity.config_digest(question.about),
                members=self._members.roster.version,
                have=kept.assembly.num_bytes if kept else 0,
                have_digest=kept.digest if kept else b"",
            )
        )
        channel = await self._channels.to(to)
        with _grpc_errors(to):
            call = channel.unary_stream(ASK)(asked)
            try:
                async with paced(deadline_s):
                    return await self._reply(to, call)
            except TimeoutError:
                raise Refused(Reason.NO_ANSWER, f"{to}: no answer in time") from None
            finally:
                call.cancel()

    async def _reply(self, to: str, stream: Stream) -> Reply:
        """Read an answer, as distrustful as a message that comes by itself."""
        begin = read_answer(await _next(stream) or b"")
        facts, header, offset = begin.facts, begin.header, begin.offset
        if header is None:
            return Reply(facts=facts, roster=begin.roster)
        # The channel was opened to this name, so the certificate has it.
        self.identity.check(header, frozenset([to]))
        self.identity.template(header)
        body = await self._body(stream, header, to, offset)
        self.counts.received_bytes[to] += len(body) - offset
        factors = decode(header, body, self.identity)
        return Reply(facts=facts, header=header, factors=factors)

    async def _body(
        self, stream: Stream, header: Header, sender: str, offset: int = 0
    ) -> bytes | bytearray:
        """A body; where it breaks off, what has come of it is kept for the next question.

        What comes after the bytes that were declared is not read.
        """
        kept = self._kept.pop(sender, None)
        assembly = Assembly(header.num_bytes)
        if offset:
            if kept is None or (kept.digest, kept.assembly.num_bytes) != (header.digest, offset):
                raise Refused(Reason.MALFORMED, f"a body from byte {offset} on")
            assembly = kept.assembly
        try:
            while not assembly.whole and (piece := await _next(stream)) is not None:
                assembly.add(piece)
                self._desk.moving(sender, moved(len(piece)))
            return assembly.finish()
        finally:
            self._desk.moving(sender, 0.0)
            # Whoever asks afterwards gets the whole body, of which a change is no part.
            if 0 < assembly.num_bytes < header.num_bytes and header.kind != "change":
                self._kept[sender] = Kept(header.digest, assembly)

    async def _alive(self, to: str, deadline_s: float) -> bool:
        try:
            check = (await self._channels.to(to)).unary_unary(HEALTH)
            asked = health_pb2.HealthCheckRequest().SerializeToString()
            answer = health_pb2.HealthCheckResponse.FromString(
                await check(asked, timeout=deadline_s)
            )
        except (aio.AioRpcError, Refused):
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def _keep_current(self, keyring: Keyring) -> None:
        """Look for new certificates, and have the next calls made with them."""
        while True:
            await asyncio.sleep(LOOK_S)
            if await asyncio.to_thread(keyring.look):
                await self._channels.renew(self._call_timeout_s)

    async def _stop(self, grace_s: float) -> None:
        if self._watch:
            self._watch.cancel()
        await self._channels.close(grace_s)
        if self._server:
            await self._server.stop(grace_s)
            self._server = None


async def _next(stream: Stream) -> bytes | None:
    """The next message of a stream, None at its end."""
    data = await stream.read()
    return None if data is aio.EOF else data


@contextmanager
def _grpc_errors(to: str) -> Iterator[None]:
    """What gRPC raises, as a refusal that says what it means."""
    try:
        yield
    except aio.AioRpcError as error:
        reason = REASONS.get(error.code(), Reason.UNREACHABLE)
        raise Refused(reason, f"{to}: {error.code().name} {error.details()}") from None
    except aio.UsageError:
        raise Refused(Reason.UNREACHABLE, CLOSED) from None


async def _healthy(_stream: Any, context: Any) -> None:
    """The health service's one method that is needed: a server that answers is well."""
    answer = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    await context.write(answer.SerializeToString())


def _check_loopback(address: str) -> None:
    host, _ = split_address(address)
    if not is_loopback(host):
        raise ValueError(
            f"--insecure-loopback takes addresses such as 127.0.0.1:7600 only, not {address}. "
            "Between machines there is no mode without TLS."
        )
