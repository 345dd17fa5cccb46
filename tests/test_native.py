"""The C kernels: against PyTorch, on any number of threads, and where they can't be compiled."""

from __future__ import annotations

import subprocess

import pytest
import torch

from conftest import random_tokens
from plait import native
from plait.native import kernels
from plait.packed import _products, _sums
from plait.tokens import pack

CPU = torch.device("cpu")


@pytest.fixture
def batch():
    rows = torch.randint(0, 60, (5, 4), generator=torch.Generator().manual_seed(0))
    return pack(random_tokens(), rows.numpy())


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield lambda: torch.set_num_threads(2)
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 15, 16, 1003])
def test_gelu_and_its_derivative(compiler, count):
    x = torch.linspace(-12, 9, count)
    exact = x.double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    expected.sum().backward()
    y = kernels(CPU, torch.float32).gelu(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.double(), exact.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("K", "N"), [(40, 4), (8, 40), (32, 64), (3, 33), (100, 17)])
def test_each_clients_tokens_times_its_own_matrix(compiler, batch, monkeypatch, K, N, add):
    generator = torch.Generator().manual_seed(K)
    wide = torch.randn(len(batch.ids), K + N + 3, generator=generator)
    x, out = wide[:, :K], wide[:, K : K + N]
    W = torch.randn(batch.num_clients, N, K, generator=generator).mT
    results = []
    for fused in (kernels(CPU, torch.float32), None):
        monkeypatch.setattr("plait.packed._kernels", lambda _x, fused=fused: fused)
        mine = wide.clone()
        _products(mine[:, K : K + N], mine[:, :K], W, batch, add)
        assert torch.equal(mine[:, :K], x)
        assert torch.equal(mine[:, K + N :], wide[:, K + N :])
        assert torch.equal(mine[batch.num_tokens :], wide[batch.num_tokens :])
        results.append(mine[: batch.num_tokens, K : K + N])
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    assert not torch.equal(results[0], out[: batch.num_tokens])


@pytest.mark.parametrize(("M", "N"), [(4, 40), (16, 64), (13, 33), (40, 8), (1, 200)])
def test_each_clients_sum_of_outer_products(compiler, batch, monkeypatch, M, N):
    wide = torch.randn(len(batch.ids), M + N, generator=torch.Generator().manual_seed(M))
    args = (wide[:, :M], wide[:, M:], batch)
    mine = _sums(*args)
    monkeypatch.setattr("plait.packed._kernels", lambda _x: None)
    assert mine.shape == (batch.num_clients, M, N)
    torch.testing.assert_close(mine, _sums(*args), rtol=0, atol=1e-4)


def test_the_number_of_threads_changes_nothing(compiler, batch, two_threads):
    fused = kernels(CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    qkv, x = (torch.randn(len(batch.ids), n, generator=generator) for n in (3 * 64, 64))
    W = torch.randn(batch.num_clients, 64, 40, generator=generator)

    def all_of_them():
        derivative, out = x.clone(), x.new_zeros(len(x), 40)
        fused.products(out, x, W, batch)
        return [
            fused.attention(qkv, batch, 4), fused.attention(qkv, batch, 4, x),
            fused.gelu(derivative), derivative, out, fused.sums(x, qkv, batch),
        ]  # fmt: skip

    alone = all_of_them()
    two_threads()
    assert all(map(torch.equal, alone, all_of_them()))


def test_they_are_compiled_once(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    make = native._kernels.__wrapped__
    assert make(torch.float32) is not None
    assert [file.suffix for file in (tmp_path / "kernels").iterdir()] == [".so"]

    def refuse(*_args, **_kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert make(torch.float32) is not None


def test_without_a_compiler_or_a_place_there_are_none(monkeypatch, tmp_path):
    make = native._kernels.__wrapped__
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    for compiler in ("false", "there-is-no-such-compiler", "true"):
        monkeypatch.setenv("CC", compiler)
        assert make(torch.float32) is None
    monkeypatch.delenv("CC")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "file"))
    assert make(torch.float32) is None


def test_there_are_none_for_other_devices_and_types():
    assert kernels(torch.device("meta"), torch.float32) is None
    assert kernels(CPU, torch.float64) is None
