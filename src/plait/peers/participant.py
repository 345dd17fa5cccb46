"""A peer whose training loop is somebody else's: any loop of PyTorch takes part in a federation.

    with plait.join("federation.toml", "ada") as peer:
        model = peer.model()
        for round in peer.rounds():
            train(model, round.trains)
            peer.mix(model)

All but the local steps is `plait peer`'s: its process, its round loop, its messages, its folder.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from plait.config import Config
from plait.engines.job import Job
from plait.engines.steps import Turns, begins_anew, check_finite
from plait.factors import VALUE, Factor, factors_name
from plait.lora import Stack
from plait.machine.extras import PEER_PACKAGES, need
from plait.methods import EVERY_STEP, build_method
from plait.model.loading import load_for
from plait.model.peft_adapters import lora_config
from plait.model.peft_model import ClientModel

if TYPE_CHECKING:  # they take packages that may not be there, or seconds
    from plait.peers.process import Process
    from plait.peers.round_loop import Due
    from plait.peers.trainer_callback import RoundCallback


def join(
    federation_file: Path | str,
    name: str,
    *,
    insecure_loopback: bool = False,
    trust: str | None = None,
) -> Participant:
    """Take part in a federation with a training loop of one's own.

    The peer listens from now on; it talks to others once `Participant.rounds` is looped over. Its
    folder, log, status and figures are those of `plait peer`, and it goes on where it was cut off.

    Args:
        federation_file: `federation.toml`; `<name>/peer.toml` lies beside it. Where peers bring
            rows of their own (task `file` or `chat`) it need not name any: then only the loop knows
            them, and the peer evaluates nothing.
        name: Which peer this is.
        insecure_loopback: As for `plait peer`.
        trust: As for `plait peer`.

    Raises:
        ValueError: The files ask for what can't be, or the method for what a loop doesn't do.
        OSError: The run folder can't be written.

    Example:
        >>> with join("fed/federation.toml", "ada") as peer:  # doctest: +SKIP
        ...     model = peer.model()
        ...     for round in peer.rounds():
        ...         train(model, round.trains)
        ...         peer.mix(model)
    """
    for package in PEER_PACKAGES:
        need(package, "peer", "A federation")
    from plait.peers.federation import load_peer
    from plait.peers.guard import raise_descriptor_limit
    from plait.peers.json_log import log_events
    from plait.peers.membership import load_members
    from plait.peers.process import Process, saying_what_stops, was_finished

    log_events(name)
    raise_descriptor_limit()
    with saying_what_stops():
        file = Path(federation_file)
        own = load_peer(file, name)
        members = load_members(file, own)
        _check_method(members.newest.config)
        over = was_finished(members.first_with(name), own)
        process = Process(members, own, threading.Event(), insecure_loopback, trust, own_loop=True)
        process.lists = file.parent
        return Participant(process, over)


def _check_method(config: Config) -> None:
    """Refuse a method for which a loop would have to do more than train and hand over factors."""
    method = build_method(config)
    if {*method.kinds} & {*method.optimizer.kinds}:
        raise ValueError(
            f"{config.method} sends what its optimizer keeps, which a loop of one's own doesn't "
            "hand over; let `plait peer` take part in it."
        )
    if method.turn is not EVERY_STEP:
        raise ValueError(
            f"In {config.method} factors take local steps by turns, which a loop of one's own "
            "doesn't know; let `plait peer` take part in it."
        )


@dataclass(frozen=True)
class Round:
    """A round in which the model is to be trained.

    Attributes:
        number: From 0.
        trains: What trains: `Factor.A` (lora_A), `Factor.B` (lora_B), both, `Factor.HEAD` with it.
        parameters: The parameters of the model that train; all others need no gradient now.
        anew: Those of them whose optimizer state starts from nothing in this round.
    """

    number: int
    trains: Factor
    parameters: Sequence[nn.Parameter]
    anew: Sequence[nn.Parameter]

    def reset(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer that lives longer than a round forget what it keeps of `anew`."""
        for parameter in self.anew:
            optimizer.state.pop(parameter, None)


class Participant:
    """A peer whose local steps are done by a loop of one's own.

    Attributes:
        process: All else of the peer.
    """

    def __init__(self, process: Process, over: bool) -> None:
        """Listen; `over` says that all rounds were done before."""
        self.process = process
        self._going: Iterator[Due] = iter(()) if over else process.rounds()
        self._due: Due | None = None
        self._client: ClientModel | None = None
        self._done = process.first_round
        self._until_end = ExitStack()
        self._until_end.enter_context(process)

    def __enter__(self) -> Participant:
        """It listens already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave, wherever it is."""
        self.close()

    def close(self) -> None:
        """Leave; a round that was begun is done again after the next `join`."""
        self._due = None
        self._going = iter(())
        self._until_end.close()

    @property
    def config(self) -> Config:
        """The settings of the run, with this peer's own."""
        return self.process.job.config

    # -- the model

    @property
    def _rank(self) -> int:
        return self.config.rank_of(self.process.me)

    def lora_config(self) -> LoraConfig:
        """PEFT's settings of the adapter that the federation trains, for `get_peft_model`."""
        return lora_config(self.process.job.backbone, self.config, self._rank)

    def tokenizer(self) -> Any:
        """The tokenizer of the frozen model."""
        return self.process.job.backbone.tokenizer

    def model(self) -> PeftModel:
        """A PEFT model to train: the federation's adapter on this peer's copy of the frozen model.

        Raises:
            ValueError: The frozen model can't be loaded.
        """
        task = self.process.job.task
        loaded = load_for(self.config, task.objective, task.label_names)
        model = get_peft_model(loaded.model.requires_grad_(False), self.lora_config())
        self._client = ClientModel(model, self.process.job.backbone, self._rank)
        self._client.train(~Factor.NONE)
        self._client.take(self.process.stack.factors)
        return model

    # -- rounds

    def rounds(self, model: Any = None) -> Iterator[Round]:
        """The rounds that are left, each until `mix` has ended it; after the last the peer leaves.

        In a round the model holds what it begins from, and what doesn't train needs no gradient.

        Args:
            model: A PEFT model of one's own, with `lora_config`'s adapter; not needed where `model`
                made it.

        Raises:
            ValueError: The model isn't as the federation has it, a round was not mixed, or the peer
                can't go on; its message is in the log, too.
        """
        if model is not None and (self._client is None or model is not self._client.model):
            self._client = ClientModel(model, self.process.job.backbone, self._rank)
            self.put_back()
        if self._client is None:
            raise ValueError("There is no model: take peer.model(), or give yours, rounds(model).")
        if self._due is None:
            self._go_on()
        while (due := self._due) is not None:
            yield self._opened(due)
            if self._due is due:
                raise ValueError(
                    f"Round {due.round} wasn't mixed: call peer.mix(model) in the loop."
                )
        self.close()

    def mix(self, model: Any, loss: float | None = None) -> None:
        """End the round: send the model's factors, wait for the neighbours', mix, write it back.

        Args:
            model: The model of `rounds`, trained.
            loss: The mean loss of the round's steps, for log and record.

        Raises:
            ValueError: It is no model of this round, or training diverged: then nothing was sent.
            OSError: The run folder can't be written.
        """
        from plait.peers.process import saying_what_stops

        if self._due is None or self._client is None or model is not self._client.model:
            raise ValueError("mix(model) ends a round: call it in the loop over rounds(model).")
        with saying_what_stops():
            self.process.peer.train(self._due, partial(_hand_over, self._client, loss))
        self._done = self._due.round + 1
        self._go_on()

    def put_back(self) -> None:
        """Let the model hold what the last round left."""
        assert self._client is not None
        self._client.take(self.process.stack.factors)

    def callback(self, steps: int | None = None) -> RoundCallback:
        """What has a trainer of transformers or TRL take part: `Trainer(..., callbacks=[...])`.

        Args:
            steps: The optimizer steps of a round; the federation's `local_steps` if not given.
        """
        from plait.peers.trainer_callback import RoundCallback

        return RoundCallback(self, steps or self.config.local_steps)

    def _go_on(self) -> None:
        """To the next round that is due, if there is one; the model gets what is there then."""
        from plait.peers.process import saying_what_stops

        with saying_what_stops():
            self._due = next(self._going, None)
        self.put_back()

    def _opened(self, due: Due) -> Round:
        assert self._client is not None
        client, job, number = self._client, self.process.job, due.round
        trains, me = job.trained(number, self.process.me), self.process.me
        client.train(trains)
        since = range(min(self._done, number), number + 1)  # with rounds that were left out
        anew = [
            factor
            for factor in client.factors
            if factor in trains
            and any(factor in job.trained(t, me) and begins_anew(factor, t, job, me) for t in since)
        ]
        return Round(
            number=number,
            trains=trains,
            parameters=client.parameters(trains),
            anew=[one for factor in anew for one in client.parameters(factor)],
        )


def _hand_over(
    client: ClientModel,
    loss: float | None,
    job: Job,
    stack: Stack,
    round_: int,
    peers: Sequence[int],
    turns: Turns,
) -> np.ndarray:
    """The `Phase` of a loop that has trained a model already: its factors go into the stack."""
    losses = np.array([math.nan if loss is None else float(loss)])
    if loss is not None:
        check_finite(losses, peers, round_, job.config.lr)
    trained = reduce(or_, turns)
    rows = {factor: client.row(factor) for factor in stack.factors}
    for factor, row in rows.items():
        name = factors_name(factor)
        if factor not in trained and not torch.equal(row, stack.factors[factor]):
            raise ValueError(
                f"{name} of the model has changed in round {round_}, in which "
                f"{factors_name(trained)} trains alone: step on round.parameters only."
            )
        if not row.isfinite().all():
            raise ValueError(
                f"{name} of the model is not finite in round {round_}: training diverged, nothing "
                "was sent. Lower the loop's learning rate, or clip gradients."
            )
    stack.state |= {(VALUE, factor): rows[factor] for factor in rows if factor in trained}
    return losses
