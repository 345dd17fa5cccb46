"""Libraries that take long to import, imported when something of them is first used.

    from plait.later import Tensor, torch

So whatever only lists or refuses needs none of them. What is read for that says `Tensor` in types
only, for which a name is enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Tensor", "functional", "networkx", "torch"]

if TYPE_CHECKING:
    import networkx
    import torch
    from torch import Tensor
    from torch.nn import functional
else:
    from importlib import import_module

    class _Later:
        """A module that is imported when it is first asked for something."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            value = getattr(import_module(self._name), name)
            setattr(self, name, value)  # the next time it is at hand
            return value

    torch, functional = _Later("torch"), _Later("torch.nn.functional")
    networkx = _Later("networkx")
    Tensor = "torch.Tensor"
