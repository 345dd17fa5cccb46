"""Backends: all that is computed differently on different machines, chosen once for a backbone.

`Backend` is PyTorch's operators, each client's own products one after another: what a client gets,
to the last bit, doesn't depend on who else is there. The others differ from it where a machine
wants them to. Nobody else asks how to compute.

Legend: T tokens of a batch, n its clients, b texts of each, C labels, d the model's width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from plait.data.tokens import Batch
from plait.lookup import lookup
from plait.machine.devices import bfloat16_units
from plait.model.attention_interface import TextWindows
from plait.model.attention_windows import Windows, attention_in_windows
from plait.model.frozen_linear import (
    FrozenLinear,
    FrozenModule,
    KernelLinear,
    OneDnnLinear,
    make_batch_invariant,
    weight_and_bias,
)
from plait.model.fused_attention import fused_attention
from plait.model.fused_layers import FusedLayer
from plait.model.fused_parts import Gated, fuse
from plait.model.gelu import gelu_in_place
from plait.model.kernels import compiled
from plait.model.lora_branches import batched_branches, grouped_branches

Attention = Callable[[Tensor], Tensor]
"""softmax(q k^T / sqrt(d / H)) v within each text, (T, 3 d) -> (T, d)."""

StackedHead = Callable[[dict[str, Tensor], Tensor], Tensor]
"""Clients' own parameters by name (n, ...) and features (n, b, d) -> (n, b, C)."""


CHUNK_FLOATS = 80e6
"""What a core's chunk may leave in memory until the backward pass: 320 MB in float32."""


class Backend:
    """PyTorch's operators, with weights prepacked for oneDNN where the CPU has it.

    Attributes:
        device: Where it computes.
        dtype: In which type.
        packs: It takes the packed encoder, for architectures that have one.
        window_sizes: At most so many sizes of attention windows up to each power of two.
    """

    packs = True
    window_sizes = 4

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    # -- frozen layers

    def linear(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        """A frozen layer of W (d_out, d_in) and b (d_out,), if there is one."""
        prepack = (
            weight.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and (weight.dtype is torch.float32 or bfloat16_units())
        )
        return OneDnnLinear(weight, bias) if prepack else FrozenLinear(weight, bias)

    def prepack_outputs(self, model: Any) -> None:
        """Put a frozen layer in the place of the one that a language model's outputs come from."""
        outputs = model.get_output_embeddings()
        if isinstance(outputs, nn.Linear):
            frozen = self.linear(*weight_and_bias(outputs))
            model.set_output_embeddings(FrozenModule(frozen))

    def pads(self, linears: Iterable[FrozenLinear]) -> bool:
        """Whether batches are padded for these layers to one of few numbers of tokens."""
        return not all(linear.batch_invariant for linear in linears)

    def fused_layer(
        self,
        _linears: dict[str, FrozenLinear],
        _norms: dict[str, nn.LayerNorm],
        _num_heads: int,
        _places: dict[int, int],
    ) -> FusedLayer | None:
        """A layer of an encoder in one call, as `FusedLayer.__init__` has it, if there is one."""
        return None

    def attention(self, batch: Batch, num_heads: int) -> Attention:
        """Attention over a batch's texts, with all that its layers share worked out once."""
        windows = Windows(batch, num_heads, self.dtype, self.window_sizes)
        return lambda qkv: attention_in_windows(qkv, windows)

    def text_windows(self, batch: Batch) -> TextWindows:
        """What attention within a batch's texts needs, whatever the architecture."""
        return TextWindows(batch, self.window_sizes)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of an array that nobody else looks at, which may be written over."""
        return gelu_in_place(x)

    def gated(self) -> nn.Module | None:
        """silu(gate) up of (..., 2 f), if there is something better than the operators."""
        return None

    def fuse(self, _base: Any) -> Callable[[], None]:
        """Put quicker parts into a model of transformers; what is returned undoes it."""
        return lambda: None

    # -- what is each client's own

    def branches(
        self,
        y: Tensor,
        x: Tensor,
        batch: Batch,
        scale: float,
        columns: list[slice],
        *factors: Tensor,
    ) -> Tensor:
        """Y with LoRA's branches added to some of its columns; y may be written over.

        Args:
            y: (T, d_out), what the frozen layer makes of x.
            x: (T, d_in).
            batch: Whose tokens they are.
            scale: What the branches are multiplied by.
            columns: Of each branch.
            factors: A (n, r, d_in) and B (n, width of the columns, r) of each branch by turns.
        """
        return grouped_branches(y, x, batch, scale, columns, self, *factors)

    def grouped_matmul(
        self, out: Tensor, x: Tensor, W: Tensor, batch: Batch, add: bool = False
    ) -> None:
        """Out = x W, or out += x W, each client's tokens times its own W: (T, K), (n, K, N)."""
        if W.shape[1] > W.shape[2]:  # several times faster where the longer side is contiguous
            W = W.mT.contiguous().mT
        for out_i, x_i, W_i in batch.by_client(out, x, W):
            if add:
                out_i.addmm_(x_i, W_i)
            else:
                torch.mm(x_i, W_i, out=out_i)

    def grouped_matmul_t(self, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """(n, M, N), each client's x^T y of its own tokens: (T, M), (T, N)."""
        return torch.stack([x_i.mT @ y_i for x_i, y_i in batch.by_client(x, y)])

    def head(self, head: nn.Module, _frozen: bool) -> StackedHead:
        """A head for a stack of clients; `frozen` if none of its parameters is ever another."""
        return partial(_client_by_client, head)

    def optimizer_rows(self, part: Tensor) -> list[Tensor]:
        """(n, P) as the fused optimizer is given it.

        Each client's row by itself: the last few entries of a tensor are rounded otherwise than
        those before them, and which are the last must not depend on who else is here.
        """
        return list(part)

    # -- how much at once

    def chunk_tokens(self, given: int | None, token_floats: float = 0.0) -> int:
        """About how many tokens to compute at once: as many as given, or few enough for a cache.

        Fewer of a model with so many numbers for each of them that chunks would fill the memory.
        """
        return given or int(min(2048, CHUNK_FLOATS / max(1.0, token_floats)))

    def workers(self) -> int:
        """How many chunks can be computed at once: PyTorch's threads."""
        return torch.get_num_threads()


class KernelBackend(Backend):
    """The C kernels on a CPU, and PyTorch's operators for what they aren't made for."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compile the kernels, unless that was done before.

        Raises:
            ValueError: There are none for this machine.
        """
        super().__init__(device, dtype)
        kernels = compiled.kernels(dtype) if device.type == "cpu" else None
        if kernels is None:
            raise ValueError(
                f"There are no kernels for {dtype} on {device.type} here; take the backend "
                "`operators`, or see `plait doctor`."
            )
        self.kernels = kernels

    def linear(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        """By the kernels if they suit W."""
        if self.kernels.suit(weight):
            return KernelLinear(weight, bias, self.kernels)
        return super().linear(weight, bias)

    def fused_layer(
        self,
        linears: dict[str, FrozenLinear],
        norms: dict[str, nn.LayerNorm],
        num_heads: int,
        places: dict[int, int],
    ) -> FusedLayer | None:
        """One if the kernels suit all of its weights."""
        own = {name: one for name, one in linears.items() if isinstance(one, KernelLinear)}
        return FusedLayer(own, norms, num_heads, places) if own == linears else None

    def attention(self, batch: Batch, num_heads: int) -> Attention:
        """Text by text."""
        return lambda qkv: fused_attention(qkv, batch, num_heads, self.kernels)

    def text_windows(self, batch: Batch) -> TextWindows:
        """Text by text, where what a token attends to is an interval."""
        return TextWindows(batch, self.window_sizes, self.kernels)

    def gated(self) -> nn.Module | None:
        """In one pass each way."""
        return Gated(self.kernels)

    def fuse(self, base: Any) -> Callable[[], None]:
        """RMSNorms and rotary positions."""
        return fuse(base, self.kernels)

    def gelu(self, x: Tensor) -> Tensor:
        """In bfloat16 PyTorch's own is as fast."""
        return gelu_in_place(x, self.kernels if x.dtype is torch.float32 else None)

    def grouped_matmul(
        self, out: Tensor, x: Tensor, W: Tensor, batch: Batch, add: bool = False
    ) -> None:
        """All clients in one call."""
        self.kernels.grouped_matmul(out, x, W.contiguous(), batch, add)

    def grouped_matmul_t(self, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """All clients in one call."""
        return self.kernels.grouped_matmul_t(x, y, batch)

    def head(self, head: nn.Module, frozen: bool) -> StackedHead:
        """All rows at once where that is as good as client by client."""
        at_once = frozen and make_batch_invariant(head, self.kernels)
        return partial(_all_rows, head) if at_once else super().head(head, frozen)


class AcceleratorBackend(Backend):
    """Few large calls: products of clients' own matrices are one batched product."""

    window_sizes = 1  # some more slots cost less than some more calls

    def linear(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        """As it is."""
        return FrozenLinear(weight, bias)

    def pads(self, _linears: Iterable[FrozenLinear]) -> bool:
        """Any number of tokens is as good as another."""
        return False

    def branches(
        self,
        y: Tensor,
        x: Tensor,
        batch: Batch,
        scale: float,
        columns: list[slice],
        *factors: Tensor,
    ) -> Tensor:
        """All clients at once."""
        return batched_branches(y, x, batch, scale, columns, *factors)

    def head(self, head: nn.Module, _frozen: bool) -> StackedHead:
        """All clients at once."""
        return vmap(partial(functional_call, head))

    def optimizer_rows(self, part: Tensor) -> list[Tensor]:
        """All clients at once."""
        return [part]

    def chunk_tokens(self, given: int | None, _token_floats: float = 0.0) -> int:
        """Enough to be busy for as long as the host takes to say what comes next."""
        return given or 32768

    def workers(self) -> int:
        """One chunk, whatever the host's threads."""
        return 1


class SlowBackend(Backend):
    """For debugging: the model's own code, one client after another, nothing prepacked or fused."""

    packs = False

    def prepack_outputs(self, _model: Any) -> None:
        """As they are."""

    def chunk_tokens(self, _given: int | None, _token_floats: float = 0.0) -> int:
        """One client at a time, and in evaluation one text."""
        return 1

    def workers(self) -> int:
        """One client after another."""
        return 1


BACKENDS: dict[str, type[Backend]] = {
    "kernels": KernelBackend,
    "operators": Backend,
    "accelerator": AcceleratorBackend,
    "slow": SlowBackend,
}


def fastest(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest backend for a device and a type, by its name."""
    if device.type != "cpu":
        return "accelerator"
    return "kernels" if compiled.kernels(dtype) else "operators"


def build_backend(device: torch.device, dtype: torch.dtype, name: str | None = None) -> Backend:
    """The backend of this name, or else the fastest.

    Raises:
        ValueError: There is no backend of this name, or not on this machine.
    """
    return lookup(BACKENDS, name or fastest(device, dtype), "backend")(device, dtype)


def _client_by_client(head: nn.Module, parts: dict[str, Tensor], features: Tensor) -> Tensor:
    """Few rows are multiplied otherwise than many."""
    own = [{name: part[i] for name, part in parts.items()} for i in range(len(features))]
    return torch.stack([functional_call(head, *call) for call in zip(own, features, strict=True)])


def _all_rows(head: nn.Module, _parts: dict[str, Tensor], features: Tensor) -> Tensor:
    """The rows of all clients through one head."""
    return head(features.flatten(0, 1)).unflatten(0, features.shape[:2])  # type: ignore[no-any-return]
