"""Rows whose answer is one of several: which of them a language model holds for the likeliest.

The score of an option is the sum of its tokens' log-probabilities, its end token among them, not
divided by its length: `acc` of lm-evaluation-harness, but for the end token, without which `a`
could never lose to `ab`.

Legend: R rows, K options of a row, n models, Q places asked of all options.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.data.conversations import answer_of
from plait.data.tasks import Rows
from plait.data.tokens import Tokens


@dataclass(frozen=True)
class Choices:
    """The options of rows, each of them a text.

    Attributes:
        tokens: A text for each option, row after row; what is asked is the option.
        offsets: (R + 1,) row i's texts are those from the i-th to the next.
        right: (R,) which of a row's options is its answer.
    """

    tokens: Tokens
    offsets: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, rows: Rows, tokens_of: Callable[[Rows], Tokens]) -> Choices | None:
        """The options of a split, which `tokens_of` makes tokens of; None if rows have none."""
        read = [json.loads(text) for (text,) in rows.texts]
        if "options" not in read[0]:
            return None
        texts = tuple((json.dumps(one, ensure_ascii=False),) for row in read for one in _each(row))
        offsets = np.cumsum([0, *(len(row["options"]) for row in read)])
        right = np.array([row["options"].index(answer_of(row)) for row in read])
        return cls(tokens_of(Rows(texts, np.zeros(len(texts), np.int64))), offsets, right)

    @property
    def per_row(self) -> float:
        """K, on average."""
        return len(self.tokens) / len(self.right)

    def take(self, rows: np.ndarray) -> Choices:
        """Those of some rows, in the order given."""
        texts = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]
        offsets = np.cumsum([0, *map(len, texts)])
        return Choices(self.tokens.take(np.concatenate(texts)), offsets, self.right[rows])

    def chosen(self, losses: Tensor) -> np.ndarray:
        """(n, Q) losses of all tokens asked -> (n, R) each row's likeliest option."""
        text = np.repeat(np.arange(len(self.tokens)), np.diff(self.tokens.asked_offsets))
        sums = losses.new_zeros(len(losses), len(self.tokens), dtype=torch.float64)
        sums.index_add_(1, torch.from_numpy(text), losses.double())
        by_row = np.split(sums.numpy(), self.offsets[1:-1], axis=1)
        return np.stack([row.argmin(axis=1) for row in by_row], axis=1)


def _each(row: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """A row for each option, in the place of the answer."""
    if isinstance(row.get("completion"), str):
        return [{"prompt": row["prompt"], "completion": option} for option in row["options"]]
    *prompt, last = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    return [
        {"prompt": prompt, "completion": [last | {"content": option}]} for option in row["options"]
    ]
