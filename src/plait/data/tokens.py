"""Tokenised text without padding, and the batches cut from it.

Texts lie end to end in one flat array. A batch keeps them so: T real tokens, client after client,
and no padding.

Legend: T tokens of a batch, R its texts, n its clients, b texts of each (R = n b), Q places asked
(one in each text, or in language models as many as there are tokens to be learned), L a length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.machine.devices import moved


@dataclass(frozen=True)
class Tokens:
    """A tokenised split.

    Attributes:
        ids: (all tokens,) int32, text after text.
        types: (all tokens,) int32, 0 for the first text of a pair and 1 for the second.
        offsets: (texts + 1,) int64; text i is ids[offsets[i]:offsets[i + 1]].
        labels: (texts,) int64 classes or groups, or float32 scores.
        hidden: (all tokens, d), the input of the first adapted layer, where it was computed
            beforehand.
        asked: (all tokens,) bool, the tokens whose next one is to be learned, in language models;
            None where each text is asked once, for its label.
    """

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    hidden: Tensor | None = None
    asked: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(texts,) int64, tokens of each text."""
        return np.diff(self.offsets)

    @cached_property
    def targets(self) -> np.ndarray:
        """(all Q,) what the answers should be, text after text."""
        if self.asked is None:
            return self.labels
        following: np.ndarray = self.ids[1:][self.asked[:-1]].astype(np.int64)
        return following

    @cached_property
    def asked_offsets(self) -> np.ndarray:
        """(texts + 1,) int64; the targets of text i are those from the i-th to the next."""
        if self.asked is None:
            return np.arange(len(self) + 1)
        before: np.ndarray = np.concatenate([[0], np.cumsum(self.asked)])[self.offsets]
        return before

    def places(self, texts: np.ndarray) -> np.ndarray:
        """(Q,) int64, where the targets of some texts are among all."""
        return _ranges(self.asked_offsets[texts], np.diff(self.asked_offsets)[texts])

    def take(self, texts: np.ndarray) -> Tokens:
        """Some of the texts, in the order given."""
        lengths = self.lengths[texts]
        ends = np.cumsum(lengths)
        source = _ranges(self.offsets[texts], lengths)
        return Tokens(
            ids=self.ids[source],
            types=self.types[source],
            offsets=np.concatenate([[0], ends]),
            labels=self.labels[texts],
            hidden=None if self.hidden is None else self.hidden[torch.from_numpy(source)],
            asked=None if self.asked is None else self.asked[source],
        )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(sum of lengths,) int64, the numbers from each start on, range after range."""
    within = np.arange(lengths.sum())
    found: np.ndarray = within + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    return found


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
class Batch:
    """The texts of one step for n clients, packed.

    The last few of the T tokens may be padding, under one in sixty: they belong to no text, and
    make T one of few numbers, since oneDNN prepares its products anew for each.

    Attributes:
        num_clients: n.
        num_tokens: T less the padding.
        source: (T,) int64, each token's place in the split's flat arrays.
        ids: (T,) int64.
        types: (T,) int64.
        positions: (T,) int64, each token's place in its own text.
        starts: (R,) int64, the place of each text's first token.
        lengths: (R,) int64.
        asked: (Q,) int64, the tokens whose hidden states are read: the first of each text, or those
            whose next one is to be learned.
        targets: (Q,) int64 or float32, what the answer there should be.
        asked_counts: (n,) int64 on the host, how many of them are each client's.
        bounds: (n + 1,) int64, client i's tokens are those from bounds[i] to bounds[i + 1].
        sizes: (n, b) int64, the same as `lengths`, and on the host wherever the batch is.
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
    asked: Tensor
    targets: Tensor
    asked_counts: np.ndarray
    bounds: Tensor
    sizes: np.ndarray
    hidden: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        there: dict[str, Any] = {
            name: moved(value, device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**there)

    @property
    def counts(self) -> list[int]:
        """Tokens of each client."""
        return self.sizes.sum(axis=1).tolist()  # type: ignore[no-any-return]

    def by_client(self, *arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """What each client has of some arrays: its tokens of (T, ...), its own part of (n, ...)."""
        counts = [*self.counts, len(self.ids) - self.num_tokens]  # the padding is nobody's
        rows = (a.split(counts)[:-1] if len(a) == len(self.ids) else a.unbind() for a in arrays)
        return zip(*rows, strict=True)

    @cached_property
    def slots(self) -> Tensor:
        """(T,) each token's place in a rectangle with a row for each client; without padding."""
        counts = np.array(self.counts)
        begins = np.arange(len(counts)) * counts.max() - np.cumsum(counts) + counts
        places = np.arange(self.num_tokens) + np.repeat(begins, counts)
        return moved(torch.from_numpy(places), self.ids.device)

    def rectangle(self, x: Tensor) -> Tensor:
        """(T, w) -> (n, L, w), each client's tokens in a row, and zeros after them."""
        blank = x.new_zeros(self.num_clients * max(self.counts), x.shape[1])
        return blank.index_copy_(0, self.slots, x).view(self.num_clients, -1, x.shape[1])


def pack(tokens: Tokens, rows: np.ndarray, padded: bool = True) -> Batch:
    """The batch of `rows` (n, b), indices into `tokens`: b texts for each of n clients.

    Args:
        tokens: The split.
        rows: Which texts.
        padded: With padding at the end.
    """
    flat = rows.ravel()
    lengths = tokens.lengths[flat]
    starts = np.cumsum(lengths) - lengths
    num_tokens = int(lengths.sum())
    padding = -num_tokens % _grain(num_tokens) if padded else 0
    positions = np.arange(num_tokens) - np.repeat(starts, lengths)
    source = positions + np.repeat(tokens.offsets[flat], lengths)
    positions, source = (np.pad(array, (0, padding)) for array in (positions, source))
    sizes = lengths.reshape(rows.shape)
    places = tokens.places(flat)
    asked = starts if tokens.asked is None else np.flatnonzero(tokens.asked[source[:num_tokens]])
    return Batch(
        num_clients=len(rows),
        num_tokens=num_tokens,
        source=torch.from_numpy(source),
        ids=torch.from_numpy(tokens.ids[source].astype(np.int64)),
        types=torch.from_numpy(tokens.types[source].astype(np.int64)),
        positions=torch.from_numpy(positions),
        starts=torch.from_numpy(starts),
        asked=torch.from_numpy(asked),
        lengths=torch.from_numpy(lengths),
        targets=torch.from_numpy(tokens.targets[places]),
        asked_counts=np.diff(tokens.asked_offsets)[rows].sum(axis=1),
        bounds=torch.from_numpy(np.cumsum([0, *sizes.sum(axis=1)])),
        sizes=sizes,
        hidden=None if tokens.hidden is None else tokens.hidden[torch.from_numpy(source)],
    )


def _grain(num_tokens: int) -> int:
    """What T is a multiple of: a power of two, at most a 64th of it."""
    return 1 << max(0, (num_tokens // 64).bit_length() - 1)
