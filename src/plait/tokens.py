"""Tokenised text without padding, and the batches cut from it.

Texts lie end to end in one flat array. A batch keeps them so: T real tokens, client after client,
and no padding, except where attention needs rectangles; there texts are grouped by length.

Legend: T tokens of a batch, R its texts, n its clients, b texts of each (R = n b), L a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """A tokenised split.

    Attributes:
        ids: (all tokens,) int32, text after text.
        types: (all tokens,) int32, 0 for the first text of a pair and 1 for the second.
        offsets: (texts + 1,) int64; text i is ids[offsets[i]:offsets[i + 1]].
        labels: (texts,) int64 classes, or float32 scores.
        hidden: (all tokens, d), the input of the first adapted layer, where it was computed
            beforehand.
    """

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    hidden: Tensor | None = None

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(texts,) int64, tokens of each text."""
        return np.diff(self.offsets)

    def take(self, texts: np.ndarray) -> Tokens:
        """Some of the texts, in the order given."""
        lengths = self.lengths[texts]
        ends = np.cumsum(lengths)
        source = np.arange(lengths.sum()) + np.repeat(self.offsets[texts] - ends + lengths, lengths)
        return Tokens(
            ids=self.ids[source],
            types=self.types[source],
            offsets=np.concatenate([[0], ends]),
            labels=self.labels[texts],
            hidden=None if self.hidden is None else self.hidden[torch.from_numpy(source)],
        )


def tokenize(
    texts: Sequence[tuple[str, ...]], labels: np.ndarray, tokenizer: Any, max_length: int
) -> Tokens:
    """Tokenise texts or pairs of texts, special tokens included, cut to `max_length` tokens."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(
        *columns, truncation=True, max_length=max_length, return_attention_mask=False
    )
    ids = encoded["input_ids"]
    types = encoded.get("token_type_ids") or [[0] * len(text) for text in ids]
    return Tokens(
        ids=np.concatenate([np.asarray(text, dtype=np.int32) for text in ids]),
        types=np.concatenate([np.asarray(text, dtype=np.int32) for text in types]),
        offsets=np.concatenate([[0], np.cumsum([len(text) for text in ids])]).astype(np.int64),
        labels=labels,
    )


@dataclass(frozen=True)
class Places:
    """Where rows go: `out[k] = x[index[k]]`, and back by `inverse`; past the end is a zero row."""

    index: Tensor
    inverse: Tensor

    def to(self, device: torch.device) -> Places:
        """The same places on a device."""
        return Places(self.index.to(device), self.inverse.to(device))


@dataclass(frozen=True)
class Batch:
    """The texts of one step for n clients, packed.

    Attributes:
        num_clients: n.
        source: (T,) int64, each token's place in the split's flat arrays.
        ids: (T,) int64.
        types: (T,) int64.
        positions: (T,) int64, each token's place in its own text.
        starts: (R,) int64, the place of each text's first token.
        lengths: (R,) int64.
        labels: (R,) int64 or float32.
        by_client: Places of the tokens in an (n, t) rectangle, t the most tokens of a client.
        by_text: Places of the tokens in the rectangles of `groups`, one after another.
        hidden: (T, d), the input of the first adapted layer, where it is known.
        groups: For each group of texts of similar length: the texts (R_g,), and which places of
            its (R_g, L_g) rectangle hold a token.
    """

    num_clients: int
    source: Tensor
    ids: Tensor
    types: Tensor
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    labels: Tensor
    by_client: Places
    by_text: Places
    hidden: Tensor | None
    groups: tuple[tuple[Tensor, Tensor], ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | Places)
        }
        moved.setdefault("hidden", None)
        groups = tuple((texts.to(device), mask.to(device)) for texts, mask in self.groups)
        return Batch(num_clients=self.num_clients, groups=groups, **moved)


def pack(tokens: Tokens, rows: np.ndarray) -> Batch:
    """The batch of `rows` (n, b), indices into `tokens`: b texts for each of n clients."""
    num_clients, _ = rows.shape
    flat = rows.ravel()
    lengths = tokens.lengths[flat]
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    source = positions + np.repeat(tokens.offsets[flat], lengths)
    per_client = lengths.reshape(rows.shape).sum(axis=1)
    by_client = _places([(_rectangle(np.cumsum(per_client) - per_client, per_client))], len(source))
    texts_by_group = _similar_lengths(lengths)
    rectangles = [_rectangle(starts[texts], lengths[texts]) for texts in texts_by_group]
    return Batch(
        num_clients=num_clients,
        source=torch.from_numpy(source),
        ids=torch.from_numpy(tokens.ids[source].astype(np.int64)),
        types=torch.from_numpy(tokens.types[source].astype(np.int64)),
        positions=torch.from_numpy(positions),
        starts=torch.from_numpy(starts),
        lengths=torch.from_numpy(lengths),
        labels=torch.from_numpy(tokens.labels[flat]),
        by_client=by_client,
        by_text=_places(rectangles, len(source)),
        hidden=None if tokens.hidden is None else tokens.hidden[torch.from_numpy(source)],
        groups=tuple(
            (torch.from_numpy(texts), torch.from_numpy(rectangle >= 0))
            for texts, rectangle in zip(texts_by_group, rectangles, strict=True)
        ),
    )


def _rectangle(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(k, longest): row i counts up from starts[i] for lengths[i] places, then holds -1."""
    columns = np.arange(lengths.max())
    return np.where(columns < lengths[:, None], starts[:, None] + columns, -1)


def _places(rectangles: list[np.ndarray], num_tokens: int) -> Places:
    slots = np.concatenate([rectangle.ravel() for rectangle in rectangles])
    inverse = np.empty(num_tokens, dtype=np.int64)
    filled = np.flatnonzero(slots >= 0)
    inverse[slots[filled]] = filled
    index = np.where(slots >= 0, slots, num_tokens)
    return Places(torch.from_numpy(index), torch.from_numpy(inverse))


def _similar_lengths(lengths: np.ndarray, waste: float = 0.1, least: int = 16) -> list[np.ndarray]:
    """Texts in groups, by length: a group closes when padding would exceed a share `waste` of it.

    Groups have at least `least` texts, since a rectangle of few texts costs more in calls than
    it saves in padding.
    """
    order = np.argsort(-lengths, kind="stable")
    groups: list[list[int]] = []
    room = used = 0
    for text in order:
        size = int(lengths[text])
        longest = int(lengths[groups[-1][0]]) if groups else 0
        if not groups or (
            len(groups[-1]) >= least and used + size < (1 - waste) * (room + longest)
        ):
            groups.append([])
            room, used, longest = 0, 0, size
        groups[-1].append(int(text))
        room, used = room + longest, used + size
    return [np.array(group) for group in groups]
