"""The fast forward pass of BERT-like encoders: packed tokens, one GEMM for all clients.

Every frozen layer multiplies the real tokens of all clients at once, with weights laid out for
the machine beforehand; only the LoRA branches know whose token is whose. BERT, RoBERTa and their
kin share one module layout, which is all that is used here; other architectures go through
hooked.py, to which this file is compared.

Legend: T tokens of a batch, R its texts, n its clients, d the model's width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation

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


class _Frozen(torch.autograd.Function):
    """A frozen layer; its weights have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.linear.backward(grad) if ctx.needs_input_grad[0] else None, None


class _Gelu(torch.autograd.Function):
    """GELU whose gradient is written over the one that comes in, the largest array of a layer.

    Autograd forbids that where somebody else may look at it; here nobody does, since what comes in
    is what the frozen layer above has just computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)  # type: ignore[no-any-return]


class _Branches(torch.autograd.Function):
    """LoRA branches of n clients, added to y in place, and the gradient written out.

    y[:, columns] += s (x A^T) B^T for each branch. A client's tokens lie side by side, so its
    products need no move, and add to what is there. All branches see the same x, so their A's are
    multiplied as one. Kept for the backward pass: x A^T, which is r wide, and x only where an A
    trains. The gradient of a factor that doesn't train, or of the first input, is never formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        batch: Batch,
        scale: float,
        columns: list[slice],
        *factors: Tensor,
    ) -> Tensor:
        A = torch.cat(factors[::2], dim=1).to(x.dtype)
        low = x.new_empty(len(x), A.shape[1])
        for x_i, A_i, low_i in batch.by_client(x, A, low):
            torch.mm(x_i, A_i.mT, out=low_i)
        low.mul_(scale)
        for part, own, B in zip(columns, low.chunk(len(columns), 1), factors[1::2], strict=True):
            for y_i, low_i, B_i in batch.by_client(y[:, part], own, B.to(x.dtype)):
                y_i.addmm_(low_i, B_i.mT)
        ctx.batch, ctx.scale, ctx.columns = batch, scale, columns
        trains_A = any(ctx.needs_input_grad[5::2])
        ctx.save_for_backward(A, low, x if trains_A else None, *factors[1::2])
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_client, count = ctx.batch.by_client, len(ctx.columns)
        A, low, x, *Bs = ctx.saved_tensors
        _, needs_x, *_ = ctx.needs_input_grad
        trains_A, trains_B = (any(ctx.needs_input_grad[5 + k :: 2]) for k in (0, 1))
        parts = [grad[:, part] for part in ctx.columns]
        grad_x: Tensor | None = None
        grad_A: Sequence[Tensor | None] = [None] * count
        grad_B = grad_A
        if trains_B:
            lows = low.chunk(count, dim=1)
            grad_B = [
                torch.stack([low_i.mT @ grad_i for low_i, grad_i in by_client(own, part)]).mT
                for own, part in zip(lows, parts, strict=True)
            ]
        if trains_A or needs_x:
            grad_low = torch.empty_like(low)
            for own, part, B in zip(grad_low.chunk(count, dim=1), parts, Bs, strict=True):
                # Products with long rows on the right are several times faster on the CPU.
                long_rows = B.to(grad.dtype).mT.contiguous()
                for low_i, grad_i, B_i in by_client(own, part, long_rows):
                    torch.mm(grad_i, B_i.mT, out=low_i)
            grad_low.mul_(ctx.scale)
        if trains_A:
            all_A = torch.stack([low_i.mT @ x_i for low_i, x_i in by_client(grad_low, x)])
            grad_A = all_A.chunk(count, dim=1)
        if needs_x:
            grad_x = grad.new_empty(len(grad), A.shape[2])
            grad_x[ctx.batch.num_tokens :] = 0  # the filler has no branch
            for x_i, low_i, A_i in by_client(grad_x, grad_low, A):
                torch.mm(low_i, A_i, out=x_i)
        each = zip(grad_A, grad_B, strict=True)
        return grad, grad_x, None, None, None, *(one for pair in each for one in pair)


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
        activation = layer.intermediate.intermediate_act_fn
        self.activation = _Gelu.apply if isinstance(activation, GELUActivation) else activation


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
        windows = self.windows(batch)
        h = self.below(batch, windows) if batch.hidden is None else batch.hidden
        for layer in self.layers[self.first_adapted : -1]:
            h = self._layer(layer, h, batch, windows, A, B, dropout)
        return self._layer(self.layers[-1], h, batch, windows, A, B, dropout, first_tokens)

    def windows(self, batch: Batch) -> Windows:
        """The batch's windows for attention in this model."""
        return Windows(batch, self.num_heads, self.layers[0].qkv.weight.dtype)

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
            y = _Frozen.apply(x, frozen)  # type: ignore[no-untyped-call]
            width = y.shape[1] // len(names)
            sites = [(k, name) for k, name in enumerate(names) if name in A]
            # With dropout each branch sees another x.
            groups = [[site] for site in sites] if dropout else [sites]
            for group in filter(None, groups):
                seen = x * dropout(group[0][1], x) if dropout else x
                columns = [slice(k * width, (k + 1) * width) for k, _ in group]
                factors = [factor for _, name in group for factor in (A[name], B[name])]
                y = _Branches.apply(y, seen, batch, self.scale, columns, *factors)  # type: ignore[no-untyped-call]
            return y  # type: ignore[no-any-return]

        qkv = adapted(layer.qkv, layer.qkv_names, h)
        context = attention(qkv, windows)
        # Past attention tokens don't meet again. A branch there needs to know whose they are.
        last_branches = A.keys() & {layer.merge_name, layer.up_name, layer.down_name}
        if first_tokens and not last_branches:
            context, h = context[batch.starts], h[batch.starts]
        h = layer.norm_1(adapted(layer.merge, [layer.merge_name], context).add_(h))
        up = layer.activation(adapted(layer.up, [layer.up_name], h))
        h = layer.norm_2(adapted(layer.down, [layer.down_name], up).add_(h))
        return h[batch.starts] if first_tokens and last_branches else h
