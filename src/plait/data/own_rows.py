"""Held-out rows of a client's own, on which it is judged beside those that all are judged on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from plait.config import Config
from plait.data.objectives import LANGUAGE
from plait.data.partition import Ints, largest_remainder, largest_size, skew_of
from plait.data.tasks import SPLIT_SEED, Rows, Task
from plait.rng import stream


def own_rows(task: Task, shares: Sequence[Ints], config: Config) -> list[Ints]:
    """Each client's own rows of the evaluated split, ascending; two clients may have the same.

    They are those of its key where keys are the clients, else as many as have its training rows'
    mixture of the labels that the split has.

    Args:
        task: The task.
        shares: Client -> its training rows.
        config: Nothing is returned unless its `test_split` asks for it.

    Raises:
        ValueError: A client would have none.
    """
    if config.test_split == "common":
        return []
    if task.objective is LANGUAGE:
        raise ValueError("--test-split client is for classes and scores, not for language models.")
    held_out = task.held_out(config.eval_split)
    keyed = skew_of(task, config) == "key" and task.train.keys is not None
    choose = _of_its_key if keyed else _in_its_mixture
    found = [choose(task, held_out, share) for share in shares]
    for client, rows in enumerate(found):
        if len(rows) == 0:
            what = "key" if keyed else "labels"
            raise ValueError(
                f"No {config.eval_split} row has the {what} of client {client}, so it can't be "
                "judged on rows of its own: give some, or leave out --test-split client."
            )
    return found


def _of_its_key(task: Task, held_out: Rows, share: Ints) -> Ints:
    keys = np.array(task.train.keys)[share]
    return np.flatnonzero(np.isin(np.array(held_out.keys or ()), keys))


def _in_its_mixture(task: Task, held_out: Rows, share: Ints) -> Ints:
    C = task.num_outputs
    mine, theirs = (
        rows.labels if task.objective.has_classes else np.zeros(len(rows), dtype=np.int64)
        for rows in (task.train, held_out)
    )
    there = np.bincount(theirs, minlength=C).astype(np.int64)
    weights = np.bincount(mine[share], minlength=C).astype(np.float64)
    weights[there == 0] = 0
    if not weights.any():
        return np.zeros(0, dtype=np.int64)
    mixture = weights / weights.sum()
    counts = largest_remainder(largest_size(there, mixture[None]), mixture)
    chosen = [
        stream(SPLIT_SEED, "own rows", label).permutation(np.flatnonzero(theirs == label))[:count]
        for label, count in enumerate(counts)
    ]
    return np.sort(np.concatenate(chosen))
