"""The forward pass of any model whatever: all of its own code, its head too, client after client.

The other encoders compute hidden states for all clients together, and the head reads the first
token of each text. Some models read elsewhere (ModernBERT the mean, decoders the last token), and
some adapt layers whose inputs aren't texts by tokens (DeBERTa's relative positions). Here a hook
adds one client's branch to whatever an adapted layer sees, as PEFT does.

Legend: n clients, Q places asked, R_g texts of a group, L_g its longest, C outputs.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from plait.data.tokens import Batch
from plait.factors import Factor
from plait.lora import Dropout, Layout
from plait.machine.devices import moved
from plait.model.rectangle_encoder import rectangle, similar_lengths

Grouping = Callable[[Tensor], list[Tensor]]
"""Lengths of texts -> the texts that go through the model together."""


def equal_lengths(lengths: Tensor) -> list[Tensor]:
    """Texts of the same length together, so that nothing is padded."""
    return [(lengths == size).nonzero()[:, 0] for size in lengths.unique().tolist()]


def one_by_one(lengths: Tensor) -> list[Tensor]:
    """Each text alone."""
    return list(torch.arange(len(lengths))[:, None])


GROUPINGS: tuple[Grouping, ...] = (similar_lengths, equal_lengths, one_by_one)
"""From the fastest to the one that any model takes."""


class _Now(threading.local):
    """What the hooks add in the group that this thread computes; nothing where there is none."""

    branches: dict[str, tuple[Tensor, Tensor]] | None = None
    keep: Dropout | None = None


class OwnForward:
    """`model(...)` with each client's branches and head.

    Attributes:
        group: Which texts go through the model together.
    """

    padded = False  # as PackedEncoder has them
    below = None

    def __init__(self, model: Any, layout: Layout) -> None:
        """Hook the adapted layers of `model`."""
        self.model, self.layout = model, layout
        self.has_types = getattr(model.config, "type_vocab_size", 0) > 1
        self.pad_id = getattr(model.config, "pad_token_id", None) or 0
        self.group: Grouping = one_by_one
        self._takes = inspect.signature(model.forward).parameters  # FNet's takes no mask
        self._now = _Now()
        self._lock = threading.Lock() if layout.head else nullcontext()  # parameters are swapped
        self._hooks = [
            model.get_submodule(site.name).register_forward_hook(self._hook(site.name))
            for site in layout.sites
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def add_branch(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._now.branches is None:
                return output
            (A, B), keep = self._now.branches[name], self._now.keep
            x = inputs[0] if keep is None else inputs[0] * keep(name, inputs[0])
            low = functional.linear(x, A.to(x.dtype)) * self.layout.scale
            return output + functional.linear(low, B.to(x.dtype))

        return add_branch

    def __call__(
        self,
        batch: Batch,
        A: Tensor,
        B: Tensor,
        heads: dict[str, Tensor],
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Logits (Q, C), client after client.

        Args:
            batch: b texts of each of n clients.
            A: (n, P) their A factors.
            B: (n, P) their B factors.
            heads: The parameters of the heads that train, by name (n, ...).
            dropout: The LoRA branches' dropout.
        """
        all_A, all_B = self.layout.views(Factor.A, A), self.layout.views(Factor.B, B)
        lengths = torch.from_numpy(batch.sizes)
        starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view(lengths.shape)
        logits = []
        for client in range(batch.num_clients):
            self._now.branches = {
                name: (A[client], all_B[name][client]) for name, A in all_A.items()
            }
            head = {name: value[client] for name, value in heads.items()}
            try:
                logits.append(self._client(batch, starts[client], lengths[client], head, dropout))
            finally:
                self._now.branches = None
        return torch.cat(logits)

    def _client(
        self,
        batch: Batch,
        starts: Tensor,
        lengths: Tensor,
        head: dict[str, Tensor],
        dropout: Dropout | None,
    ) -> Tensor:
        """(C,) for each place asked in one client's texts."""
        device = batch.ids.device
        asked = torch.zeros(len(batch.ids) + 1, dtype=torch.bool, device=device)
        asked[batch.asked] = True
        ids = torch.cat([batch.ids, batch.ids.new_tensor([self.pad_id])])
        types = torch.cat([batch.types, batch.types.new_tensor([0])])
        found, order = [], []
        for texts in self.group(lengths):
            places, mask = rectangle(starts[texts], lengths[texts], len(batch.ids))
            index = moved(places, device)
            self._now.keep = dropout and _where_it_fits(dropout, index)
            kinds = {"token_type_ids": types[index]} if self.has_types else {}
            inputs = {"input_ids": ids[index], "attention_mask": moved(mask.long(), device)} | kinds
            taken = {name: value for name, value in inputs.items() if name in self._takes}
            with self._lock:
                logits = functional_call(self.model, head, (), taken).logits
            order.append(index[asked[index]])
            found.append(logits if logits.dim() == 2 else logits[asked[index]])  # of texts, tokens
        return torch.cat(found)[torch.cat(order).argsort()]


def _where_it_fits(dropout: Dropout, index: Tensor) -> Dropout:
    """The packed dropout mask (T, d) for a layer that sees the group's tokens (R_g, L_g) somehow.

    Text by text, token by token (XLNet), or in a row (mixtures of experts).
    """

    def keep(name: str, x: Tensor) -> Tensor:
        for place in (index, index.T, index.flatten()):
            if x.shape[:-1] == place.shape:
                return functional.pad(dropout(name, x), (0, 0, 0, 1))[place]
        raise ValueError(
            f"lora_dropout isn't supported at {name}, whose inputs aren't tokens of the texts; "
            "set --lora-dropout 0, or name other layers with --target-modules."
        )

    return keep
