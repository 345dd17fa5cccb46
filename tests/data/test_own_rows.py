"""Held-out rows of a client's own: of its mixture, or of its key."""

from __future__ import annotations

import numpy as np
import pytest

from plait.config import Config
from plait.data.objectives import CLASSIFICATION, REGRESSION
from plait.data.own_rows import own_rows
from plait.data.partition import deal, largest_remainder
from plait.data.tasks import Rows, Task

KEYS = ("clinic", "bank", "school", "court")


def labelled(labels, keys: bool = False) -> Rows:
    labels = np.asarray(labels)
    owner = tuple(KEYS[i % len(KEYS)] for i in range(len(labels))) if keys else None
    return Rows(tuple((str(i),) for i in range(len(labels))), labels, owner)


def balanced(C: int, each: int, keys: bool = False) -> Rows:
    return labelled(np.tile(np.arange(C), each), keys)


def task_of(train: Rows, test: Rows, C: int) -> Task:
    names = tuple(map(str, range(C))) if C > 1 else ()
    objective = CLASSIFICATION if C > 1 else REGRESSION
    return Task("rows", train, labelled([0] * 9), test, names, "", objective)


def rows_of(train: Rows, test: Rows, C: int, shares, **settings: str) -> list[np.ndarray]:
    config = Config(clients=len(shares), **{"test_split": "client", **settings})
    return own_rows(task_of(train, test, C), shares, config)


def counts_of(rows: Rows, hands, C: int) -> np.ndarray:
    return np.stack([np.bincount(rows.labels[hand], minlength=C) for hand in hands])


def test_own_rows_are_as_many_as_have_the_mixture():
    train, test = balanced(3, 100), labelled([0] * 40 + [1] * 20 + [2] * 9)
    config = Config(clients=10, client_size=20)
    shares = deal(task_of(train, test, 3), config)
    found = rows_of(train, test, 3, shares)
    mixtures = counts_of(train, shares, 3) / 20
    for rows, mixture in zip(counts_of(test, found, 3), mixtures, strict=True):
        assert rows.tolist() == largest_remainder(int(rows.sum()), mixture).tolist()
        more = largest_remainder(int(rows.sum()) + 1, mixture)
        assert (more > [40, 20, 9]).any()
    assert all((np.diff(rows) > 0).all() for rows in found)
    again = rows_of(train, test, 3, shares, seed=7)
    assert [one.tolist() for one in again] == [one.tolist() for one in found]
    assert rows_of(train, test, 3, shares, test_split="common") == []
    assert all(rows.max() < 9 for rows in rows_of(train, test, 3, shares, eval_split="validation"))


def test_a_label_that_the_split_has_not_is_left_out_or_refused():
    train, test = labelled([0, 0, 1, 2, 2]), labelled([0, 1, 1])
    (rows,) = rows_of(train, test, 3, [np.array([0, 1, 2, 3])])
    assert test.labels[rows].tolist() == [0, 1]
    message = "No test row has the labels of client 1, .* or leave out --test-split client"
    with pytest.raises(ValueError, match=message):
        rows_of(train, test, 3, [np.array([0]), np.array([3, 4])])


def test_own_rows_of_a_key_and_of_a_regression():
    train, test = balanced(2, 8, keys=True), balanced(2, 4, keys=True)
    shares = deal(task_of(train, test, 2), Config(clients=4, label_skew="key"))
    found = rows_of(train, test, 2, shares, label_skew="key")
    assert [{test.keys[i] for i in rows} for rows in found] == [{key} for key in sorted(KEYS)]
    with pytest.raises(ValueError, match="No test row has the key of client 0"):
        rows_of(train, balanced(2, 4), 2, shares, label_skew="key")
    scores = labelled(np.linspace(0, 1, 8, dtype=np.float32))
    (rows,) = rows_of(scores, scores, 1, [np.arange(4)])
    assert rows.tolist() == list(range(8))
