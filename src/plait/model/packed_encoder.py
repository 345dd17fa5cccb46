"""The fast forward pass of BERT-like encoders: packed tokens, one GEMM for all clients.

Every frozen layer multiplies the real tokens of all clients at once, with weights laid out for
the machine beforehand; only the LoRA branches know whose token is whose. BERT, RoBERTa and their
kin share one module layout, which is all that is used here; other architectures go through
rectangle_encoder.py, to which this file is compared.

Legend: T tokens of a batch, R its texts, n its clients, d the model's width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.activations import GELUActivation

from plait.data.tokens import Batch
from plait.factors import Factor
from plait.lora import Dropout, Layout, layer_index
from plait.machine import devices
from plait.model.attention import Attention, attention
from plait.model.frozen_linear import FrozenLinear
from plait.model.fused_layers import FusedLayer, FusedLayers, Pieces
from plait.model.kernels.compiled import kernels

PACKED_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


class _Gelu(torch.autograd.Function):
    """GELU that writes over what it is given, the largest arrays of a layer.

    Autograd forbids that where somebody else may look at them; here nobody does, since they are
    what the frozen layers below and above have just computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # In bfloat16 PyTorch's own is as fast.
        fused = kernels(x) if x.dtype is torch.float32 else None
        y = fused.gelu(x) if fused else functional.gelu(x)
        ctx.holds_derivative = fused is not None
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if ctx.holds_derivative:
            return grad.mul_(x)
        return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)  # type: ignore[no-any-return]


def _products(out: Tensor, x: Tensor, W: Tensor, batch: Batch, add: bool = False) -> None:
    """Out = x W, or out += x W, each client's tokens times its own W: (T, K), (n, K, N)."""
    fused = kernels(x)
    if fused:
        fused.products(out, x, W.contiguous(), batch, add)
        return
    if W.shape[1] > W.shape[2]:  # several times faster where the longer side is contiguous
        W = W.mT.contiguous().mT
    for out_i, x_i, W_i in batch.by_client(out, x, W):
        if add:
            out_i.addmm_(x_i, W_i)
        else:
            torch.mm(x_i, W_i, out=out_i)


def _sums(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    """(n, M, N), each client's x^T y of its own tokens: (T, M), (T, N)."""
    fused = kernels(x)
    if fused:
        return fused.sums(x, y, batch)
    return torch.stack([x_i.mT @ y_i for x_i, y_i in batch.by_client(x, y)])


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
        Bs = [B.to(x.dtype) for B in factors[1::2]]
        low = x.new_empty(len(x), A.shape[1])
        _products(low, x, A.mT, batch)
        low.mul_(scale)
        for part, own, B in zip(columns, low.chunk(len(columns), 1), Bs, strict=True):
            _products(y[:, part], own, B.mT, batch, add=True)
        ctx.batch, ctx.scale, ctx.columns = batch, scale, columns
        trains_A = any(ctx.needs_input_grad[5::2])
        ctx.save_for_backward(A, low, x if trains_A else None, *Bs)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        batch, count = ctx.batch, len(ctx.columns)
        A, low, x, *Bs = ctx.saved_tensors
        _, needs_x, *_ = ctx.needs_input_grad
        trains_A, trains_B = (any(ctx.needs_input_grad[5 + k :: 2]) for k in (0, 1))
        parts = [grad[:, part] for part in ctx.columns]
        grad_x: Tensor | None = None
        grad_A: Sequence[Tensor | None] = [None] * count
        grad_B = grad_A
        if trains_B:
            lows = low.chunk(count, dim=1)
            grad_B = [_sums(*pair, batch).mT for pair in zip(lows, parts, strict=True)]
        if trains_A or needs_x:
            grad_low = torch.empty_like(low)
            for own, part, B in zip(grad_low.chunk(count, dim=1), parts, Bs, strict=True):
                _products(own, part, B, batch)
            grad_low.mul_(ctx.scale)
        if trains_A:
            grad_A = _sums(grad_low, x, batch).chunk(count, dim=1)
        if needs_x:
            grad_x = grad.new_empty(len(grad), A.shape[2])
            grad_x[batch.num_tokens :] = 0  # the filler has no branch
            _products(grad_x, grad_low, A, batch)
        each = zip(grad_A, grad_B, strict=True)
        return grad, grad_x, None, None, None, *(one for pair in each for one in pair)


def _branches_at_once(
    y: Tensor, x: Tensor, batch: Batch, scale: float, columns: list[slice], *factors: Tensor
) -> Tensor:
    """The same for an accelerator: few products, of a rectangle with a row for each client."""
    A = torch.cat(factors[::2], dim=1).to(x.dtype)
    wide = [
        functional.pad(B.mT.to(x.dtype), (part.start, y.shape[1] - part.stop))
        for part, B in zip(columns, factors[1::2], strict=True)
    ]
    low = torch.bmm(batch.rectangle(x), A.mT) * scale
    added = torch.bmm(low, torch.cat(wide, dim=1)).flatten(0, 1)[batch.slots]
    return y + added


class _Layer:
    """One encoder layer's frozen weights, and the names of the places where LoRA may sit.

    Attributes:
        any_width: Its products are our own, which want no number of tokens beforehand.
        fused: The same for the kernels; None if the layer isn't of their kind.
    """

    def __init__(self, name: str, layer: Any, places: dict[str, int], num_heads: int) -> None:
        """Lay out the weights.

        Args:
            name: The layer's path in the model.
            layer: Its module.
            places: Name of each adapted linear layer of the model -> its number.
            num_heads: H.
        """
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
        is_gelu = isinstance(activation, GELUActivation)
        self.activation = _Gelu.apply if is_gelu else activation
        # A branch past attention needs to know whose the tokens are.
        self.last_branches = places.keys() & {self.merge_name, self.up_name, self.down_name}
        linears = {"qkv": self.qkv, "merge": self.merge, "up": self.up, "down": self.down}
        self.any_width = all(linear.kernels for linear in linears.values())
        self.fused: FusedLayer | None = None
        if self.any_width and is_gelu and not self.last_branches:
            norms = {"norm_1": self.norm_1, "norm_2": self.norm_2}
            own = {k: places[n] for k, n in enumerate(self.qkv_names) if n in places}
            self.fused = FusedLayer(linears, norms, num_heads, own)


class PackedEncoder:
    """Embeddings and encoder layers of a BERT-like model over packed tokens.

    Attributes:
        any_width: Any number of tokens is as good as another, so a batch needs no filler.
        fused: The layers from the first adapted one on; None if not all are of the kernels' kind.
    """

    def __init__(self, base: Any, prefix: str, layout: Layout) -> None:
        """Lay out the weights of `base`, whose path in the whole model is `prefix`."""
        self.layout = layout
        self.first_adapted = min(layer_index(site.name) for site in layout.sites)
        self.embeddings = base.embeddings
        self.project = getattr(base, "embeddings_project", None)
        self.num_heads = int(base.config.num_attention_heads)
        places = {site.name: number for number, site in enumerate(layout.sites)}
        self.layers = [
            _Layer(f"{prefix}encoder.layer.{index}", layer, places, self.num_heads)
            for index, layer in enumerate(base.encoder.layer)
        ]
        self.any_width = all(layer.any_width for layer in self.layers)
        self.fused_below = self._fused(self.layers[: self.first_adapted])
        self.fused = self._fused(self.layers[self.first_adapted :])
        # RoBERTa's family counts positions from the padding id on.
        roberta = base.config.model_type in ("roberta", "xlm-roberta", "camembert")
        self.first_position = base.config.pad_token_id + 1 if roberta else 0

    def _fused(self, layers: list[_Layer]) -> FusedLayers | None:
        fused = [layer.fused for layer in layers if layer.fused]
        alike = fused and len(fused) == len(layers)
        return FusedLayers(fused, self.layout.rank, self.layout.scale) if alike else None

    def __call__(
        self, batch: Batch, A: Tensor, B: Tensor, dropout: Dropout | None, first_tokens: bool
    ) -> Tensor:
        """The last hidden state (T, d) of the batch's clients, or (R, d) of their first tokens.

        Args:
            batch: The packed texts of n clients.
            A: (n, P) their A factors.
            B: (n, P) their B factors.
            dropout: The LoRA branches' dropout.
            first_tokens: Only these are wanted, so the last layer computes little else.
        """
        h = self.below(batch) if batch.hidden is None else batch.hidden
        if self.fused and not dropout:
            return self.fused(h, Pieces(batch), A, B, first_tokens)
        views = self.layout.views(Factor.A, A), self.layout.views(Factor.B, B)
        attend = attention(batch, self.num_heads, h)
        for layer in self.layers[self.first_adapted : -1]:
            h = self._layer(layer, h, batch, attend, *views, dropout)
        return self._layer(self.layers[-1], h, batch, attend, *views, dropout, first_tokens)

    def below(self, batch: Batch) -> Tensor:
        """(T, d), the input of the first adapted layer: the same for every client and step."""
        h = self.embed(batch)
        if self.fused_below:
            none = h.new_empty(batch.num_clients, 0)
            return self.fused_below(h, Pieces(batch), none, none, first_tokens=False)
        if self.first_adapted:
            attend = attention(batch, self.num_heads, h)
            for layer in self.layers[: self.first_adapted]:
                h = self._layer(layer, h, batch, attend, {}, {}, None)
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
        attend: Attention,
        A: dict[str, Tensor],
        B: dict[str, Tensor],
        dropout: Dropout | None,
        first_tokens: bool = False,
    ) -> Tensor:
        def adapted(frozen: FrozenLinear, names: list[str], x: Tensor) -> Tensor:
            """The frozen layers of these names side by side, with the branches that there are."""
            y = frozen(x)
            width = y.shape[1] // len(names)
            sites = [(k, name) for k, name in enumerate(names) if name in A]
            # With dropout each branch sees another x.
            groups = [[site] for site in sites] if dropout else [sites]
            for group in filter(None, groups):
                seen = x * dropout(group[0][1], x) if dropout else x
                columns = [slice(k * width, (k + 1) * width) for k, _ in group]
                factors = [factor for _, name in group for factor in (A[name], B[name])]
                add = _branches_at_once if devices.all_at_once(y.device) else _Branches.apply
                y = add(y, seen, batch, self.layout.scale, columns, *factors)
            return y

        qkv = adapted(layer.qkv, layer.qkv_names, h)
        context = attend(qkv)
        # Past attention tokens don't meet again.
        if first_tokens and not layer.last_branches:
            context, h = context[batch.starts], h[batch.starts]
        h = layer.norm_1(adapted(layer.merge, [layer.merge_name], context).add_(h))
        up = layer.activation(adapted(layer.up, [layer.up_name], h))
        h = layer.norm_2(adapted(layer.down, [layer.down_name], up).add_(h))
        return h[batch.starts] if first_tokens and layer.last_branches else h
