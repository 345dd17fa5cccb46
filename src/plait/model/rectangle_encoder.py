"""The forward pass of any architecture: the model's own code, with LoRA added by hooks.

Texts of all clients go through the frozen model together, padded within groups of similar
length; a hook on each adapted layer adds the branch of the client that each text belongs to.
Slower than packed_encoder.py where that applies, and the twin that it is compared with.

Legend: R_g texts of a group, L_g its longest, n clients, d the model's width.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plait.data.tokens import Batch
from plait.factors import Factor
from plait.lora import Dropout, Layout, branch
from plait.machine.devices import moved


class _Now(threading.local):
    """What the hooks add in the group that this thread computes: the texts' branches, dropout."""

    of_text: dict[str, tuple[Tensor, Tensor]]
    keep: Dropout | None


class RectangleEncoder:
    """`base(...)` for the texts of n clients at once."""

    padded = False  # as PackedEncoder has them
    below = None

    def __init__(self, model: Any, base: Any, layout: Layout) -> None:
        """Hook the adapted layers of `model`; `base` is its encoder."""
        self.base = base
        self.layout = layout
        self.has_types = getattr(base.config, "type_vocab_size", 0) > 1
        self.pad_id = getattr(base.config, "pad_token_id", None) or 0
        self._now = _Now()
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
            A, B = self._now.of_text[name]
            keep = self._now.keep
            x = inputs[0] if keep is None else inputs[0] * keep(name, inputs[0])
            return output + branch(x, A, B, self.layout.scale)

        return add_branch

    def __call__(
        self, batch: Batch, A: Tensor, B: Tensor, dropout: Dropout | None, asked_only: bool
    ) -> Tensor:
        """The last hidden state (T, d) or (Q, d), as `PackedEncoder.__call__`."""
        all_A, all_B = self.layout.views(Factor.A, A), self.layout.views(Factor.B, B)
        num_texts, device = batch.sizes.shape[1], batch.ids.device
        lengths = torch.from_numpy(batch.sizes.ravel())  # worked out on the host, which won't wait
        starts = lengths.cumsum(0) - lengths
        ids = torch.cat([batch.ids, batch.ids.new_tensor([self.pad_id])])
        types = torch.cat([batch.types, batch.types.new_tensor([0])])
        hidden = []
        places = []
        for texts in similar_lengths(lengths):
            places_here, mask = rectangle(starts[texts], lengths[texts], len(batch.ids))
            real = moved(mask.flatten().nonzero()[:, 0], device)
            index, client = moved(places_here, device), moved(texts // num_texts, device)
            self._now.of_text = {name: (all_A[name][client], all_B[name][client]) for name in all_A}
            self._now.keep = dropout and _in_rectangle(dropout, index)
            kinds = {"token_type_ids": types[index]} if self.has_types else {}
            attended = moved(mask.long(), device)
            out = self.base(input_ids=ids[index], attention_mask=attended, **kinds)
            hidden.append(out.last_hidden_state.flatten(0, 1)[real])
            places.append(places_here[mask])
        packed = torch.cat(hidden)[moved(torch.cat(places).argsort(), device)]
        return packed[batch.asked] if asked_only else packed


def similar_lengths(lengths: Tensor, waste: float = 0.1, least: int = 16) -> list[Tensor]:
    """Texts in groups, by length: a group closes when padding would exceed a share `waste` of it.

    Groups have at least `least` texts, since a rectangle of few texts costs more in calls than
    it saves in padding.
    """
    groups: list[list[int]] = []
    room = used = 0
    for text in lengths.argsort(descending=True, stable=True).tolist():
        size = int(lengths[text])
        longest = int(lengths[groups[-1][0]]) if groups else 0
        full = bool(groups) and len(groups[-1]) >= least
        if not groups or (full and used + size < (1 - waste) * (room + longest)):
            groups.append([])
            room, used, longest = 0, 0, size
        groups[-1].append(text)
        room, used = room + longest, used + size
    return [torch.tensor(group) for group in groups]


def rectangle(starts: Tensor, lengths: Tensor, none: int) -> tuple[Tensor, Tensor]:
    """(R_g, L_g) places of the texts' tokens, `none` where none is, and where one is."""
    columns = torch.arange(int(lengths.max()))
    mask = columns < lengths[:, None]
    return torch.where(mask, starts[:, None] + columns, none), mask


def _in_rectangle(dropout: Dropout, index: Tensor) -> Dropout:
    """The packed dropout mask (T, d) in a group's rectangle (R_g, L_g, d)."""

    def keep(name: str, x: Tensor) -> Tensor:
        return functional.pad(dropout(name, x), (0, 0, 0, 1))[index]

    return keep
