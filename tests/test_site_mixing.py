"""Rules for A and B of a layer together: what must hold exactly, whoever mixes how many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.config import Config
from plait.factors import A, B
from plait.mixing import average, neighbour_weights
from plait.site_mixing import (
    factorized,
    mean_product,
    nearest_rotation,
    norm_average,
    rotated,
    rotated_average,
    slice_average,
)
from plait.topology import build_schedule

RULES = {
    "decaf": mean_product,
    "hetlora": norm_average,
    "raflora": slice_average,
    "fedrot by A": rotated_average(A, 1),
    "fedrot by B": rotated_average(B, 0.5),
}


def factors(clients=5, rank=3, d_in=7, d_out=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(clients, rank, d_in, generator=generator),
        torch.randn(clients, d_out, rank, generator=generator),
    )


def weights(topology="ring", clients=5):
    return neighbour_weights(build_schedule(Config(topology=topology, clients=clients))(0))


def product(site):
    return site[1].double() @ site[0].double()


@pytest.mark.parametrize("rule", RULES)
def test_one_alone_gets_the_same_bits_as_in_a_stack(rule):
    X, W = factors(), weights()
    together = RULES[rule](X, X, W)
    for i, row in enumerate(W):
        heard = np.flatnonzero(row)
        mine, theirs = (tuple(one[which].clone() for one in X) for which in ([i], heard))
        alone = RULES[rule](mine, theirs, W[i : i + 1, heard])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))


def test_cores_do_not_change_a_bit(threads):
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(1024, 40, generator=generator, dtype=torch.float64)
    found = []
    for count in (1, 2):
        threads(count)
        found.append(factorized(tall.mT, tall, 8))
        assert torch.get_num_threads() == count
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("rule", RULES)
def test_who_hears_nobody_keeps_its_state_and_so_do_those_who_are_heard(rule):
    X, W = factors(), weights()
    before = [one.clone() for one in X]
    W[0] = 0
    mixed = RULES[rule](X, X, W)
    for one, old, new in zip(X, before, mixed, strict=True):
        assert torch.equal(one, old)
        assert torch.equal(new[0], old[0])
        assert not torch.equal(new[1], old[1])


def padded(site, rank):
    """The same product with columns of zeros."""
    wide, tall = site[0], site[1]
    more = rank - wide.shape[1]
    return (
        torch.nn.functional.pad(wide, (0, 0, 0, more)),
        torch.nn.functional.pad(tall, (0, more)),
    )


def test_with_rank_enough_the_mean_of_products_is_exact():
    X, W = padded(factors(rank=2), 6), weights()
    full = torch.from_numpy(W + np.diag(1 - W.sum(axis=1)))
    expected = torch.einsum("ij,jab->iab", full, product(X))
    torch.testing.assert_close(product(mean_product(X, X, W)), expected, rtol=0, atol=1e-5)


def test_the_truncation_is_the_best_of_its_rank_and_balanced():
    X, W = factors(), weights()
    full = torch.from_numpy(W + np.diag(1 - W.sum(axis=1)))
    target = torch.einsum("ij,jab->iab", full, product(X))
    mixed = mean_product(X, X, W)
    error = (product(mixed) - target).flatten(1).norm(dim=1)
    lost = torch.linalg.svdvals(target)[:, 3:].norm(dim=1)
    torch.testing.assert_close(error, lost, rtol=1e-5, atol=0)
    grams = mixed[0] @ mixed[0].mT, mixed[1].mT @ mixed[1]
    torch.testing.assert_close(*grams, rtol=0, atol=1e-5)


def test_more_rank_than_the_layer_is_wide_leaves_zeros():
    X, W = factors(rank=9, d_in=4, d_out=5), weights()
    mixed = mean_product(X, X, W)
    assert [one.shape for one in mixed] == [one.shape for one in X]
    assert not mixed[0][:, 4:].any()


@pytest.mark.parametrize("by", [A, B])
@pytest.mark.parametrize("strength", [0, 0.5, 1])
def test_a_rotation_leaves_the_product_of_a_neighbour_and_brings_it_no_further(by, strength):
    X = factors()
    own, other = ((X[0][k].double(), X[1][k].double()) for k in (0, 1))
    turned = rotated(own, other, by, strength)
    torch.testing.assert_close(product(turned), product(other), rtol=0, atol=1e-12)
    place = 0 if by is A else 1
    far = [float((one[place] - own[place]).norm()) for one in (other, turned)]
    assert far[1] < far[0] - 0.01 if strength else far[1] == pytest.approx(far[0])


def test_a_neighbour_that_is_oneself_rotated_changes_nothing():
    X = factors(clients=1)
    R = nearest_rotation(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    assert float(torch.linalg.det(R)) == pytest.approx(1)
    theirs = R.mT @ X[0], X[1] @ R
    for by in (A, B):
        mixed = rotated_average(by, 1)(X, theirs, np.array([[0.5]]))
        for one, old in zip(mixed, X, strict=True):
            torch.testing.assert_close(one, old, rtol=0, atol=1e-5)


def test_not_rotated_at_all_it_is_averaging():
    X, W = factors(), weights()
    mixed = rotated_average(A, 0)(X, X, W)
    for one, own in zip(mixed, X, strict=True):
        torch.testing.assert_close(one, average(own, own, W), rtol=0, atol=1e-6)
