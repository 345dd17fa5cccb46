"""The C kernels: against PyTorch, on any number of threads, and where they can't be compiled."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import random_tokens
from plait.data.tokens import pack
from plait.model.backend import KernelBackend
from plait.model.kernels import compiled as native
from plait.model.kernels.compiled import kernels

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@pytest.fixture
def batch():
    rows = torch.randint(0, 60, (5, 4), generator=torch.Generator().manual_seed(0))
    return pack(random_tokens(), rows.numpy())


@pytest.mark.parametrize("count", [1, 15, 16, 1003])
def test_gelu_and_its_derivative(compiler, count):
    x = torch.linspace(-12, 9, count)
    exact = x.double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    expected.sum().backward()
    y = kernels(torch.float32).gelu(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.double(), exact.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("K", "N"), [(40, 4), (8, 40), (32, 64), (3, 33), (100, 17)])
def test_each_clients_tokens_times_its_own_matrix(compiler, batch, K, N, add, dtype):
    generator = torch.Generator().manual_seed(K)
    wide = (torch.randn(len(batch.ids), K + N + 3, generator=generator) / K**0.5).to(dtype)
    W = torch.randn(batch.num_clients, N, K, generator=generator).mT.to(dtype)
    mine = wide.clone()
    x, out = mine[:, :K], mine[:, K : K + N]
    KernelBackend(CPU, dtype).grouped_matmul(out, x, W, batch, add)
    expected = wide.double()
    for own, x_i, W_i in batch.by_client(expected, x.double(), W.double()):
        own[:, K : K + N] = x_i @ W_i + (own[:, K : K + N] if add else 0)
    torch.testing.assert_close(mine.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(mine[:, K + N :], wide[:, K + N :])
    assert torch.equal(mine[batch.num_tokens :], wide[batch.num_tokens :])


def test_what_is_kept_in_bfloat16_is_rounded_to_the_nearest(compiler, batch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(batch.ids), 1, generator=generator).bfloat16()
    W = torch.randn(batch.num_clients, 1, 33, generator=generator).bfloat16()
    out = x.new_zeros(len(x), 33)
    KernelBackend(CPU, torch.bfloat16).grouped_matmul(out, x, W, batch)
    for own, x_i, W_i in batch.by_client(out, x, W):
        assert torch.equal(own, (x_i.float() * W_i.float()).bfloat16())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("M", "N"), [(4, 40), (16, 64), (13, 33), (40, 8), (1, 200)])
def test_each_clients_sum_of_outer_products(compiler, M, N, dtype):
    rows = np.arange(60).repeat(2).reshape(3, 40)  # hundreds of tokens each
    batch = pack(random_tokens(), rows)
    generator = torch.Generator().manual_seed(M)
    wide = torch.randn(len(batch.ids), M + N, generator=generator).to(dtype)
    x, y = wide[:, :M], wide[:, M:]
    expected = [x_i.mT @ y_i for x_i, y_i in batch.by_client(x.double(), y.double())]
    result = KernelBackend(CPU, dtype).grouped_matmul_t(x, y, batch).double()
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-4)


def test_the_number_of_threads_changes_nothing(compiler, batch, threads):
    fused = kernels(torch.float32)
    generator = torch.Generator().manual_seed(0)
    qkv, x = (torch.randn(len(batch.ids), n, generator=generator) for n in (3 * 64, 64))
    W = torch.randn(batch.num_clients, 64, 40, generator=generator)

    def all_of_them():
        derivative, out = x.clone(), qkv[:, :40].clone()
        fused.grouped_matmul(out, x, W, batch, add=True)
        return [
            fused.attention(qkv, batch, 4), fused.attention(qkv, batch, 4, x),
            fused.gelu(derivative), derivative, out, fused.grouped_matmul_t(x, qkv, batch),
        ]  # fmt: skip

    alone = all_of_them()
    threads(2)
    assert all(map(torch.equal, alone, all_of_them()))


def test_they_are_compiled_once(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    make = native.kernels.__wrapped__
    assert make(torch.float32) is not None
    assert [file.suffix for file in (tmp_path / "kernels").iterdir()] == [".so"]

    def refuse(*_args, **_kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert make(torch.float32) is not None


def test_without_a_compiler_or_a_place_there_are_none(monkeypatch, tmp_path):
    def refused(*_args, **_kwargs):
        raise PermissionError

    make = native.kernels.__wrapped__
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    for compiler in ("false", "there-is-no-such-compiler", "true"):
        monkeypatch.setenv("CC", compiler)
        assert make(torch.float32) is None
    monkeypatch.delenv("CC")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "file"))
    assert make(torch.float32) is None
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "mkdir", refused)
    assert make(torch.float32) is None


def test_there_are_none_for_other_devices_and_types():
    assert kernels(torch.float64) is None
    with pytest.raises(ValueError, match="on meta here; take the backend"):
        KernelBackend(torch.device("meta"), torch.float32)
