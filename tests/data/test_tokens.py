"""Packing texts without padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import random_tokens, tokens_of
from plait.data.tokens import pack
from plait.model.rectangle_encoder import similar_lengths


@settings(deadline=None)
@given(st.lists(st.integers(1, 90), min_size=6, max_size=60), st.integers(1, 6))
def test_every_token_has_one_place_and_texts_stay_whole(lengths, clients):
    tokens = tokens_of(lengths)
    rows = np.resize(np.random.default_rng(0).permutation(len(lengths)), (clients, 3))
    batch = pack(tokens, rows)
    total = int(tokens.lengths[rows].sum())
    assert batch.num_tokens == total
    assert total <= len(batch.ids) <= total * (1 + 1 / 60)
    for k, row in enumerate(rows.ravel()):
        span = slice(int(batch.starts[k]), int(batch.starts[k]) + lengths[row])
        expected = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]
        assert batch.ids[span].tolist() == expected.tolist()
        assert batch.positions[span].tolist() == list(range(lengths[row]))
    text = torch.repeat_interleave(torch.arange(rows.size) + 1.0, batch.lengths)
    text = torch.cat([text, torch.zeros(len(batch.ids) - total)])
    for client, (texts, own) in enumerate(batch.by_client(text, torch.arange(clients))):
        assert own == client
        assert set(texts.tolist()) == {3 * client + 1, 3 * client + 2, 3 * client + 3}
        assert len(texts) == batch.counts[client] == batch.bounds[client : client + 2].diff()
    assert client == clients - 1


def test_tokens_come_in_few_numbers():
    tokens = random_tokens()
    rng = np.random.default_rng(0)
    sizes = {len(pack(tokens, rng.integers(0, 60, (16, 12))).ids) for _ in range(100)}
    assert len(sizes) < 20


def test_taking_some_texts_keeps_each_whole(ragged_tokens):
    part = ragged_tokens.take(np.array([5, 0, 59]))
    assert part.labels.tolist() == ragged_tokens.labels[[5, 0, 59]].tolist()
    for k, row in enumerate([5, 0, 59]):
        begin, end = ragged_tokens.offsets[row : row + 2]
        mine = part.ids[part.offsets[k] : part.offsets[k + 1]]
        assert mine.tolist() == ragged_tokens.ids[begin:end].tolist()


@pytest.mark.parametrize("least", [1, 16])
def test_groups_of_similar_lengths_hold_every_text_once_and_little_padding(least):
    lengths = torch.from_numpy(np.random.default_rng(0).integers(3, 128, 200))
    groups = similar_lengths(lengths, waste=0.1, least=least)
    assert sorted(torch.cat(groups).tolist()) == list(range(200))
    for group in groups:
        used, room = lengths[group].sum(), lengths[group].max() * len(group)
        assert len(group) <= least or used >= 0.9 * room
