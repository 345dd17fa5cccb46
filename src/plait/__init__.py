"""plait: decentralized federated fine-tuning with LoRA."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.config import Config as Config
    from plait.export import load_base as load_base
    from plait.runs import load_run as load_run
    from plait.runs import run as run

_PLACES = {
    "Config": "plait.config",
    "load_base": "plait.export",
    "load_run": "plait.runs",
    "run": "plait.runs",
}

__all__ = ["Config", "load_base", "load_run", "run"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `plait --help` needs none of it."""
    if name not in _PLACES:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
