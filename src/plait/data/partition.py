"""Who holds which rows: the training split dealt to clients, skewed by label as asked.

A partition is a function from labels to one index list for each client. Lists are disjoint, sorted
and never empty, and the same config always deals the same rows. What cannot be dealt as asked is
refused with the label or the client that fails, never quietly dealt some other way.

Legend: n rows, N clients, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plait.config import Config
from plait.data.objectives import LANGUAGE
from plait.data.tasks import Rows, Task
from plait.lookup import lookup
from plait.machine.text_files import read_text
from plait.rng import stream

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Hands = list[Ints]

_TRIES = 1000
_LEAST = 10  # Flower's min_partition_size


@dataclass(frozen=True)
class Deal:
    """What a partition is given; `argument` is what follows the colon in its name."""

    task: Task
    config: Config
    argument: str

    @property
    def rows(self) -> Rows:
        """The training split."""
        return self.task.train

    @property
    def num_labels(self) -> int:
        """C."""
        return len(self.task.label_names)

    @property
    def available(self) -> Ints:
        """Rows of each label, shape (C,)."""
        return np.bincount(self.rows.labels, minlength=self.num_labels).astype(np.int64)


def deal(task: Task, config: Config) -> list[Ints]:
    """Deal a task's training rows to `config.clients` clients as `config.label_skew` says.

    Args:
        task: Its training split is dealt.
        config: Its `label_skew`, `clients`, `client_size`, `batch_size` and `seed`.

    Returns:
        One sorted int64 array of row numbers for each client; no row is in two of them.

    Raises:
        ValueError: An unknown partition, one that needs classes for a regression, or more rows
            than there are; the message says of which label or for which client.

    Example:
        >>> rows = Rows((("a",), ("b",), ("c",), ("d",)), np.array([0, 0, 1, 1]))
        >>> task = Task("letters", rows, rows, rows, ("x", "y"), "accuracy")
        >>> [len(hand) for hand in deal(task, Config(clients=2, label_skew="iid"))]
        [2, 2]
    """
    skew = skew_of(task, config)
    row, argument = _find(skew)
    if row.needs_classes and not task.label_names:
        can = [name for name, other in PARTITIONS.items() if not other.needs_classes]
        why, more = f"is a {task.objective.name}", ""
        if task.objective is LANGUAGE:
            why, more = "has none", ", or name a column of groups with --label-column"
        raise ValueError(
            f"Label skew {skew!r} needs classes or groups, and this task {why}: use "
            f"{' or '.join(can)}{more}."
        )
    hands = [np.sort(hand) for hand in row.split(Deal(task, config, argument))]
    for client, hand in enumerate(hands):
        if len(hand) == 0:
            raise ValueError(
                f"Client {client} of {config.clients} would get no rows out of {len(task.train)}: "
                "use fewer clients, or a milder label_skew."
            )
    dealt = np.concatenate(hands)
    assert len(hands) == config.clients
    assert len(np.unique(dealt)) == len(dealt)
    return hands


def skew_of(task: Task, config: Config) -> str:
    """How rows are dealt: as `label_skew` says, or what suits the task if it isn't given."""
    if config.label_skew is not None:
        return config.label_skew
    if task.label_names:
        return "paper"
    return "iid" if config.key_column is None else "key"


def _find(skew: str) -> tuple[PartitionRow, str]:
    """The partition that `name`, `name:argument` or `file.json` means, and its argument."""
    if skew.endswith(".json"):
        return _FROM_FILE, skew
    name, _, argument = skew.partition(":")
    row = lookup(PARTITIONS, name, "label skew")
    if bool(argument) != bool(row.example):
        raise ValueError(f"Label skew {skew!r}: write `{name}{row.example and f':{row.example}'}`.")
    return row, argument


# -- label mixtures: every client gets equally many rows, in given shares of the labels


def largest_remainder(size: int, shares: Floats) -> Ints:
    """Whole numbers that sum to `size` in each row and are nearest to `size * shares`.

    Args:
        size: What each row sums to.
        shares: Shape (..., C), each row with sum 1.

    Returns:
        int64, the shape of `shares`; of equal remainders the first ones are rounded up.

    Example:
        >>> largest_remainder(10, np.array([0.35, 0.35, 0.3])).tolist()
        [4, 3, 3]
    """
    # 0.3 * 10 is 3.0000000000000004 or 2.9999999999999996: neither is a remainder.
    exact = np.round(size * shares, 9)
    counts = np.floor(exact).astype(np.int64)
    left = size - counts.sum(-1, keepdims=True)
    rank = np.argsort(np.argsort(counts - exact, axis=-1, kind="stable"), axis=-1)
    return np.asarray(counts + (rank < left), dtype=np.int64)


def paper_mixtures(num_clients: int, prior: Floats) -> Floats:
    """The label mixtures of the ADF-LoRA paper, carried over to any N and C.

    Two classes: 3 clients in 10 have shares (.9, .1), 3 have (.1, .9) and 4 have (.5, .5). Three:
    4 have (.9, .05, .05), 3 (.05, .9, .05) and 3 (.05, .05, .9). For more classes, which the paper
    does not have, a client has .9 of one class and equal shares of the others, and classes are
    given clients in proportion to `prior`: a rare class dominates no client rather than limit all.

    Args:
        num_clients: N.
        prior: Share of each class in the data, shape (C,).

    Returns:
        Shape (N, C); rows sum to 1.
    """
    C = len(prior)
    kinds = np.full((C, C), 0.1 / (C - 1))
    np.fill_diagonal(kinds, 0.9)
    parts = {2: [0.3, 0.3, 0.4], 3: [0.4, 0.3, 0.3]}.get(C, prior.tolist())
    if C == 2:
        kinds = np.vstack([kinds, [0.5, 0.5]])
    return np.repeat(kinds, largest_remainder(num_clients, np.array(parts)), axis=0)


def _paper(d: Deal) -> Hands:
    return _from_mixtures(d, paper_mixtures(d.config.clients, d.available / len(d.rows)))


def _mixture_file(d: Deal) -> Hands:
    """The mixtures in a JSON file: N lists of C weights, each list scaled to sum 1."""
    path, shape = Path(d.argument), (d.config.clients, d.num_labels)
    try:
        weights = np.array(json.loads(read_text(path)), dtype=np.float64)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"Could not read {path} ({error}). It should hold a list for each of {shape[0]} "
            f"clients, each with a weight for each of {shape[1]} labels."
        ) from error
    if weights.shape != shape:
        raise ValueError(
            f"{path} holds weights of shape {weights.shape}; clients and labels make {shape}."
        )
    bad = ~(np.isfinite(weights).all(1) & (weights >= 0).all(1) & (weights.sum(1) > 0))
    if bad.any():
        raise ValueError(
            f"{path}: the weights of client {bad.argmax()} are {weights[bad.argmax()].tolist()}; "
            "they must be 0 or more, and not all 0."
        )
    return _from_mixtures(d, weights / weights.sum(1, keepdims=True))


def _from_mixtures(d: Deal, mixtures: Floats) -> Hands:
    size = d.config.client_size or largest_size(d.available, mixtures)
    counts = largest_remainder(size, mixtures)
    short = _shortage(counts, d.available)
    if short:
        raise ValueError(f"{short} Use a smaller client_size than {size}, or leave it out.")
    return _take(d, counts)


def _shortage(counts: Ints, available: Ints) -> str:
    """Which label runs out if clients take `counts` (N, C), in a sentence; empty if none does."""
    needed = counts.sum(0)
    label = int((needed - available).argmax())
    if needed[label] <= available[label]:
        return ""
    return (
        f"Label {label} runs out: {len(counts)} clients need {needed[label]} rows of it and there "
        f"are {available[label]}."
    )


def largest_size(available: Ints, mixtures: Floats) -> int:
    """The largest size of every client for which no label runs out; 0 if there is none."""
    wanted = mixtures.sum(0)
    # Rounding adds less than one row for each client that holds the label, which bounds the size.
    bound = (available + (mixtures > 0).sum(0))[wanted > 0] / wanted[wanted > 0]
    sizes = range(min(int(bound.min()), int(available.sum()) // len(mixtures)), 0, -1)
    return next((s for s in sizes if not _shortage(largest_remainder(s, mixtures), available)), 0)


def _take(d: Deal, counts: Ints) -> Hands:
    """Rows with exactly the label counts (N, C), drawn without replacement."""
    hands: list[list[Ints]] = [[] for _ in counts]
    for label, taken in enumerate(counts.T):
        pieces = np.split(_shuffled(d, label), np.cumsum(taken))
        for hand, piece in zip(hands, pieces, strict=False):  # the last piece is left over
            hand.append(piece)
    return [np.concatenate(hand) for hand in hands]


def _shuffled(d: Deal, label: int) -> Ints:
    """The rows of a label in random order."""
    rows = np.flatnonzero(d.rows.labels == label)
    return np.asarray(stream(d.config.seed, "partition", label).permutation(rows), dtype=np.int64)


# -- Dirichlet


def _dirichlet(d: Deal) -> Hands:
    try:
        alpha = float(d.argument)
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < np.inf:
        raise ValueError(f"dirichlet:{d.argument}: alpha must be a number above 0.")
    return (
        _dirichlet_whole(d, alpha) if d.config.client_size is None else _dirichlet_equal(d, alpha)
    )


def _generators(d: Deal) -> Iterator[np.random.Generator]:
    return (stream(d.config.seed, "dirichlet", attempt) for attempt in range(_TRIES))


def _dirichlet_whole(d: Deal, alpha: float) -> Hands:
    """Each class is split over the clients by Dir(alpha): all rows are dealt, sizes differ.

    Yurochkin et al. 2019 (arXiv:1905.12022), with the balancing of Li et al. 2022
    (arXiv:2102.02079): a client that has its fair share gets nothing of the classes after. It is
    what Flower's DirichletPartitioner does, which also draws again until no client is tiny.
    """
    N, n = d.config.clients, len(d.rows)
    # Ten rows, or a batch if that is less; half of the average where clients are many.
    least = max(1, min(_LEAST, d.config.batch_size, n // (2 * N)))
    for rng in _generators(d):
        counts = np.zeros((N, d.num_labels), dtype=np.int64)
        for label, rows in enumerate(d.available):
            shares = rng.dirichlet(np.full(N, alpha)) * (counts.sum(1) < n / N)
            if shares.sum() > 0:
                counts[:, label] = largest_remainder(int(rows), shares / shares.sum())
        if counts.sum() == n and counts.sum(1).min() >= least:
            return _take(d, counts)
    raise ValueError(
        f"In {_TRIES} draws of dirichlet:{d.argument} some client of {N} always had fewer than "
        f"{least} of the {n} rows: use fewer clients, a larger alpha, or equal sizes with "
        f"--client-size {max(1, n // (2 * N))}."
    )


def _dirichlet_equal(d: Deal, alpha: float) -> Hands:
    """Each client's mixture is Dir(alpha * prior), all sizes equal (Hsu et al., arXiv:1909.06335).

    Hsu et al. carry on with the other labels when one has run out, which leaves the last clients
    with mixtures nobody drew. Here all mixtures are drawn again until no label runs out.
    """
    assert d.config.client_size is not None
    prior = d.available / len(d.rows)
    short = ""
    for rng in _generators(d):
        mixtures = np.zeros((d.config.clients, d.num_labels))
        mixtures[:, prior > 0] = rng.dirichlet(alpha * prior[prior > 0], size=d.config.clients)
        counts = largest_remainder(d.config.client_size, mixtures)
        short = _shortage(counts, d.available)
        if not short:
            return _take(d, counts)
    raise ValueError(
        f"In {_TRIES} draws of dirichlet:{d.argument} a label always ran out. In the last: {short} "
        f"Use a smaller client_size than {d.config.client_size}, a larger alpha, or leave "
        "client_size out."
    )


# -- partitions that don't look at labels


def _iid(d: Deal) -> Hands:
    """A random deal of all rows, sizes equal but for one; or of `client_size` rows each."""
    N, n = d.config.clients, len(d.rows)
    order = stream(d.config.seed, "partition").permutation(n)
    size = d.config.client_size
    if size is None:
        return np.array_split(order, N)
    if N * size > n:
        raise ValueError(
            f"{N} clients with client_size {size} need {N * size} rows and there are {n}: use at "
            f"most {n // N}, or leave client_size out."
        )
    return np.split(order[: N * size], N)


def _shards(d: Deal) -> Hands:
    """Rows sorted by label in N k shards of one size, k of them for each client, drawn at random.

    McMahan et al. 2017 (arXiv:1602.05629): a client has about k labels, since a shard in which one
    label ends and the next begins has both.
    """
    N, k = d.config.clients, _whole_number(d)
    hands = _iid(d)
    rows = np.concatenate(hands)
    rows = rows[np.argsort(d.rows.labels[rows], kind="stable")]
    owners = stream(d.config.seed, "shards").permutation(np.repeat(np.arange(N), k))
    sizes = [iter(np.array_split(hand, k)) for hand in hands]
    shards = np.split(rows, np.cumsum([len(next(sizes[owner])) for owner in owners])[:-1])
    of_clients: list[list[Ints]] = [[] for _ in hands]
    for owner, shard in zip(owners, shards, strict=True):
        of_clients[owner].append(shard)
    return [np.concatenate(parts) for parts in of_clients]


def _whole_number(d: Deal) -> int:
    if not d.argument.isdecimal() or int(d.argument) < 1:
        raise ValueError(f"{d.config.label_skew}: the shards of a client must be a number above 0.")
    return int(d.argument)


def _sizes(d: Deal) -> Hands:
    """Rows dealt at random, to each client as many as are named for it."""
    parts = d.argument.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{d.config.label_skew}: write numbers of rows, such as sizes:100,200,50.")
    sizes, n = [int(part) for part in parts], len(d.rows)
    if len(sizes) != d.config.clients:
        raise ValueError(
            f"{d.config.label_skew} has the sizes of {len(sizes)} clients and there are "
            f"{d.config.clients}: pass --clients {len(sizes)}."
        )
    if d.config.client_size is not None:
        raise ValueError(
            f"{d.config.label_skew} says how many rows each client has: leave out client_size "
            f"{d.config.client_size}."
        )
    if sum(sizes) > n:
        raise ValueError(f"{d.config.label_skew} needs {sum(sizes)} rows and there are {n}.")
    order = stream(d.config.seed, "partition").permutation(n)
    return np.split(order, np.cumsum(sizes))[:-1]


def _key(d: Deal) -> Hands:
    """The natural clients, in the order of their names; `client_size` takes so many of each."""
    if d.rows.keys is None:
        raise ValueError(
            "Label skew 'key' needs rows with keys: pass --key-column with --task file, or take "
            "--task sentiment."
        )
    names, owner = np.unique(np.array(d.rows.keys), return_inverse=True)
    if len(names) != d.config.clients:
        some = ", ".join(names[:5].tolist()) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"There are {d.config.clients} clients and {len(names)} keys ({some}): pass "
            f"--clients {len(names)}."
        )
    return [_some(d, client, np.flatnonzero(owner == client)) for client in range(len(names))]


def _some(d: Deal, client: int, rows: Ints) -> Ints:
    size = d.config.client_size or len(rows)
    if size > len(rows):
        raise ValueError(
            f"Client {client} has {len(rows)} rows with its key, and client_size is {size}: use "
            "a smaller one, or leave it out."
        )
    order = stream(d.config.seed, "partition", client).permutation(rows)
    return np.asarray(order[:size], dtype=np.int64)


@dataclass(frozen=True)
class PartitionRow:
    """A line of `PARTITIONS`: how to split, what it is, and what it wants."""

    split: Callable[[Deal], Hands]
    summary: str
    needs_classes: bool = True
    example: str = ""
    """An argument to show; none if the partition takes none."""


PARTITIONS: dict[str, PartitionRow] = {
    "paper": PartitionRow(_paper, "ADF-LoRA's label mixtures: .9 of one label for most clients"),
    "iid": PartitionRow(_iid, "Rows dealt at random", needs_classes=False),
    "dirichlet": PartitionRow(_dirichlet, "Labels split by Dir(alpha)", example="0.5"),
    "shards": PartitionRow(
        _shards, "So many shards each of the rows sorted by label", needs_classes=False, example="2"
    ),
    "sizes": PartitionRow(
        _sizes, "Rows dealt at random, so many to each", needs_classes=False, example="40,20,10,10"
    ),
    "key": PartitionRow(_key, "A client for each value of the key", needs_classes=False),
}

_FROM_FILE = PartitionRow(_mixture_file, "A JSON file with a label mixture for each client")
