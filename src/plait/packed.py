"""The fast forward pass of BERT-like encoders: packed tokens, one GEMM for all clients.

Every frozen layer multiplies the real tokens of all clients at once, with weights laid out for
the machine beforehand; only the LoRA branches know whose token is whose. BERT, RoBERTa and their
kin share one module layout, which is all that is used here; other architectures go through
hooked.py, to which this file is compared.

Legend: T tokens of a batch, R its texts, n its clients, d the model's width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plait.attention import Windows, attention
from plait.lora import Dropout, Site, layer_index
from plait.tokens import Batch

PACKED_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def bfloat16_units() -> bool:
    """Whether oneDNN multiplies in bfloat16 on this CPU, for which it wants AVX-512 or newer."""
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class FrozenLinear:
    """x W^T + b with W frozen and, on the CPU, prepacked for oneDNN, forward and backward."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        """The layers side by side, as one: (d_out_1 + d_out_2 + ..., d_in)."""
        self.weight = torch.cat([layer.weight for layer in layers]).detach().contiguous()
        self.bias = torch.cat([layer.bias for layer in layers]).detach()
        self.prepacked = (
            self.weight.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and (self.weight.dtype is torch.float32 or bfloat16_units())
        )
        if self.prepacked:
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self.packed = reorder(self.weight)
            self.packed_t = reorder(self.weight.t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out)."""
        if self.prepacked:
            linear = torch.ops.mkldnn._linear_pointwise
            return linear(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return functional.linear(x, self.weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        """(T, d_out) -> (T, d_in)."""
        if self.prepacked:
            linear = torch.ops.mkldnn._linear_pointwise
            return linear(grad.contiguous(), self.packed_t, None, "none", [], "")  # type: ignore[no-any-return]
        return grad @ self.weight


@dataclass(frozen=True)
class Branch:
    """Where a LoRA branch adds to a frozen layer's output, and its dropout mask (T, d_in)."""

    columns: slice
    keep: Tensor | None


class _Adapted(torch.autograd.Function):
    """A frozen layer with LoRA branches of n clients, and the gradient written out.

    y[:, columns] += s (x A^T) B^T for each branch, token by token with its own client's factors.
    Kept for the backward pass: x A^T, which is r wide, and x only where an A trains. The gradient
    of a factor that doesn't train, and of inputs below the first adapted layer, is never formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linear: FrozenLinear,
        batch: Batch,
        scale: float,
        branches: list[Branch],
        *factors: Tensor,
    ) -> Tensor:
        y = linear.forward(x)
        inputs, lows = _inputs(x, branches, batch), []
        for branch, own, A, B in zip(branches, inputs, factors[::2], factors[1::2], strict=True):
            low = torch.bmm(own, A.to(x.dtype).mT).mul_(scale)
            delta = torch.bmm(low, B.to(x.dtype).mT)
            y[:, branch.columns] += batch.by_client.gather(delta.flatten(0, 1))
            lows.append(low)
        ctx.linear, ctx.batch, ctx.scale, ctx.branches = linear, batch, scale, branches
        trains_A = any(ctx.needs_input_grad[5::2])
        ctx.save_for_backward(*factors, *lows, *(inputs if trains_A else ()))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        count = len(ctx.branches)
        factors, lows, inputs = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        grad_x = ctx.linear.backward(grad) if needs_x else None
        grads: list[Tensor | None] = []
        for k, (branch, low) in enumerate(zip(ctx.branches, lows, strict=True)):
            A, B = factors[2 * k], factors[2 * k + 1]
            grad_delta = ctx.batch.by_client.spread(grad[:, branch.columns])
            grad_delta = grad_delta.unflatten(0, (ctx.batch.num_clients, -1))
            grad_A = grad_B = None
            if needs[2 * k + 1]:
                grad_B = torch.bmm(low.mT, grad_delta).mT.to(B.dtype)
            if needs[2 * k] or grad_x is not None:
                # Products with long rows on the right are several times faster on the CPU.
                long_rows = B.to(grad.dtype).mT.contiguous()
                grad_low = torch.bmm(grad_delta, long_rows.mT).mul_(ctx.scale)
            if needs[2 * k]:
                grad_A = torch.bmm(grad_low.mT, inputs[k]).to(A.dtype)
            if grad_x is not None:
                back = torch.bmm(grad_low, A.to(grad.dtype)).flatten(0, 1)
                back = ctx.batch.by_client.gather(back)
                grad_x += back if branch.keep is None else back * branch.keep
            grads += [grad_A, grad_B]
        return grad_x, None, None, None, None, *grads


def _inputs(x: Tensor, branches: list[Branch], batch: Batch) -> list[Tensor]:
    """What each branch sees of x (T, d_in), by client: (n, t, d_in), one for all if none drops."""

    def by_client(x: Tensor) -> Tensor:
        return batch.by_client.spread(x).view(batch.num_clients, -1, x.shape[1])

    if any(branch.keep is not None for branch in branches):
        return [by_client(x if b.keep is None else x * b.keep) for b in branches]
    return [by_client(x)] * len(branches) if branches else []


class _Layer:
    """One encoder layer's frozen weights, and the names of the places where LoRA may sit."""

    def __init__(self, name: str, layer: Any) -> None:
        inner, merge = layer.attention.self, layer.attention.output
        self.qkv_names = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        self.merge_name = f"{name}.attention.output.dense"
        self.up_name = f"{name}.intermediate.dense"
        self.down_name = f"{name}.output.dense"
        self.qkv = FrozenLinear([inner.query, inner.key, inner.value])
        self.merge = FrozenLinear([merge.dense])
        self.up = FrozenLinear([layer.intermediate.dense])
        self.down = FrozenLinear([layer.output.dense])
        self.norm_1, self.norm_2 = merge.LayerNorm, layer.output.LayerNorm
        self.activation = layer.intermediate.intermediate_act_fn


class PackedEncoder:
    """Embeddings and encoder layers of a BERT-like model over packed tokens."""

    def __init__(self, base: Any, prefix: str, sites: tuple[Site, ...], scale: float) -> None:
        """Lay out the weights of `base`, whose path in the whole model is `prefix`."""
        self.first_adapted = min(layer_index(site.name) for site in sites)
        self.embeddings = base.embeddings
        self.project = getattr(base, "embeddings_project", None)
        self.scale = scale
        self.num_heads = int(base.config.num_attention_heads)
        self.layers = [
            _Layer(f"{prefix}encoder.layer.{index}", layer)
            for index, layer in enumerate(base.encoder.layer)
        ]
        # RoBERTa's family counts positions from the padding id on.
        roberta = base.config.model_type in ("roberta", "xlm-roberta", "camembert")
        self.first_position = base.config.pad_token_id + 1 if roberta else 0

    def __call__(
        self,
        batch: Batch,
        A: dict[str, Tensor],
        B: dict[str, Tensor],
        dropout: Dropout | None,
        first_tokens: bool,
    ) -> Tensor:
        """The last hidden state (T, d) of the batch's clients, or (R, d) of their first tokens.

        Args:
            batch: The packed texts of n clients.
            A: Site name -> (n, r, d_in).
            B: Site name -> (n, d_out, r).
            dropout: The LoRA branches' dropout.
            first_tokens: Only these are wanted, so the last layer computes little else.
        """
        windows = Windows(batch, self.num_heads)
        h = self.below(batch, windows) if batch.hidden is None else batch.hidden
        for layer in self.layers[self.first_adapted : -1]:
            h = self._layer(layer, h, batch, windows, A, B, dropout)
        return self._layer(self.layers[-1], h, batch, windows, A, B, dropout, first_tokens)

    def below(self, batch: Batch, windows: Windows) -> Tensor:
        """(T, d), the input of the first adapted layer: the same for every client and step."""
        h = self.embed(batch)
        for layer in self.layers[: self.first_adapted]:
            h = self._layer(layer, h, batch, windows, {}, {}, None)
        return h

    def embed(self, batch: Batch) -> Tensor:
        """(T, d), the input of the first layer."""
        h = self.embeddings(
            input_ids=batch.ids[None],
            token_type_ids=batch.types[None],
            position_ids=(batch.positions + self.first_position)[None],
        )[0]
        return h if self.project is None else self.project(h)  # type: ignore[no-any-return]

    def _layer(
        self,
        layer: _Layer,
        h: Tensor,
        batch: Batch,
        windows: Windows,
        A: Any,
        B: Any,
        dropout: Dropout | None,
        first_tokens: bool = False,
    ) -> Tensor:
        def adapted(frozen: FrozenLinear, names: list[str], x: Tensor) -> Tensor:
            """The frozen layers of these names side by side, with the branches that there are."""
            width = len(frozen.weight) // len(names)
            sites = [(k, name) for k, name in enumerate(names) if name in A]
            branches = [
                Branch(slice(k * width, (k + 1) * width), dropout(name, x) if dropout else None)
                for k, name in sites
            ]
            factors = [factor for _, name in sites for factor in (A[name], B[name])]
            return _Adapted.apply(x, frozen, batch, self.scale, branches, *factors)  # type: ignore[no-any-return, no-untyped-call]

        qkv = adapted(layer.qkv, layer.qkv_names, h)
        context = attention(qkv, windows)
        # Past attention tokens don't meet again. A branch there needs to know whose they are.
        last_branches = A.keys() & {layer.merge_name, layer.up_name, layer.down_name}
        if first_tokens and not last_branches:
            context, h = context[batch.starts], h[batch.starts]
        h = layer.norm_1(adapted(layer.merge, [layer.merge_name], context) + h)
        up = layer.activation(adapted(layer.up, [layer.up_name], h))
        h = layer.norm_2(adapted(layer.down, [layer.down_name], up) + h)
        return h[batch.starts] if first_tokens and last_branches else h
