"""Tokenised text without padding, and the batches cut from it.

Texts lie end to end in one flat array. A batch keeps them so: T real tokens, client after client,
and no padding, except where attention needs windows; there a window has texts of similar length.

Legend: T tokens of a batch, R its texts, n its clients, b texts of each (R = n b), L a length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Where tokens go in windows that have more room than there are tokens.

    Attributes:
        index: (slots,) int64, the token in each slot; 0 where there is none.
        inverse: (T,) int64, the slot of each token; 0 for filler.
    """

    index: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, slots: np.ndarray, size: int, filler: int) -> Places:
        """Tokens at `slots` (T - filler,) of `size`; the filler goes nowhere."""
        index = np.zeros(size, dtype=np.int64)
        index[slots] = np.arange(len(slots))
        inverse = np.concatenate([slots, np.zeros(filler, dtype=np.int64)])
        return cls(torch.from_numpy(index), torch.from_numpy(inverse))

    def to(self, device: torch.device) -> Places:
        """The same places on a device."""
        return Places(self.index.to(device), self.inverse.to(device))


@dataclass(frozen=True)
class Batch:
    """The texts of one step for n clients, packed.

    The last few of the T tokens are filler, under one in sixty: they belong to no text, and make
    T one of few numbers, since the machine prepares its products anew for each.

    Attributes:
        num_clients: n.
        num_tokens: T less the filler.
        source: (T,) int64, each token's place in the split's flat arrays.
        ids: (T,) int64.
        types: (T,) int64.
        positions: (T,) int64, each token's place in its own text.
        starts: (R,) int64, the place of each text's first token.
        lengths: (R,) int64.
        labels: (R,) int64 or float32.
        counts: Tokens of each client, which lie side by side.
        windows: Places of the tokens in windows that each hold a few whole texts: w_1 windows of
            S_1 slots, then w_2 larger ones of S_2, and so on.
        apart: (w_i, S_i, S_i) bool each, whether two slots of a window are of different texts.
        hidden: (T, d), the input of the first adapted layer, where it is known.
    """

    num_clients: int
    num_tokens: int
    source: Tensor
    ids: Tensor
    types: Tensor
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    labels: Tensor
    counts: list[int]
    windows: Places
    apart: tuple[Tensor, ...]
    hidden: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor | Places) else value
            for name, value in vars(self).items()
        }
        moved["apart"] = tuple(apart.to(device) for apart in self.apart)
        return Batch(**moved)

    def by_client(self, *arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """What each client has of some arrays: its tokens of (T, ...), its own part of (n, ...)."""
        counts = [*self.counts, len(self.ids) - self.num_tokens]  # the filler is nobody's
        rows = (a.split(counts)[:-1] if len(a) == len(self.ids) else a.unbind() for a in arrays)
        return zip(*rows, strict=True)


def pack(tokens: Tokens, rows: np.ndarray, slots: int = 16) -> Batch:
    """The batch of `rows` (n, b), indices into `tokens`: b texts for each of n clients.

    Windows for attention have a multiple of `slots` slots, a power of two.
    """
    flat = rows.ravel()
    lengths = tokens.lengths[flat]
    starts = np.cumsum(lengths) - lengths
    num_tokens = int(lengths.sum())
    filler = -num_tokens % _grain(num_tokens)
    positions = np.arange(num_tokens) - np.repeat(starts, lengths)
    source = positions + np.repeat(tokens.offsets[flat], lengths)
    positions, source = (np.pad(array, (0, filler)) for array in (positions, source))
    windows, apart = _windows(lengths.reshape(rows.shape), filler, slots)
    return Batch(
        num_clients=len(rows),
        num_tokens=num_tokens,
        source=torch.from_numpy(source),
        ids=torch.from_numpy(tokens.ids[source].astype(np.int64)),
        types=torch.from_numpy(tokens.types[source].astype(np.int64)),
        positions=torch.from_numpy(positions),
        starts=torch.from_numpy(starts),
        lengths=torch.from_numpy(lengths),
        labels=torch.from_numpy(tokens.labels[flat]),
        counts=lengths.reshape(rows.shape).sum(axis=1).tolist(),
        windows=windows,
        apart=apart,
        hidden=None if tokens.hidden is None else tokens.hidden[torch.from_numpy(source)],
    )


def _grain(num_tokens: int) -> int:
    """What T is a multiple of: a power of two, at most a 64th of it."""
    return 1 << max(0, (num_tokens // 64).bit_length() - 1)


def _windows(
    lengths: np.ndarray, filler: int, slots_step: int
) -> tuple[Places, tuple[Tensor, ...]]:
    """Whole texts side by side in windows of, say, 16, 32, 48, 64, 80, 96, 112, 128, 160 slots.

    Few slots are wasted, and the calls are far fewer than with a rectangle for each length. No
    window has texts of two clients: what a client computes, to the last bit, does not depend on
    who else is in the batch.
    """
    texts_each = lengths.shape[1]
    lengths = lengths.ravel()
    starts = np.cumsum(lengths) - lengths
    # At most four sizes up to each power of two.
    steps = np.maximum(slots_step, 2.0 ** (np.frexp(lengths - 1)[1] - 3)).astype(np.int64)
    sizes = -(-lengths // steps) * steps
    begins = np.empty(len(lengths), dtype=np.int64)
    shapes = []
    num_slots = 0
    for size in np.unique(sizes).tolist():
        begin = num_slots
        texts = np.flatnonzero(sizes == size)
        for mine in np.split(texts, np.flatnonzero(np.diff(texts // texts_each)) + 1):
            places, count = _side_by_side(lengths[mine], size)
            begins[mine] = num_slots + places
            num_slots += count * size
        shapes.append(((num_slots - begin) // size, size))
    slots = np.arange(lengths.sum()) + np.repeat(begins - starts, lengths)
    text_of_slot = np.full(num_slots, -1)
    text_of_slot[slots] = np.repeat(np.arange(len(lengths)), lengths)
    apart = []
    end = 0
    for count, size in shapes:
        begin, end = end, end + count * size
        windows = text_of_slot[begin:end].reshape(count, size)
        # Empty slots attend to each other, which keeps their unused softmax finite.
        apart.append(torch.from_numpy(windows[:, :, None] != windows[:, None, :]))
    return Places.of(slots, num_slots, filler), tuple(apart)


def _side_by_side(lengths: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Where each text begins in windows of `size` slots, end to end, and how many there are.

    A window takes the longest text that is left, and then the shortest ones while they fit.
    """
    begins = np.empty(len(lengths), dtype=np.int64)
    order = lengths.argsort(kind="stable").tolist()
    shortest, longest, window = 0, len(order) - 1, 0
    while shortest <= longest:
        text = order[longest]
        longest -= 1
        begins[text] = window * size
        used = int(lengths[text])
        while shortest <= longest and used + lengths[order[shortest]] <= size:
            begins[order[shortest]] = window * size + used
            used += int(lengths[order[shortest]])
            shortest += 1
        window += 1
    return begins, window
