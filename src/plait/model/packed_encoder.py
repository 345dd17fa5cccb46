"""The fast forward pass of BERT-like encoders: packed tokens, one GEMM for all clients.

Every frozen layer multiplies the real tokens of all clients at once, with weights laid out for
the machine beforehand; only the LoRA branches know whose token is whose. BERT, RoBERTa and their
kin share one module layout, which is all that is used here; other architectures go through
rectangle_encoder.py, to which this file is compared.

Legend: T tokens of a batch, R its texts, n its clients, d the model's width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.activations import GELUActivation

from plait.data.tokens import Batch
from plait.factors import Factor
from plait.lora import Dropout, Layout, layer_index
from plait.model.backend import Attention, Backend
from plait.model.frozen_linear import FrozenLinear, side_by_side
from plait.model.fused_layers import FusedLayer, FusedLayers, Pieces

PACKED_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def first_position(base: Any) -> int:
    """The number of a text's first position: RoBERTa's family counts from the padding id on."""
    positions = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    padding: int | None = getattr(positions, "padding_idx", None)
    return 0 if padding is None else padding + 1


class _Layer:
    """One encoder layer's frozen weights, and the names of the places where LoRA may sit.

    Attributes:
        linears: The frozen layers by name: qkv, merge, up, down.
        fused: The same in one call; None if the backend has none for a layer of this kind.
    """

    def __init__(
        self, name: str, layer: Any, places: dict[str, int], num_heads: int, backend: Backend
    ) -> None:
        """Lay out the weights.

        Args:
            name: The layer's path in the model.
            layer: Its module.
            places: Name of each adapted linear layer of the model -> its number.
            num_heads: H.
            backend: How to compute.
        """
        inner, merge = layer.attention.self, layer.attention.output
        self.qkv_names = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        self.merge_name = f"{name}.attention.output.dense"
        self.up_name = f"{name}.intermediate.dense"
        self.down_name = f"{name}.output.dense"
        modules = {
            "qkv": [inner.query, inner.key, inner.value],
            "merge": [merge.dense],
            "up": [layer.intermediate.dense],
            "down": [layer.output.dense],
        }
        self.linears = {
            part: backend.linear(*side_by_side(module)) for part, module in modules.items()
        }
        self.norm_1, self.norm_2 = merge.LayerNorm, layer.output.LayerNorm
        activation = layer.intermediate.intermediate_act_fn
        is_gelu = isinstance(activation, GELUActivation)
        self.activation = backend.gelu if is_gelu else activation
        # A branch past attention needs to know whose the tokens are.
        self.last_branches = places.keys() & {self.merge_name, self.up_name, self.down_name}
        self.fused: FusedLayer | None = None
        if is_gelu and not self.last_branches:
            norms = {"norm_1": self.norm_1, "norm_2": self.norm_2}
            own = {k: places[n] for k, n in enumerate(self.qkv_names) if n in places}
            self.fused = backend.fused_layer(self.linears, norms, num_heads, own)


class PackedEncoder:
    """Embeddings and encoder layers of a BERT-like model over packed tokens.

    Attributes:
        padded: Batches are to have one of few numbers of tokens.
        fused: The layers from the first adapted one on; None if not all can be.
        below: (T, d), the input of the first adapted layer: the same for every client and step.
            None if that is the first layer of all.
    """

    def __init__(self, base: Any, prefix: str, layout: Layout, backend: Backend) -> None:
        """Lay out the weights of `base`, whose path in the whole model is `prefix`."""
        self.layout, self.backend = layout, backend
        self.first_adapted = min(layer_index(site.name) for site in layout.sites)
        self.embeddings = base.embeddings
        self.project = getattr(base, "embeddings_project", None)
        self.num_heads = int(base.config.num_attention_heads)
        places = {site.name: number for number, site in enumerate(layout.sites)}
        self.layers = [
            _Layer(f"{prefix}encoder.layer.{index}", layer, places, self.num_heads, backend)
            for index, layer in enumerate(base.encoder.layer)
        ]
        self.padded = backend.pads(one for layer in self.layers for one in layer.linears.values())
        self.fused_below = self._fused(self.layers[: self.first_adapted])
        self.fused = self._fused(self.layers[self.first_adapted :])
        self.below: Callable[[Batch], Tensor] | None = self._below if self.first_adapted else None
        self.first_position = first_position(base)

    def remove(self) -> None:
        """Nothing to take away: the model is as it was."""

    def _fused(self, layers: list[_Layer]) -> FusedLayers | None:
        fused = [layer.fused for layer in layers if layer.fused]
        alike = fused and len(fused) == len(layers)
        return FusedLayers(fused, len(self.layout.sites), self.layout.scale) if alike else None

    def __call__(
        self, batch: Batch, A: Tensor, B: Tensor, dropout: Dropout | None, asked_only: bool
    ) -> Tensor:
        """The last hidden state (T, d) of the batch's clients, or (Q, d) where it asks.

        Args:
            batch: The packed texts of n clients.
            A: (n, P) their A factors.
            B: (n, P) their B factors.
            dropout: The LoRA branches' dropout.
            asked_only: Only what the batch asks for is wanted: the last layer computes little else.
        """
        h = self._below(batch) if batch.hidden is None else batch.hidden
        if self.fused and not dropout:
            return self.fused(h, Pieces(batch), A, B, asked_only)
        views = self.layout.views(Factor.A, A), self.layout.views(Factor.B, B)
        attend = self.backend.attention(batch, self.num_heads)
        for layer in self.layers[self.first_adapted : -1]:
            h = self._layer(layer, h, batch, attend, *views, dropout)
        return self._layer(self.layers[-1], h, batch, attend, *views, dropout, asked_only)

    def _below(self, batch: Batch) -> Tensor:
        h = self.embed(batch)
        if self.fused_below:
            none = h.new_empty(batch.num_clients, 0)
            return self.fused_below(h, Pieces(batch), none, none, first_tokens=False)
        if self.first_adapted:
            attend = self.backend.attention(batch, self.num_heads)
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
        asked_only: bool = False,
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
                y = self.backend.branches(y, seen, batch, self.layout.scale, columns, *factors)
            return y

        qkv = adapted(layer.linears["qkv"], layer.qkv_names, h)
        context = attend(qkv)
        # Past attention tokens don't meet again.
        if asked_only and not layer.last_branches:
            context, h = context[batch.asked], h[batch.asked]
        h = layer.norm_1(adapted(layer.linears["merge"], [layer.merge_name], context).add_(h))
        up = layer.activation(adapted(layer.linears["up"], [layer.up_name], h))
        h = layer.norm_2(adapted(layer.linears["down"], [layer.down_name], up).add_(h))
        return h[batch.asked] if asked_only and layer.last_branches else h
