"""Windows hold whole texts, of one client each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.model.attention_windows import lay_out

LENGTHS = st.lists(st.integers(1, 90), min_size=6, max_size=60)


def windows_of(places, apart, values):
    """Each window as the values (T,) in its slots, size after size; 0 where there is none."""
    slots = torch.zeros(len(places.index), dtype=torch.long)
    slots[places.inverse[: len(values)]] = values
    counts = [one.shape[0] * one.shape[1] for one in apart]
    return [part.view(one.shape[:2]) for one, part in zip(apart, slots.split(counts), strict=True)]


@pytest.mark.parametrize("slots", [16, 32])
@settings(deadline=None)
@given(LENGTHS, st.integers(1, 6))
def test_every_token_has_one_place_and_texts_stay_whole(slots, lengths, clients):
    sizes = np.resize(lengths, (clients, len(lengths)))
    places, apart = lay_out(sizes, 5, slots)
    total = int(sizes.sum())
    assert places.inverse.shape == (total + 5,)
    assert len(places.inverse[:total].unique()) == total
    assert torch.equal(places.index[places.inverse[:total]], torch.arange(total))
    text = torch.repeat_interleave(torch.arange(sizes.size) + 1, torch.from_numpy(sizes.ravel()))
    found: dict[int, int] = {}
    window = 0
    for one, rows in zip(apart, windows_of(places, apart, text), strict=True):
        assert one.shape[1] % slots == 0
        assert torch.equal(one, rows[:, :, None] != rows[:, None, :])
        assert (rows != 0).any(dim=1).all()
        for row in rows.tolist():
            for which in set(row) - {0}:
                assert found.setdefault(which, window) == window
            window += 1
    assert len(found) == sizes.size


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 6))
def test_a_clients_windows_are_those_that_it_has_alone(lengths, clients):
    sizes = np.random.default_rng(0).permutation(lengths * clients).reshape(clients, -1)

    def windows(rows, first):
        """Each window as the tokens in it, numbered from `first` on."""
        values = torch.arange(rows.sum()) + first
        return [
            tuple(window)
            for part in windows_of(*lay_out(rows, 0, 16), values)
            for window in part.tolist()
        ]

    together = windows(sizes, 1)
    firsts = np.cumsum([1, *sizes.sum(axis=1)])
    alone = [windows(sizes[k : k + 1], int(firsts[k])) for k in range(clients)]
    assert len(together) == sum(map(len, alone))
    for own in alone:
        assert [window for window in together if window in own] == own
