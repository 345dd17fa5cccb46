"""Classifier heads: from an encoder's last hidden state to logits.

Legend: T tokens of a batch, R its texts, d the model's width, L a padded length, C labels.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

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
        text = torch.repeat_interleave(batch.lengths, output_size=batch.num_tokens)
        total = hidden.new_zeros(len(batch.lengths), hidden.shape[1])
        total = total.index_add(0, text, hidden[: batch.num_tokens])
        return scale_to_width(total)

    def forward(self, features: Tensor) -> Tensor:
        """(R, d) -> (R, C)."""
        return self.classifier(features)  # type: ignore[no-any-return]


class OwnHead(nn.Module):
    """First tokens (R, d) -> logits (R, C) by the model's own code after its encoder.

    The model's `forward` runs with its encoder replaced by one that returns what we computed,
    so pooler, activation and head are the architecture's own, whatever they are.
    """

    asked_only = True

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pooler = getattr(model.base_model, "pooler", None)
        self.computed = _Computed()
        base = model.base_model
        self._put_back = partial(setattr, model, model.base_model_prefix, base)
        setattr(model, model.base_model_prefix, self.computed)
        self.model = model

    def remove(self) -> None:
        """Put the model's encoder back."""
        self._put_back()

    @staticmethod
    def read(hidden: Tensor, _batch: Batch) -> Tensor:
        """(Q, d), what was asked for, are the features."""
        return hidden

    def forward(self, features: Tensor) -> Tensor:
        """(R, d) -> (R, C)."""
        hidden = features[:, None]
        pooled = None if self.pooler is None else self.pooler(hidden)
        self.computed.output = BaseModelOutputWithPooling(hidden, pooled)
        return self.model(input_ids=hidden.new_zeros(len(hidden), 1).long()).logits  # type: ignore[no-any-return]


class _Computed(nn.Module):
    output: BaseModelOutputWithPooling

    def forward(self, *_args: Any, **_kwargs: Any) -> BaseModelOutputWithPooling:
        return self.output
