"""Cores and memory: how many chunks are computed at once, and how large they may be."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from plait.config import Config, Machine
from plait.data.tokens import pack
from plait.engines import local_training as local
from plait.engines.local_training import chunks, local_phase, on_cores
from plait.factors import Factor
from plait.machine.devices import free_bytes
from plait.model.backend import BACKENDS
from plait.model.memory import activation_bytes, tokens_at_once
from twin import setup

CONFIG = Config(clients=5, local_steps=2, batch_size=4, rank=2)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("clients", "workers"), [(10, 1), (10, 4), (3, 3), (1000, 8)])
def test_chunks_of_equal_clients_are_equally_many_and_never_too_large(clients, workers):
    parts = chunks(np.full(clients, 200), 1000, workers)
    assert sorted(i for part in parts for i in part) == list(range(clients))
    assert len(parts) % workers == 0
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert max(map(len, parts)) * 200 <= 1000


@pytest.mark.parametrize(("clients", "workers"), [(10, 1), (10, 4), (3, 3), (1000, 8)])
def test_chunks_hold_every_client_once_and_no_worker_waits(clients, workers):
    tokens = np.linspace(50, 350, clients)
    parts = chunks(tokens, 1000, workers)
    loads = [tokens[part].sum() for part in parts]
    assert sorted(i for part in parts for i in part) == list(range(clients))
    assert len(parts) % workers == 0
    assert np.mean(loads) <= 1000
    # Clients in their order, as many in each, would be up to 4.5 times as long as others.
    assert max(loads) - min(loads) <= tokens.max() / max(1, len(tokens) // len(parts) - 1)


def test_chunks_exchange_clients_until_they_are_even():
    tokens = np.array([3.0, 3, 2, 2, 2])  # the longest first: 3 + 2 + 2 and 3 + 2
    assert [tokens[part].sum() for part in chunks(tokens, 100, 2)] == [6, 6]
    tokens = np.random.default_rng(0).integers(100, 400, 200).astype(float)
    loads = [tokens[part].sum() for part in chunks(tokens, 2000, 4)]
    assert max(loads) < 1.02 * min(loads)


def test_pieces_are_computed_at_once_each_with_its_share_of_the_cores(four_threads):
    barrier = threading.Barrier(2, timeout=30)

    def work(piece):
        barrier.wait()  # passes only if two are at work
        return piece, torch.get_num_threads()

    assert on_cores(work, range(6), 2) == [(piece, 2) for piece in range(6)]
    assert torch.get_num_threads() == 4


def test_a_failing_piece_fails_the_whole_and_gives_the_cores_back(four_threads):
    with pytest.raises(ZeroDivisionError):
        on_cores(lambda piece: 1 // piece, [1, 0, 2], 3)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])  # packed, and in rectangles
def test_cores_do_not_change_the_result(architecture, ragged_tokens, four_threads):
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        _, backbone, stack, shares, _ = setup(architecture, CONFIG, ragged_tokens)
        losses = local_phase(backbone, stack, Factor.AB, 0, ragged_tokens, shares, range(5), CONFIG)
        results.append((losses, stack.factors[Factor.A]))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])  # packed, and in rectangles
def test_activations_are_what_a_step_leaves_behind(architecture, ragged_tokens):
    _, backbone, stack, _, _ = setup(architecture, CONFIG, ragged_tokens)
    longest = int(ragged_tokens.lengths.argmax())
    batch = pack(ragged_tokens, np.full((1, 100), longest))
    leaves = {f: value[:1].detach().requires_grad_() for f, value in stack.factors.items()}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        logits = backbone.logits(batch, leaves)
    assert logits.requires_grad
    # Of a hundred texts, next to nothing is what doesn't grow with them.
    per_token = activation_bytes(backbone, stack, ragged_tokens)
    assert per_token == pytest.approx(sum(kept.values()) / batch.num_tokens, rel=0.15)


def test_a_budget_makes_chunks_small_enough_and_fewer_at_once(
    ragged_tokens, four_threads, monkeypatch
):
    _, backbone, stack, shares, _ = setup("bert", CONFIG, ragged_tokens)
    per_token = activation_bytes(backbone, stack, ragged_tokens)
    state = 3 * sum(value.nbytes for value in stack.factors.values())
    batch = CONFIG.batch_size * ragged_tokens.lengths.mean()
    seen = []
    monkeypatch.setattr(
        local, "on_cores", lambda _work, pieces, workers: seen.append((pieces, workers))
    )
    for batches, expected in ((2.5, 2), (1.2, 1), (100, 4)):
        budget = (state + batches * batch * per_token) / 2**30
        backbone.machine = Machine(memory_gib=budget)
        local_phase(backbone, stack, Factor.AB, 0, ragged_tokens, shares, range(5), CONFIG)
        pieces, workers = seen.pop()
        assert workers == expected
        assert workers * max(map(len, pieces)) * batch <= batches * batch


def test_a_budget_that_holds_no_batch_says_what_is_needed(ragged_tokens):
    _, backbone, stack, _, _ = setup("bert", CONFIG, ragged_tokens)
    assert tokens_at_once(backbone, [stack], ragged_tokens, CONFIG) == float("inf")
    backbone.machine = Machine(memory_gib=1e-6)
    with pytest.raises(ValueError, match=r"5 clients and one batch need 0\.0\d GiB"):
        tokens_at_once(backbone, [stack], ragged_tokens, CONFIG)


def test_a_graphics_card_gets_as_much_as_half_its_free_memory_holds(ragged_tokens, monkeypatch):
    _, backbone, stack, _, _ = setup("bert", CONFIG, ragged_tokens)
    per_token = activation_bytes(backbone, stack, ragged_tokens)
    monkeypatch.setattr("plait.model.memory.free_bytes", lambda _device: 2000 * per_token)
    assert tokens_at_once(backbone, [stack], ragged_tokens, CONFIG) == pytest.approx(1000)


def test_more_is_computed_at_once_on_an_accelerator():
    cpu, card = (
        BACKENDS[k](torch.device("cpu"), torch.float32) for k in ("operators", "accelerator")
    )
    assert cpu.chunk_tokens(None) < card.chunk_tokens(None)
    assert cpu.chunk_tokens(100) == card.chunk_tokens(100) == 100
    assert free_bytes(cpu.device) == float("inf")


def test_of_a_model_with_large_activations_a_core_computes_less_at_once():
    cpu = BACKENDS["operators"](torch.device("cpu"), torch.float32)
    assert cpu.chunk_tokens(None, 1e4) == cpu.chunk_tokens(None)
    assert cpu.chunk_tokens(None, 250e3) == 320
    assert cpu.chunk_tokens(100, 250e3) == 100
