"""A PEFT model of somebody's own as a client's row: what it has, whether it fits, there and back.

A parameter's *plain name* is the one that it has in the model without PEFT: plait's layouts and
adapters know it by that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from plait.factors import VALUE, Factor
from plait.lora import Layout, resized, values
from plait.model.backbone import Backbone
from plait.model.loading import hash_of_weights

PREFIX = "base_model.model."
LETTERS = {Factor.A: "lora_A", Factor.B: "lora_B"}
EXACT = (torch.float32, torch.float64)
"""Types that a factor comes back from as it was."""


class ClientModel:
    """The parameters of a PEFT model that are a client's state.

    Attributes:
        model: The model.
    """

    def __init__(self, model: Any, backbone: Backbone, rank: int | None = None) -> None:
        """Find them.

        Args:
            model: With LoRA, as the run has it, on the model that the run has.
            backbone: The run's.
            rank: The client's; the run's if not given.

        Raises:
            ValueError: The model is another one, or something trains that would not travel; what
                to change.
        """
        if backbone.layout.base_rank or backbone.layout.notes:
            raise ValueError(
                "The method keeps more than A and B, which a training loop of one's own doesn't."
            )
        self.model, self._backbone = model, backbone
        self._layout = backbone.layout.of_rank(rank or backbone.layout.rank)
        adapter = _adapter(model)
        _check_layers(_layers(model, adapter), adapter, self._layout)
        named = dict(model.named_parameters())
        own = {_plain(name, adapter): parameter for name, parameter in named.items()
               if ".original_module." not in name}  # fmt: skip
        self._parts = {
            factor: [own[name] for name in _names(factor, backbone, adapter)]
            for factor in backbone.layout.factors
        }
        self._kept = {name: own[name] for name in backbone.kept}
        self._check_types()
        self._check_trained(own)
        _check_base(named, adapter, backbone)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The blocks that it has."""
        return tuple(self._parts)

    def parameters(self, factors: Factor) -> list[nn.Parameter]:
        """The parameters of some factors, in the layout's order."""
        chosen = (parts for factor, parts in self._parts.items() if factor in factors)
        return [part for parts in chosen for part in parts]

    def train(self, factors: Factor) -> None:
        """Let these factors alone take gradients, and forget those of the round before."""
        for factor, parts in self._parts.items():
            for part in parts:
                part.requires_grad_(factor in factors)
                part.grad = None

    def row(self, factor: Factor) -> Tensor:
        """(1, P) float32, a factor as the model has it now, as a row of the largest rank."""
        flat = [part.detach().flatten().cpu() for part in self._parts[factor]]
        row = {(VALUE, factor): torch.cat(flat).float()[None].to(self._backbone.device)}
        return resized(self._layout, row, self._backbone.layout.rank)[VALUE, factor]

    @torch.no_grad()
    def take(self, rows: Mapping[Factor, Tensor]) -> None:
        """Put a state, factor -> (1, P), into the model, and what all have drawn alike."""
        for name, parameter in self._kept.items():
            parameter.copy_(self._backbone.kept[name])
        whole = {(VALUE, factor): row for factor, row in rows.items()}
        own = values(resized(self._backbone.layout, whole, self._layout.rank))
        for factor, parts in self._parts.items():
            views = self._layout.views(factor, own[factor])
            for part, value in zip(parts, views.values(), strict=True):
                part.copy_(value[0])

    def _check_types(self) -> None:
        found = {part.dtype for part in self.parameters(~Factor.NONE)} - {*EXACT}
        if found:
            raise ValueError(
                f"The model's adapters are {found.pop()}, which factors don't come back from as "
                "they were; keep them in float32, as peft does by default (autocast_adapter_dtype)."
            )

    def _check_trained(self, own: Mapping[str, nn.Parameter]) -> None:
        """That nothing else trains: it would differ from peer to peer, unmixed."""
        known = {id(part) for part in self.parameters(~Factor.NONE)}
        others = [name for name, one in own.items() if one.requires_grad and id(one) not in known]
        if others:
            raise ValueError(
                f"{_few(others)} of the model would train and is no part of what the federation "
                "shares: freeze it (requires_grad_(False)), leave it out of modules_to_save, or "
                'for a classifier put head = "mixed" under [run] of federation.toml.'
            )


def _adapter(model: Any) -> str:
    """The name of the model's one adapter, which is a LoRA."""
    config = getattr(model, "peft_config", {}) if isinstance(model, PeftModel) else {}
    if [str(one.peft_type.value) for one in config.values()] != ["LORA"]:
        raise ValueError(
            f"The model, a {type(model).__name__}, doesn't have exactly one adapter, a LoRA: take "
            "peer.model(), or peft's get_peft_model(yours, peer.lora_config())."
        )
    return str(next(iter(config)))


def _layers(model: Any, adapter: str) -> dict[str, Any]:
    """Plain name -> layer that has the adapter, in the model's order."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    }


def _check_layers(layers: Mapping[str, Any], adapter: str, layout: Layout) -> None:
    """That the same layers are adapted, with the client's rank and the same scale."""
    remedy = "make the adapter with peer.lora_config()"
    sites = {site.name for site in layout.sites}
    said = [
        f"{how} {_few(sorted(names))}"
        for how, names in (
            ("adapts", layers.keys() - sites),
            ("doesn't adapt", sites - layers.keys()),
        )
        if names
    ]
    if said:
        raise ValueError(f"The model {' and '.join(said)}, unlike the federation: {remedy}.")
    for name, layer in layers.items():
        rank, scale = layer.r[adapter], layer.scaling[adapter]
        if rank != layout.rank or not math.isclose(scale, layout.scale):
            raise ValueError(
                f"{name} has rank {rank} and alpha {scale * rank:g}, in the federation it has rank "
                f"{layout.rank} and alpha {layout.scale * layout.rank:g}: {remedy}."
            )


def _names(factor: Factor, backbone: Backbone, adapter: str) -> Iterator[str]:
    """The plain names of a factor's parameters, in the layout's order."""
    for name in backbone.layout.shapes(factor):
        yield name if factor is Factor.HEAD else f"{name}.{LETTERS[factor]}.{adapter}.weight"


def _plain(name: str, adapter: str) -> str:
    for part in (".base_layer.", ".original_module.", f".modules_to_save.{adapter}."):
        name = name.replace(part, ".")
    return name.removeprefix(PREFIX)


def _check_base(named: Mapping[str, nn.Parameter], adapter: str, backbone: Backbone) -> None:
    """That the frozen weights are the run's; of those in few bits nothing can be told."""
    base = {
        _plain(name, adapter): parameter
        for name, parameter in named.items()
        if ".lora_" not in name and f".modules_to_save.{adapter}." not in name
    }
    counted = [p for name, p in base.items() if name.rpartition(".")[0] not in backbone.drawn]
    if not all(parameter.is_floating_point() for parameter in counted):
        return
    if hash_of_weights(counted) != backbone.weights_hash:
        raise ValueError(
            f"The frozen weights of the model aren't those of {backbone.name}, which the "
            "federation trains; load it from there, or take peer.model()."
        )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
