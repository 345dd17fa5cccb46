"""Attention equals attention text by text, and so does its gradient."""

from __future__ import annotations

import pytest
import torch

from conftest import tokens_of
from plait.data.tokens import pack
from plait.model.attention_windows import Windows, attention_in_windows
from plait.model.backend import KernelBackend

HEADS = 3
KINDS = {
    "windows": (torch.float64, 1e-12),
    "kernel": (torch.float32, 5e-6),
    "kernel in bfloat16": (torch.bfloat16, 0.03),
}


def way(kind, batch, dtype):
    """Attention of a kind over a batch."""
    if kind == "windows":
        windows = Windows(batch, HEADS, dtype)
        return lambda qkv: attention_in_windows(qkv, windows)
    return KernelBackend(torch.device("cpu"), dtype).attention(batch, HEADS)


@pytest.mark.parametrize("width", [4, 16, 20, 32], ids="head {}".format)
@pytest.mark.parametrize("longest", [8, 40, 260])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_one_text_after_another(kind, longest, width, request):
    if kind != "windows":
        request.getfixturevalue("compiler")
    dtype, tolerance = KINDS[kind]
    generator = torch.Generator().manual_seed(longest)
    lengths = torch.randint(1, longest + 1, (24,), generator=generator).tolist()
    batch = pack(tokens_of([*lengths, longest]), torch.arange(24).view(4, 6).numpy() + 1)
    shape = (len(batch.ids), 3 * HEADS * width)
    qkv = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    context = way(kind, batch, dtype)(qkv)
    exact = qkv.detach().double().requires_grad_()
    expected = torch.cat(
        [
            one_text(exact[start : start + length])
            for start, length in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
        ]
    )
    real = slice(batch.num_tokens)
    torch.testing.assert_close(context[real].double(), expected, rtol=0, atol=tolerance)
    direction = torch.randn(context.shape[::-1], generator=generator).to(dtype).T
    (grad,) = torch.autograd.grad(context, qkv, direction)
    (expected_grad,) = torch.autograd.grad(expected, exact, direction[real].double())
    torch.testing.assert_close(grad[real].double(), expected_grad[real], rtol=0, atol=tolerance)
    assert grad.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_not_finite_is_seen_in_its_own_text_alone(compiler, value, part):
    batch = pack(tokens_of([5, 20, 40]), torch.arange(3).view(1, 3).numpy())
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(len(batch.ids), 3 * HEADS * 16, generator=generator)
    column = ["query", "key", "value"].index(part) * HEADS * 16
    qkv[10, column] = value  # a token of the second text, in the first head
    context = way("kernel", batch, torch.float32)(qkv)
    assert not context[5:25, :16].isfinite().all()
    assert context[:5].isfinite().all()
    assert context[25 : batch.num_tokens].isfinite().all()
    assert context[:, 16:].isfinite().all()


def one_text(qkv: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv.view(len(qkv), 3, HEADS, -1).permute(1, 2, 0, 3)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1)
