"""plait: decentralized federated fine-tuning with LoRA."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.comparison import compare as compare
    from plait.comparison import conclude as conclude
    from plait.config import Config as Config
    from plait.export import load_base as load_base
    from plait.loggers import logged as logged
    from plait.plan import Plan as Plan
    from plait.presets import build_preset as build_preset
    from plait.runs import load_run as load_run
    from plait.runs import run as run
    from plait.trainer import Trainer as Trainer

_PLACES = {
    "Config": "plait.config",
    "Plan": "plait.plan",
    "Trainer": "plait.trainer",
    "build_preset": "plait.presets",
    "compare": "plait.comparison",
    "conclude": "plait.comparison",
    "load_base": "plait.export",
    "load_run": "plait.runs",
    "logged": "plait.loggers",
    "run": "plait.runs",
}

__all__ = [
    "Config",
    "Plan",
    "Trainer",
    "build_preset",
    "compare",
    "conclude",
    "load_base",
    "load_run",
    "logged",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `plait --help` needs none of it."""
    if name not in _PLACES:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
