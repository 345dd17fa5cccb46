"""plait: decentralized federated fine-tuning with LoRA."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.config import Config as Config
    from plait.config import Machine as Machine
    from plait.experiments.comparison import compare as compare
    from plait.experiments.comparison import conclude as conclude
    from plait.experiments.plan import Plan as Plan
    from plait.peers.participant import join as join
    from plait.presets import build_preset as build_preset
    from plait.runs.loggers import logged as logged
    from plait.runs.run import Run as Run
    from plait.runs.run_folder import load_run as load_run
    from plait.runs.trained import load as load
    from plait.runs.trained import load_base as load_base
    from plait.runs.trainer import Trainer as Trainer

_PLACES = {
    "Config": "plait.config",
    "Machine": "plait.config",
    "Plan": "plait.experiments.plan",
    "Run": "plait.runs.run",
    "Trainer": "plait.runs.trainer",
    "build_preset": "plait.presets",
    "compare": "plait.experiments.comparison",
    "conclude": "plait.experiments.comparison",
    "join": "plait.peers.participant",
    "load": "plait.runs.trained",
    "load_base": "plait.runs.trained",
    "load_run": "plait.runs.run_folder",
    "logged": "plait.runs.loggers",
}

__all__ = [
    "Config",
    "Machine",
    "Plan",
    "Run",
    "Trainer",
    "build_preset",
    "compare",
    "conclude",
    "join",
    "load",
    "load_base",
    "load_run",
    "logged",
]


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `plait --help` needs none of it."""
    if name not in _PLACES:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    """What there is to use; most of it is not imported yet."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
