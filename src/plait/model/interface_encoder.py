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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from plait.data.tokens import Batch
from plait.factors import Factor
from plait.lora import Dropout, Layout
from plait.model.attention_interface import ATTENTION, TextWindows, attending_within
from plait.model.backend import Backend
from plait.model.frozen_linear import FrozenLinear, weight_and_bias
from plait.model.fused_parts import LANES, alike
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
    """Frozen linear layers of one input, side by side, and the clients' branches on them."""

    def __init__(
        self, layers: dict[str, Any], adapted: set[str], scale: float, now: _Now, backend: Backend
    ) -> None:
        """Lay out the weights of `layers`, by name; LoRA sits on those that are `adapted`."""
        super().__init__()
        first, *_ = layers.values()
        if len(layers) == 1:
            self.bias = first.bias  # some code looks at it, and at the weight
        if isinstance(first, QuantizedLayer):
            self.frozen: FrozenLinear = first.frozen
            self.widths = [first.frozen.shape[0]]
        else:
            both = [weight_and_bias(layer) for layer in layers.values()]
            self.widths = [len(weight) for weight, _ in both]
            biases = [weight.new_zeros(len(weight)) if b is None else b for weight, b in both]
            bias = None if all(b is None for _, b in both) else torch.cat(biases)
            self.frozen = backend.linear(torch.cat([weight for weight, _ in both]), bias)
            if len(layers) == 1:
                self.weight = first.weight
        ends = list(accumulate(self.widths))
        self.columns = {
            name: slice(end - width, end)
            for name, end, width in zip(layers, ends, self.widths, strict=True)
            if name in adapted
        }
        self.scale, self._now, self._backend = scale, now, backend

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out).

        Raises:
            ValueError: LoRA sits here, and x isn't what a layer makes of the batch's tokens.
        """
        flat = x.flatten(0, -2)
        y = self.frozen(flat)
        clients = self._now.clients
        if self.columns and clients is not None:
            if x.shape[:-1] != (1, len(clients.batch.ids)):
                raise ValueError(f"{[*self.columns]} see other things than the texts' tokens.")
            if clients.dropout is None:
                y = self._branches(y, flat, clients, [*self.columns])
            else:
                for name in self.columns:
                    y = self._branches(y, flat * clients.dropout(name, flat), clients, [name])
        return y.view(*x.shape[:-1], -1)

    def _branches(self, y: Tensor, x: Tensor, clients: _Clients, names: list[str]) -> Tensor:
        factors = (factor for name in names for factor in (clients.A[name], clients.B[name]))
        columns = [self.columns[name] for name in names]
        return self._backend.branches(y, x, clients.batch, self.scale, columns, *factors)


class SharedLinear:
    """Several layers that are given the same input one after another: computed at once."""

    def __init__(self, linear: AdaptedLinear) -> None:
        self.linear = linear
        self._kept = _Kept()

    def parts(self) -> list[nn.Module]:
        """What stands in the place of each of the layers."""
        return [_Part(self, i) for i in range(len(self.linear.widths))]

    def part(self, x: Tensor, i: int) -> Tensor:
        """What layer i makes of x."""
        kept = self._kept
        if kept.x is not x or kept.parts[i] is None:
            kept.x, kept.parts = x, [*_Apart.apply(self.linear(x), self.linear.widths)]  # type: ignore[no-untyped-call]
        found, kept.parts[i] = kept.parts[i], None
        if not any(part is not None for part in kept.parts):
            kept.x = None
        assert found is not None
        return found


class _Kept(threading.local):
    x: Tensor | None = None
    parts: list[Tensor | None]


class _Part(nn.Module):
    def __init__(self, shared: SharedLinear, i: int) -> None:
        super().__init__()
        self.shared, self.i = shared, i

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.part(x, self.i)


class _Apart(torch.autograd.Function):
    """Views of some columns each; the gradient is put together once."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
        ctx.widths = widths
        return tuple(y.split(widths, dim=-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat(grads, dim=-1), None


class GatedMlp(nn.Module):
    """down(silu(gate(x)) up(x)), gate and up computed at once."""

    def __init__(self, gate_up: nn.Module, gated: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.gated, self.down = gate_up, gated, down

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.down(self.gated(self.gate_up(x)))  # type: ignore[no-any-return]


SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
"""Names of layers that stand in one module and are given the same input one after another."""
GATED = ("gate_proj", "up_proj", "down_proj")
"""Names of the layers of a gated MLP."""


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
        self._undo = ExitStack()
        self._undo.callback(base.set_attn_implementation, base.config._attn_implementation)
        base.set_attn_implementation(ATTENTION)
        self._linear: list[AdaptedLinear] = []
        self._adapt = partial(self._adapted, sites)
        for names in _groups(linear):
            self._replace(prefix, {name: linear[name] for name in names})
        self._undo.callback(backend.fuse(base))
        self.padded = backend.pads([one.frozen for one in self._linear])
        self.recompute, self.layers = False, checkpointed_layers(base)
        for layer in self.layers:
            checkpoint_where(layer, lambda: self._now.again)
            self._undo.callback(delattr, layer, "forward")

    @property
    def token_floats(self) -> float:
        """About how many numbers a token leaves in memory until the backward pass.

        It is 1.6 times what the linear layers give, as measured with a Llama; how many exactly is
        for memory.py to find out, by trying.
        """
        return 1.6 * sum(sum(one.widths) for one in self._linear)

    def _adapted(self, sites: set[str], layers: dict[str, Any]) -> AdaptedLinear:
        ours = AdaptedLinear(layers, sites, self.layout.scale, self._now, self.backend)
        self._linear.append(ours)
        return ours

    def _replace(self, prefix: str, layers: dict[str, Any]) -> None:
        """Put ours in the place of layers of one module."""
        path, _, _ = next(iter(layers)).removeprefix(prefix).rpartition(".")
        parent = self.base.get_submodule(path)
        children = [name.rpartition(".")[2] for name in layers]
        if tuple(children) == GATED:
            mlp = self._gated(parent, layers)
            if mlp is not None:
                above, _, name = path.rpartition(".")
                self._put(self.base.get_submodule(above), name, mlp)
                return
        ours: list[nn.Module]
        if tuple(children) in SIDE_BY_SIDE:
            ours = SharedLinear(self._adapt(layers)).parts()
        else:
            ours = [self._adapt({name: layer}) for name, layer in layers.items()]
        for child, one in zip(children, ours, strict=True):
            self._put(parent, child, one)

    def _put(self, parent: Any, name: str, module: nn.Module) -> None:
        self._undo.callback(setattr, parent, name, getattr(parent, name))
        setattr(parent, name, module)

    def _gated(self, mlp: Any, layers: dict[str, Any]) -> GatedMlp | None:
        """Ours, if there is one, and it does the same."""
        gated = self.backend.gated()
        (gate, up, down) = layers.items()
        if gated is None or len(gate[1].weight) % LANES:
            return None
        before = len(self._linear)
        ours = GatedMlp(self._adapt(dict([gate, up])), gated, self._adapt(dict([down])))
        if alike(ours, mlp, gate[1].in_features, gate[1].weight.dtype):
            return ours
        del self._linear[before:]
        return None

    def remove(self) -> None:
        """Put the model's own layers and attention back."""
        self._undo.close()

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
        windows = self.backend.text_windows(batch)
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


def _groups(linear: dict[str, Any]) -> list[tuple[str, ...]]:
    """Names of layers, those together that are computed together."""
    there = {name for name, layer in linear.items() if not isinstance(layer, QuantizedLayer)}
    found: list[tuple[str, ...]] = []
    for name in linear:
        parent, _, child = name.rpartition(".")
        together = next((one for one in (*SIDE_BY_SIDE, GATED) if child in one), (child,))
        names = tuple(f"{parent}.{one}" for one in together)
        names = names if there.issuperset(names) else (name,)
        if names not in found:
            found.append(names)
    return found
