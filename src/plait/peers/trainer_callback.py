"""A trainer of transformers, or of TRL, as the loop of a peer: a round is so many of its steps.

with plait.join("federation.toml", "ada") as peer:
    Trainer(model=peer.model(), args=..., callbacks=[peer.callback()]).train()
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from plait.peers.participant import Participant, Round


class RoundCallback(TrainerCallback):
    """Ends a round after every so many optimizer steps, and the training after the last round.

    Attributes:
        peer: Who takes part.
        steps: The optimizer steps of a round.
    """

    def __init__(self, peer: Participant, steps: int) -> None:
        """Nothing happens before the training begins."""
        self.peer, self.steps = peer, steps
        self._rounds: Iterator[Round] = iter(())
        self._loss: float | None = None
        self._due = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the first round that is left."""
        if args.world_size > 1:
            raise ValueError("A peer is one process: train without torchrun or several devices.")
        self._rounds = self.peer.rounds(kwargs["model"])
        self._open(state, control, kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where nothing was left to do, undo the one step that a trainer takes all the same."""
        if self._due == 0:
            self.peer.put_back()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the loss, to be told with the round."""
        self._loss = kwargs["logs"].get("loss", self._loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the round, if that was its last step, and begin the next one."""
        if state.global_step == self._due:
            self.peer.mix(kwargs["model"], self._loss)
            self._open(state, control, kwargs["optimizer"])

    def _open(self, state: TrainerState, control: TrainerControl, optimizer: Any) -> None:
        round_ = next(self._rounds, None)
        if round_ is None:
            control.should_training_stop = True
            return
        _check_steps(state, (self.peer.process.end - round_.number) * self.steps)
        _check_optimizer(round_, optimizer)
        round_.reset(optimizer)
        self._due = state.global_step + self.steps


def _check_steps(state: TrainerState, needed: int) -> None:
    """That the trainer doesn't end before the federation does."""
    if state.max_steps - state.global_step < needed:
        raise ValueError(
            f"The trainer ends after {state.max_steps} steps, and the rounds that are left take "
            f"{needed + state.global_step}: pass max_steps={needed + state.global_step}."
        )


def _check_optimizer(round_: Round, optimizer: Any) -> None:
    """That what trains in a round is the optimizer's to move."""
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    if any(id(one) not in held for one in round_.parameters):
        raise ValueError(
            "The trainer's optimizer hasn't got all that trains in the federation: the classifier "
            "must be trainable when the trainer is made; take peer.model()."
        )
