"""Attention in windows equals attention text by text, and so does its gradient."""

import pytest
import torch

from conftest import tokens_of
from plait.attention import Windows, attention
from plait.tokens import pack

HEADS, WIDTH = 3, 12


@pytest.mark.parametrize("slots", [16, 32])
@pytest.mark.parametrize("longest", [8, 40, 150], ids=["one size", "few sizes", "many sizes"])
def test_windows_equal_one_text_after_another(longest, slots):
    generator = torch.Generator().manual_seed(longest)
    lengths = torch.randint(1, longest + 1, (24,), generator=generator).tolist()
    tokens = tokens_of([*lengths, longest])
    batch = pack(tokens, torch.arange(24).view(4, 6).numpy() + 1, slots)
    assert all(apart.shape[1] % slots == 0 for apart in batch.apart)
    shape = (len(batch.ids), 3 * WIDTH)
    qkv = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    context = attention(qkv, Windows(batch, HEADS, qkv.dtype))[: batch.num_tokens]
    expected = torch.cat(
        [
            one_text(qkv[start : start + length])
            for start, length in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-12)
    direction = torch.randn(context.shape, dtype=torch.float64, generator=generator)
    grads = [torch.autograd.grad(y, qkv, direction)[0] for y in (context, expected)]
    real = slice(batch.num_tokens)
    torch.testing.assert_close(grads[0][real], grads[1][real], rtol=0, atol=1e-12)


def one_text(qkv: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv.view(len(qkv), 3, HEADS, -1).permute(1, 2, 0, 3)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1)
