"""Peers with a fault: what runs in a process of its own, with one thing in it replaced."""

from __future__ import annotations

import dataclasses
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors.torch import load as safe_load
from safetensors.torch import save as safe_save
from xxhash import xxh3_128

import plait.engines.steps as steps
import plait.peers.round_loop as engine
from plait.peers import keyring, transport
from plait.peers import process as peers
from plait.peers.codec import Ack, Answer, Message
from plait.peers.credentials import Credentials, Pair
from plait.peers.exchange import Exchange
from plait.peers.inbox import Inbox
from plait.peers.mailbox import Desk
from plait.peers.process import run_peer
from plait.peers.refusals import Reason, Refused
from plait.runs import run_folder as runs

torch.set_num_threads(1)

Fault = Callable[..., None]


def live(
    config: str, name: str, log: str, fault: str, details: tuple, trust: str | None = None
) -> None:
    """A peer's whole life."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if fault:
        FAULTS[fault](*details)
    try:
        run_peer(Path(config), name, trust=trust)
    except (ValueError, OSError):
        sys.exit(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(stage: str, round_: int) -> None:
    """kill -9 by its own hand, at a stage of a round."""
    STAGES[stage](round_)


def _in_training(round_: int) -> None:
    original = engine.train_round

    def train_round(job, stack, t, *rest):
        losses = original(job, stack, t, *rest)
        if t == round_:
            die()
        return losses

    engine.train_round = train_round


def _while_sending(round_: int) -> None:
    original = Exchange._push

    def push(self, peer, message):
        original(self, peer, message)
        if message.header.round == round_:
            die()

    Exchange._push = push


def _while_waiting(round_: int) -> None:
    original = Exchange.wait

    def wait(self):
        if self.inbox.round == round_:
            time.sleep(0.5)
            die()
        original(self)

    Exchange.wait = wait


def _after_mixing(round_: int) -> None:
    original = engine.Peer._mix

    def mix(self, *args):
        result = original(self, *args)
        if self.inbox.round == round_ + 1:
            die()
        return result

    engine.Peer._mix = mix


def _while_saving(round_: int) -> None:
    original = safetensors.torch.save_file

    def save_file(tensors, path, metadata):
        original(tensors, path, metadata=metadata)
        if metadata.get("rounds_done") == str(round_ + 1):
            os.truncate(path, path.stat().st_size // 2)
            die()

    safetensors.torch.save_file = save_file


def _after_saving(round_: int) -> None:
    original = runs.RunFolder.save

    def save(self, stack, rounds_done, **beside):
        original(self, stack, rounds_done, **beside)
        if rounds_done == round_ + 1:
            die()

    runs.RunFolder.save = save


def _after_saving_unheard(round_: int) -> None:
    """Nobody had its message when it died: the network was slow, and it had all that it needed."""
    send, answer = transport.GrpcTransport.send, Inbox.answer

    def lost(self, to, message, deadline_s):
        if message.header.round == round_:
            return Ack(False, Reason.UNREACHABLE, "lost on the way")
        return send(self, to, message, deadline_s)

    def silent(self, asker, of_round):
        if of_round == round_:
            raise Refused(Reason.NOT_HERE, "not yet")
        return answer(self, asker, of_round)

    transport.GrpcTransport.send, Inbox.answer = lost, silent
    _after_saving(round_)


def _while_evaluating(round_: int) -> None:
    original = engine.evaluation

    def evaluation(job, stack, clients, t):
        if t == round_:
            die()
        return original(job, stack, clients, t)

    engine.evaluation = evaluation


def _while_finishing(_round: int) -> None:
    def save_adapter(*_):
        die()

    peers.save_adapter = save_adapter


STAGES: dict[str, Callable[[int], None]] = {
    "in training": _in_training,
    "while sending": _while_sending,
    "while waiting": _while_waiting,
    "after mixing": _after_mixing,
    "while evaluating": _while_evaluating,
    "while saving": _while_saving,
    "after saving": _after_saving,
    "after saving, unheard": _after_saving_unheard,
    "while finishing": _while_finishing,
}


def slow(seconds: float) -> None:
    """Training takes so much longer."""
    original = engine.train_round

    def train_round(*args):
        time.sleep(seconds)
        return original(*args)

    engine.train_round = train_round


def watchful(seconds: float) -> None:
    """The peer looks for new certificates all the time, and is slow enough to meet some."""
    transport.LOOK_S = 0.1
    slow(seconds)


def diverging(round_: int) -> None:
    """The loss of a round is not a number."""
    original = steps.local_phase

    def local_phase(backbone, stack, active, t, *rest):
        losses = original(backbone, stack, active, t, *rest)
        return losses * float("nan") if t == round_ else losses

    steps.local_phase = local_phase


def careless_about_certificates() -> None:
    """The peer uses the files it has, whatever they are; the others are the ones to object."""

    def read(settings):
        pair = Pair(settings.certificate.read_bytes(), settings.key.read_bytes())
        return Credentials(settings.ca.read_bytes(), pair, {})

    keyring.read_credentials = read


def without_certificate() -> None:
    """A client that shows no certificate at all."""
    original = keyring.grpc.ssl_channel_credentials
    careless_about_certificates()
    keyring.grpc.ssl_channel_credentials = lambda ca, *_: original(ca)


def hostile(kind: str) -> None:
    """A member of the federation, with a good certificate, that attacks before each message."""
    original = transport.GrpcTransport.send
    delivered = set()

    def send(self, to, message, deadline_s):
        for attack in ATTACKS[kind](self, message):
            round_ = attack.header.round
            if round_ < message.header.round and (to, round_) not in delivered:
                continue  # whatever a member says first is its message of that round
            attack_ack = original(self, to, attack, deadline_s)
            assert not attack_ack.accepted, f"{kind} was accepted"
        ack = original(self, to, message, deadline_s)
        if ack.accepted:
            delivered.add((to, message.header.round))
        return ack

    if kind == "random bytes":
        transport.write_header = _noise(transport.write_header)
    transport.GrpcTransport.send = send


def lying(size: float) -> None:
    """What the peer sends is made up: random numbers, nothing wrong with their form."""
    original = engine.train_round

    def train_round(job, stack, t, *rest):
        losses = original(job, stack, t, *rest)
        for value in stack.factors.values():
            value.copy_(size * torch.randn(value.shape))
        return losses

    engine.train_round = train_round


FAR = 10**6


def ahead(size: float) -> None:
    """The peer says that it is far ahead, and what it gives as its state is made up."""
    original, ask = Desk.answer, transport.write_question

    def answer(self, question):
        found = original(self, question)
        if question.kind == "status":
            return Answer(found.facts | {"round": FAR})
        if question.kind == "state":
            body = found.message.body
            values = size * np.random.default_rng(0).standard_normal(
                found.message.values_bytes // 4
            )
            made_up = body[: -found.message.values_bytes] + values.astype("<f4").tobytes()
            return Answer({"round": FAR}, _with_body(found.message, made_up))
        return found

    Desk.answer = answer
    transport.write_question = lambda question: ask(dataclasses.replace(question, asker_round=FAR))


def _said(message: Message, **changes: Any) -> Message:
    """The message with another header."""
    return dataclasses.replace(message, header=dataclasses.replace(message.header, **changes))


def _with_body(message: Message, body: bytes) -> Message:
    said = _said(message, num_bytes=len(body), digest=xxh3_128(body).digest())
    return dataclasses.replace(said, body=body)


def _not_finite(_transport, message: Message) -> list[Message]:
    body = bytearray(message.body)
    body[-4:] = struct.pack("<f", float("nan"))
    return [_with_body(message, bytes(body))]


def _wrong_shapes(_transport, message: Message) -> list[Message]:
    tensors = {name: value.T.contiguous() for name, value in safe_load(message.body).items()}
    return [_with_body(message, safe_save(tensors))]


def _huge(_transport, message: Message) -> list[Message]:
    more = dataclasses.replace(message, body=message.body + bytes(64 << 20))
    return [_said(message, num_bytes=1 << 30), more]


def _old(_transport, message: Message) -> list[Message]:
    if message.header.round == 0:
        return []
    round_ = message.header.round
    return [_said(message, round=round_ - 1), _said(message, round=round_ + 1000)]


def _another_name(transport_, message: Message) -> list[Message]:
    names = [name for name in transport_._members.newest.names if name != message.header.sender]
    return [_said(message, sender=name) for name in [*names, "nobody"]]


def _wrong_phase(_transport, message: Message) -> list[Message]:
    return [_said(message, active="AB")]


def _random(_transport, message: Message) -> list[Message]:
    noise = [dataclasses.replace(message, body=os.urandom(size)) for size in (1, 100, 100_000)]
    return [*noise, _said(message, active=NOISE)]


def _noise(original):
    """Random bytes, no protobuf, for the header that is marked as noise."""

    def write_header(header, receiver):
        return b"\xff" + os.urandom(100) if header.active == NOISE else original(header, receiver)

    return write_header


NOISE = "noise"
ATTACKS: dict[str, Callable[..., list[Message]]] = {
    "NaN": _not_finite,
    "wrong shapes": _wrong_shapes,
    "1 GiB": _huge,
    "random bytes": _random,
    "old and future rounds": _old,
    "another's name": _another_name,
    "wrong phase": _wrong_phase,
}

FAULTS: dict[str, Fault] = {
    "killed": killed_at,
    "slow": slow,
    "watchful": watchful,
    "diverging": diverging,
    "lying": lying,
    "ahead": ahead,
    "careless": careless_about_certificates,
    "without certificate": without_certificate,
    "hostile": hostile,
}
