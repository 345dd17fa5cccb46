"""The forward pass of any architecture: the model's own code, with LoRA added by hooks.

Texts of all clients go through the frozen model together, padded within groups of similar
length; a hook on each adapted layer adds the branch of the client that each text belongs to.
Slower than packed.py where that applies, and the twin that it is compared with.

Legend: R_g texts of a group, L_g its longest, n clients, d the model's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plait.lora import Dropout, Site, branch
from plait.tokens import Batch


class HookedEncoder:
    """`base(...)` for the texts of n clients at once."""

    def __init__(self, model: Any, base: Any, sites: tuple[Site, ...], scale: float) -> None:
        """Hook the adapted layers of `model`; `base` is its encoder."""
        self.base = base
        self.scale = scale
        self.has_types = getattr(base.config, "type_vocab_size", 0) > 1
        self.pad_id = base.config.pad_token_id or 0
        self._of_text: dict[str, tuple[Tensor, Tensor]] = {}
        self._keep: Callable[[str, Tensor], Tensor] | None = None
        for site in sites:
            model.get_submodule(site.name).register_forward_hook(self._hook(site.name))

    def _hook(self, name: str) -> Any:
        def add_branch(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            A, B = self._of_text[name]
            x = inputs[0] if self._keep is None else inputs[0] * self._keep(name, inputs[0])
            return output + branch(x, A, B, self.scale)

        return add_branch

    def __call__(
        self, batch: Batch, A: dict[str, Tensor], B: dict[str, Tensor], dropout: Dropout | None
    ) -> Tensor:
        """The last hidden state (T, d), as `PackedEncoder.__call__`."""
        texts_per_client = len(batch.lengths) // batch.num_clients
        ids = torch.cat([batch.ids, batch.ids.new_tensor([self.pad_id])])
        types = torch.cat([batch.types, batch.types.new_tensor([0])])
        places = batch.by_text.index.split([mask.numel() for _, mask in batch.groups])
        outputs = []
        for (texts, mask), index in zip(batch.groups, places, strict=True):
            client = texts // texts_per_client
            self._of_text = {name: (A[name][client], B[name][client]) for name in A}
            self._keep = dropout and _arranged(dropout, index, mask)
            kinds = {"token_type_ids": types[index].view_as(mask)} if self.has_types else {}
            hidden = self.base(
                input_ids=ids[index].view_as(mask), attention_mask=mask.long(), **kinds
            ).last_hidden_state
            outputs.append(hidden.flatten(0, 1))
        return torch.cat(outputs).index_select(0, batch.by_text.inverse)


def _arranged(dropout: Dropout, index: Tensor, mask: Tensor) -> Dropout:
    """The packed dropout mask (T, d) in a group's rectangle (R_g, L_g, d)."""

    def keep(name: str, x: Tensor) -> Tensor:
        packed = functional.pad(dropout(name, x), (0, 0, 0, 1))
        return packed[index].view(*mask.shape, -1)

    return keep
