"""Named experiments: each is a function that returns a complete config (`--preset NAME`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from plait.config import Config
from plait.names import lookup


@dataclass(frozen=True)
class PresetRow:
    """A line of `PRESETS`: how to build the config, and what it is in one line."""

    build: Callable[[], Config]
    summary: str


def _demo() -> Config:
    return Config(task="demo", label_skew="dirichlet:0.5", topology="pairs", p=0.1)


def _smoke() -> Config:
    return Config(
        task="demo",
        label_skew="iid",
        topology="ring",
        clients=3,
        rounds=2,
        switch_every=1,
        local_steps=1,
        batch_size=2,
        max_length=32,
        top_layers=1,
        eval_rows=20,
    )


def _paper() -> Config:
    # arXiv 2511.18291 by way of method.md. The published lr is searched for each method:
    # `plait compare --preset paper --lr-grid 5e-4,1e-3,2e-3,5e-3`.
    return Config(
        method="adf",
        switch_every=5,
        rounds=150,
        task="sst2",
        max_length=128,
        clients=10,
        label_skew="paper",
        backbone="roberta-large",
        pooling="model",
        head="frozen",
        rank=8,
        alpha=16.0,
        lora_dropout=0.1,
        target_modules="query,value",
        local_steps=20,
        batch_size=32,
        lr=1e-3,
        weight_decay=0.0,
        topology="pairs",
        p=0.1,
        eval_every=10,
    )


PRESETS: dict[str, PresetRow] = {
    "demo": PresetRow(_demo, "The paper's experiment in small: embedded model and text, minutes"),
    "smoke": PresetRow(_smoke, "Three clients, two rounds of one step: does it run at all?"),
    "paper": PresetRow(_paper, "ADF-LoRA's published protocol: RoBERTa-large, SST-2, 150 rounds"),
}


def build_preset(name: str) -> Config:
    """The config of a preset.

    Raises:
        ValueError: There is no such preset; the message has the nearest names.

    Example:
        >>> build_preset("paper").rounds
        150
    """
    return lookup(PRESETS, name, "preset").build()
