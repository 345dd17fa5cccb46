"""The forward pass of any architecture over packed tokens: its own code, our attention and layers.

All texts of all clients lie side by side in one row, without padding, and the model's own code runs
on it; attention_interface.py keeps the texts apart. The linear layers of its numbered blocks are
replaced by ones that have their weights laid out for the machine and add the branches of clients.

Legend: T tokens, n clients, d the model's width.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from plait.data.tokens import Batch
from plait.factors import Factor
from plait.lora import Dropout, Layout
from plait.model.attention_interface import ATTENTION, TextWindows, attending_within
from plait.model.backend import Backend
from plait.model.frozen_linear import FrozenLinear, weight_and_bias
from plait.model.packed_encoder import first_position
from plait.model.quantized_linear import QuantizedLayer, block_layers
from plait.model.recomputation import Context, checkpoint_where, checkpointed_layers


@dataclass
class _Clients:
    """Whose tokens the layers see, and the clients' factors by the layer's name."""

    batch: Batch
    A: dict[str, Tensor]
    B: dict[str, Tensor]
    dropout: Dropout | None


class _Now(threading.local):
    clients: _Clients | None = None
    again: Context | None = None


class AdaptedLinear(nn.Module):
    """A frozen linear layer, and the branches of the clients where LoRA sits on it."""

    def __init__(self, layer: Any, name: str, scale: float | None, now: _Now, backend: Backend):
        """Lay out the weight of `layer`; `scale` is None where there are no branches."""
        super().__init__()
        if isinstance(layer, QuantizedLayer):
            self.frozen: FrozenLinear = layer.frozen
        else:
            self.frozen = backend.linear(*weight_and_bias(layer))
            self.weight, self.bias = layer.weight, layer.bias  # some code looks at them
        self.name, self.scale, self._now, self._backend = name, scale, now, backend

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out).

        Raises:
            ValueError: LoRA sits here, and x isn't what a layer makes of the batch's tokens.
        """
        flat = x.flatten(0, -2)
        y = self.frozen(flat)
        clients = self._now.clients
        if self.scale is not None and clients is not None:
            if x.shape[:-1] != (1, len(clients.batch.ids)):
                raise ValueError(f"{self.name} sees other things than the tokens of the texts.")
            seen = flat * clients.dropout(self.name, flat) if clients.dropout else flat
            A, B = clients.A[self.name], clients.B[self.name]
            whole = [slice(0, y.shape[1])]
            y = self._backend.branches(y, seen, clients.batch, self.scale, whole, A, B)
        return y.view(*x.shape[:-1], -1)


class InterfaceEncoder:
    """`base(...)` on packed tokens.

    Attributes:
        layers: Those that can be computed again in the backward pass.
        recompute: They are.
    """

    below = None  # as PackedEncoder has it

    def __init__(self, base: Any, prefix: str, layout: Layout, backend: Backend) -> None:
        """Put our layers and attention into `base`.

        Args:
            base: The encoder or decoder stack of a model.
            prefix: The path to it.
            layout: Where adapters lie in a row.
            backend: How to compute.

        Raises:
            ValueError: It isn't told positions, or LoRA sits on layers of another kind.
        """
        self.base, self.layout, self.backend = base, layout, backend
        self.first_position = first_position(base)
        self._takes = inspect.signature(base.forward).parameters
        if "position_ids" not in self._takes:
            raise ValueError("It isn't told positions.")
        self.has_types = getattr(base.config, "type_vocab_size", 0) > 1
        self._without_cache = {"use_cache": False} if "use_cache" in self._takes else {}
        self._now = _Now()
        sites = {site.name for site in layout.sites}
        linear = {prefix + name: layer for name, layer in block_layers(base).items()}
        if missing := sites - linear.keys():
            raise ValueError(f"{min(missing)} is no linear layer.")
        self._replaced = []
        self._attention = base.config._attn_implementation
        base.set_attn_implementation(ATTENTION)
        for name, module in linear.items():
            parent = base.get_submodule(name.removeprefix(prefix).rpartition(".")[0])
            scale = layout.scale if name in sites else None
            ours = AdaptedLinear(module, name, scale, self._now, backend)
            setattr(parent, name.rpartition(".")[2], ours)
            self._replaced.append((parent, name.rpartition(".")[2], module, ours))
        self.padded = backend.pads(ours.frozen for *_, ours in self._replaced)
        self.recompute, self.layers = False, checkpointed_layers(base)
        for layer in self.layers:
            checkpoint_where(layer, lambda: self._now.again)

    def remove(self) -> None:
        """Put the model's own layers and attention back."""
        for layer in self.layers:
            del layer.forward
        for parent, name, module, _ in self._replaced:
            setattr(parent, name, module)
        self.base.set_attn_implementation(self._attention)

    def __call__(
        self, batch: Batch, A: Tensor, B: Tensor, dropout: Dropout | None, asked_only: bool
    ) -> Tensor:
        """The last hidden state (T, d) or (Q, d), as `PackedEncoder.__call__`."""
        views = self.layout.views(Factor.A, A), self.layout.views(Factor.B, B)
        inputs = {
            "input_ids": batch.ids[None],
            "position_ids": (batch.positions + self.first_position)[None],
        }
        if self.has_types:
            inputs["token_type_ids"] = batch.types[None]
        windows = TextWindows(batch, self.backend.window_sizes)
        seeing = partial(self._seeing, _Clients(batch, *views, dropout), windows)
        with seeing():
            self._now.again = seeing if self.recompute else None
            hidden: Tensor = self.base(**inputs, **self._without_cache).last_hidden_state[0]
        return hidden[batch.asked] if asked_only else hidden

    @contextmanager
    def _seeing(self, clients: _Clients, windows: TextWindows) -> Iterator[None]:
        """While this lasts, layers and attention of this thread see these clients' texts."""
        self._now.clients = clients
        try:
            with attending_within(windows):
                yield
        finally:
            self._now.clients = self._now.again = None
