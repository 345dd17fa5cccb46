"""The fast forward pass of BERT-like encoders: packed tokens, one GEMM for all clients.

Every frozen layer multiplies the real tokens of all clients at once, with weights laid out for
the machine beforehand; only the LoRA branches know whose token is whose. BERT, RoBERTa and their
kin share one module layout, which is all that is used here; other architectures go through
hooked.py, to which this file is compared.

Legend: T tokens of a batch, R its texts, n its clients, d the model's width, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plait.lora import Dropout, Site, branch, layer_index
from plait.tokens import Batch, Places

PACKED_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


class FrozenLinear:
    """x W^T + b with W frozen and, on the CPU, prepacked for oneDNN, forward and backward."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        """The layers side by side, as one: (d_out_1 + d_out_2 + ..., d_in)."""
        self.weight = torch.cat([layer.weight for layer in layers]).detach().contiguous()
        self.bias = torch.cat([layer.bias for layer in layers]).detach()
        self.prepacked = self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
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

    def __call__(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out), differentiable in x."""
        return _Frozen.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.backward(grad), None


class _Rearrange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return _take(grad, inverse), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x by index; one past the end is a row of zeros."""
    return functional.pad(x, (0, 0, 0, 1)).index_select(0, index)


def spread(x: Tensor, places: Places) -> Tensor:
    """(T, d) -> (slots, d): tokens into the rectangles, zeros elsewhere.

    A gather in both directions: autograd's own backward of indexing would scatter, row by row.
    """
    return _Rearrange.apply(x, places.index, places.inverse)  # type: ignore[no-any-return, no-untyped-call]


def gather(x: Tensor, places: Places) -> Tensor:
    """(slots, d) -> (T, d): the reverse of `spread`."""
    return _Rearrange.apply(x, places.inverse, places.index)  # type: ignore[no-any-return, no-untyped-call]


class _Layer:
    """One encoder layer's frozen weights, and the names of the places where LoRA may sit."""

    def __init__(self, name: str, layer: Any) -> None:
        attention, output = layer.attention, layer.output
        self.qkv_names = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        self.merge_name = f"{name}.attention.output.dense"
        self.up_name = f"{name}.intermediate.dense"
        self.down_name = f"{name}.output.dense"
        inner = attention.self
        self.qkv = FrozenLinear([inner.query, inner.key, inner.value])
        self.merge = FrozenLinear([attention.output.dense])
        self.up = FrozenLinear([layer.intermediate.dense])
        self.down = FrozenLinear([output.dense])
        self.num_heads = int(inner.num_attention_heads)
        self.norm_1, self.norm_2 = attention.output.LayerNorm, output.LayerNorm
        self.activation = layer.intermediate.intermediate_act_fn


class PackedEncoder:
    """Embeddings and encoder layers of a BERT-like model over packed tokens."""

    def __init__(self, base: Any, prefix: str, sites: tuple[Site, ...], scale: float) -> None:
        """Lay out the weights of `base`, whose path in the whole model is `prefix`."""
        self.first_adapted = min(layer_index(site.name) for site in sites)
        self.embeddings = base.embeddings
        self.project = getattr(base, "embeddings_project", None)
        self.scale = scale
        self.layers = [
            _Layer(f"{prefix}encoder.layer.{index}", layer)
            for index, layer in enumerate(base.encoder.layer)
        ]
        # RoBERTa's family counts positions from the padding id on.
        roberta = base.config.model_type in ("roberta", "xlm-roberta", "camembert")
        self.first_position = base.config.pad_token_id + 1 if roberta else 0

    def __call__(
        self, batch: Batch, A: dict[str, Tensor], B: dict[str, Tensor], dropout: Dropout | None
    ) -> Tensor:
        """The last hidden state (T, d) of the batch's clients.

        Args:
            batch: The packed texts of n clients.
            A: Site name -> (n, r, d_in).
            B: Site name -> (n, d_out, r).
            dropout: The LoRA branches' dropout.
        """
        h = self.below(batch) if batch.hidden is None else batch.hidden
        for layer in self.layers[self.first_adapted :]:
            h = self._layer(layer, h, batch, A, B, dropout)
        return h

    def below(self, batch: Batch) -> Tensor:
        """(T, d), the input of the first adapted layer: the same for every client and step."""
        h = self.embed(batch)
        for layer in self.layers[: self.first_adapted]:
            h = self._layer(layer, h, batch, {}, {}, None)
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
        self, layer: _Layer, h: Tensor, batch: Batch, A: Any, B: Any, dropout: Any
    ) -> Tensor:
        parts = list(layer.qkv(h).chunk(3, dim=1))
        deltas = self._branches(layer.qkv_names, h, batch, A, B, dropout)
        q, k, v = (part if delta is None else part + delta
                   for part, delta in zip(parts, deltas, strict=True))  # fmt: skip
        context = self._attention(q, k, v, batch, layer.num_heads)
        merged = self._adapted(layer.merge, layer.merge_name, context, batch, A, B, dropout)
        h = layer.norm_1(merged + h)
        up = self._adapted(layer.up, layer.up_name, h, batch, A, B, dropout)
        down = self._adapted(
            layer.down, layer.down_name, layer.activation(up), batch, A, B, dropout
        )
        return layer.norm_2(down + h)  # type: ignore[no-any-return]

    def _adapted(
        self, frozen: FrozenLinear, name: str, x: Tensor, batch: Batch, A: Any, B: Any, dropout: Any
    ) -> Tensor:
        (delta,) = self._branches([name], x, batch, A, B, dropout)
        return frozen(x) if delta is None else frozen(x) + delta

    def _branches(
        self, names: list[str], x: Tensor, batch: Batch, A: Any, B: Any, dropout: Any
    ) -> list[Tensor | None]:
        """The LoRA branches of x (T, d_in) at the named sites, None where there is none."""
        if not any(name in A for name in names):
            return [None] * len(names)

        def by_client(x: Tensor) -> Tensor:
            rectangle: Tensor = spread(x, batch.by_client).unflatten(0, (batch.num_clients, -1))
            return rectangle

        plain = by_client(x)
        deltas: list[Tensor | None] = []
        for name in names:
            if name not in A:
                deltas.append(None)
                continue
            inputs = by_client(x * dropout(name, x)) if dropout else plain
            delta = branch(inputs, A[name], B[name], self.scale)
            deltas.append(gather(delta.flatten(0, 1), batch.by_client))
        return deltas

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, num_heads: int) -> Tensor:
        """Attention within each text, (T, d) x 3 -> (T, d)."""
        sizes = [mask.numel() for _, mask in batch.groups]
        parts = [spread(x, batch.by_text).split(sizes) for x in (q, k, v)]
        contexts = []
        for (_, mask), *group in zip(batch.groups, *parts, strict=True):
            # (R_g, H, L_g, d / H) each
            q, k, v = (x.view(*mask.shape, num_heads, -1).transpose(1, 2) for x in group)
            context = self._attend(q, k, v, mask[:, None, None, :])
            contexts.append(context.transpose(1, 2).flatten(2).flatten(0, 1))
        return gather(torch.cat(contexts), batch.by_text)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Softmax attention of (R_g, H, L_g, d / H) under a mask of the keys."""
        if q.dtype is torch.float32 or q.device.type != "cpu":
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        # The CPU's fused attention is several times slower in bfloat16 than these three steps.
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
