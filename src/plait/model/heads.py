"""Heads: from the last hidden state to logits.

Legend: T tokens of a batch, R its texts, Q places asked, d the model's width, L a padded length, C
outputs: classes, or the tokens of a vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    SequenceClassifierOutput,
)

from plait.data.objectives import Objective
from plait.data.tokens import Batch


class MeanPooledClassifier(nn.Module):
    """Mean of the last hidden states, scaled to length sqrt(d), and a linear layer from zero.

    For sentence encoders such as MiniLM, whose checkpoints have no pooler: the stock head would
    read the first token, which they never trained, through a random layer.
    """

    def __init__(self, base: Any, num_labels: int) -> None:
        super().__init__()
        self.config = base.config
        self.base = base
        self.classifier = nn.Linear(base.config.hidden_size, num_labels)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @property
    def device(self) -> torch.device:
        """Where it is; `transformers.pipeline` asks."""
        return self.classifier.weight.device

    def can_generate(self) -> bool:
        """Whether it writes texts; `transformers.pipeline` asks."""
        return False

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """As any sequence classification model of transformers: ids and mask (R, L) to logits."""
        hidden = self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        mask = attention_mask[..., None].to(hidden.last_hidden_state.dtype)
        total = (hidden.last_hidden_state * mask).sum(1)
        return SequenceClassifierOutput(logits=self.classifier(scale_to_width(total)))


def scale_to_width(x: Tensor) -> Tensor:
    """(R, d) -> (R, d) with rows of length sqrt(d); a sum and a mean come out alike."""
    return nn.functional.normalize(x, dim=-1) * math.sqrt(x.shape[-1])


class MeanHead(nn.Module):
    """Last hidden state (T, d) -> logits (R, C) by `MeanPooledClassifier`'s rule."""

    asked_only = False

    def __init__(self, model: MeanPooledClassifier) -> None:
        super().__init__()
        self.classifier = model.classifier

    def remove(self) -> None:
        """Nothing to put back: the model is as it was."""

    @staticmethod
    def read(hidden: Tensor, batch: Batch) -> Tensor:
        """(T, d) -> features (Q, d), the mean of each text."""
        return scale_to_width(_sum(hidden, batch))

    def forward(self, features: Tensor) -> Tensor:
        """(R, d) -> (R, C)."""
        return self.classifier(features)  # type: ignore[no-any-return]


def _sum(hidden: Tensor, batch: Batch) -> Tensor:
    """(T, d) -> (R, d), the sum of each text's tokens."""
    text = torch.repeat_interleave(batch.lengths, output_size=batch.num_tokens)
    total = hidden.new_zeros(len(batch.lengths), hidden.shape[1])
    return total.index_add(0, text, hidden[: batch.num_tokens])


def _asked(hidden: Tensor, _batch: Batch) -> Tensor:
    return hidden


def _last(hidden: Tensor, batch: Batch) -> Tensor:
    return hidden[batch.starts + batch.lengths - 1]


def _mean(hidden: Tensor, batch: Batch) -> Tensor:
    return _sum(hidden, batch) / batch.lengths[:, None]


READS: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "asked": _asked,
    "last": _last,
    "mean": _mean,
}
"""Where a model's own head reads its text: the first token (or in a language model each that is
asked), the last one, or the mean of all."""


class OwnHead(nn.Module):
    """Hidden states (Q, d) -> logits (Q, C) by the model's own code after its encoder.

    The model's `forward` runs with its encoder replaced by one that returns what we computed, each
    hidden state as a text of one token, so pooler, activation and head are the architecture's own,
    whatever they are.
    """

    def __init__(self, model: Any, read: str = "asked") -> None:
        super().__init__()
        self.asked_only, self._read = read == "asked", READS[read]
        self.pooler = _pooler(model.base_model)
        # transformers' decoders classify several texts only if there is a token to pad them with.
        pads = model.can_generate() or model.config.get_text_config().pad_token_id is not None
        self._one_by_one = not pads
        self.computed = _Computed()
        base = model.base_model
        self._put_back = partial(setattr, model, model.base_model_prefix, base)
        setattr(model, model.base_model_prefix, self.computed)
        self.model = model

    def remove(self) -> None:
        """Put the model's encoder back."""
        self._put_back()

    def read(self, hidden: Tensor, batch: Batch) -> Tensor:
        """(T, d), or (Q, d) where only that was asked for, -> features (Q, d)."""
        return self._read(hidden, batch)

    def forward(self, features: Tensor) -> Tensor:
        """(Q, d) -> (Q, C)."""
        if self._one_by_one:
            return torch.cat([self._outputs(row) for row in features.split(1)])
        return self._outputs(features)

    def _outputs(self, features: Tensor) -> Tensor:
        hidden = features[:, None]
        pooled = None if self.pooler is None else self.pooler(hidden)
        self.computed.now.output = BaseModelOutputWithPoolingAndCrossAttentions(hidden, pooled)
        ids = hidden.new_zeros(len(hidden), 1).long()
        return self.model(input_ids=ids).logits.flatten(0, -2)  # type: ignore[no-any-return]


def _pooler(base: Any) -> Callable[[Tensor], Tensor] | None:
    """What makes a pooled state of hidden states (R, 1, d), if anything does."""
    pooler = getattr(base, "pooler", None)
    if isinstance(pooler, nn.Linear):  # ALBERT's; others pick the first token themselves
        return lambda hidden: base.pooler_activation(pooler(hidden[:, 0]))
    return pooler


class _Now(threading.local):
    output: BaseModelOutputWithPoolingAndCrossAttentions


class _Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.now = _Now()

    def forward(self, *_args: Any, **_kwargs: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        return self.now.output


# -- outputs that are too many to be kept


ROWS_AT_ONCE = 256
"""Places at which all outputs are there at once."""


def _parts(
    features: Tensor, targets: Tensor, counts: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and targets, some places of one client at a time, whose numbers are `counts`."""
    sizes = [
        min(ROWS_AT_ONCE, count - begin)
        for count in counts
        for begin in range(0, count, ROWS_AT_ONCE)
    ]
    return zip(features.split(sizes), targets.split(sizes), strict=True)


def judge_in_parts(
    head: Callable[[Tensor], Tensor],
    features: Tensor,
    targets: Tensor,
    counts: Sequence[int],
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """Losses and answers, of which no more than (ROWS_AT_ONCE, C) outputs exist at once.

    Args:
        head: (Q, d) -> (Q, C).
        features: (Q, d).
        targets: (Q,).
        counts: How many places are each client's.
        objective: What is learned.

    Returns:
        (Q,) float32 losses, and (Q,) answers, both without a gradient.
    """
    losses, answers = [], []
    for rows, asked in _parts(features.detach(), targets, counts):
        outputs = head(rows).float()
        losses.append(objective.loss(outputs, asked))
        answers.append(objective.answer(outputs))
    return torch.cat(losses), torch.cat(answers)


def losses_in_parts(
    head: Callable[[Tensor], Tensor],
    features: Tensor,
    targets: Tensor,
    counts: Sequence[int],
) -> Tensor:
    """A language model's losses (Q,), with a gradient for the features; the head is frozen.

    Loss and gradient are worked out together, so that outputs needn't be kept. See
    `judge_in_parts` for the arguments.
    """
    return _Losses.apply(features, head, targets, counts)  # type: ignore[no-any-return, no-untyped-call]


def _next_token_loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(Q,) cross-entropies of outputs (Q, C), and the gradient of their sum (Q, C)."""
    log_p = outputs.log_softmax(dim=-1)
    places = targets[:, None]
    loss = -log_p.gather(1, places)[:, 0]
    return loss, log_p.exp_().scatter_add_(1, places, outputs.new_full(places.shape, -1.0))


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        head: Callable[[Tensor], Tensor],
        targets: Tensor,
        counts: Sequence[int],
    ) -> Tensor:
        losses: list[Tensor] = []
        grads: list[Tensor] = []
        for rows, asked in _parts(features, targets, counts):
            with torch.enable_grad():
                x = rows.detach().requires_grad_()
                outputs = head(x)
            loss, grad = _next_token_loss(outputs.detach().float(), asked)
            grads += torch.autograd.grad(outputs, x, grad.to(outputs.dtype))
            losses.append(loss)
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (of_features,) = ctx.saved_tensors
        return (of_features * grad[:, None]).to(of_features.dtype), None, None, None
