"""Gradient checkpointing: layers that are computed again in the backward pass, to save memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

Context = Callable[[], AbstractContextManager[None]]
"""Makes again what a layer's code finds around it, in whichever thread the backward pass is."""


def checkpointed_layers(base: nn.Module) -> list[nn.Module]:
    """The layers of an encoder that can be computed again; none within another."""
    layers = [one for one in base.modules() if isinstance(one, GradientCheckpointingLayer)]
    inner = {part for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if layer not in inner]


def checkpoint_where(layer: nn.Module, around: Callable[[], Context | None]) -> None:
    """Have a layer keep nothing but its input for the backward pass, whenever `around` says so.

    Args:
        layer: The layer.
        around: What is around the layer now; None where it keeps what it computes.
    """
    forward: Callable[..., Any] = layer.forward

    @wraps(forward)
    def kept_or_not(*args: Any, **kwargs: Any) -> Any:
        again = around() if torch.is_grad_enabled() else None
        if again is None:
            return forward(*args, **kwargs)
        contexts = nullcontext(), again()
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: contexts, **kwargs,
        )  # fmt: skip

    layer.forward = kept_or_not
