"""Named experiments, and configs from files: what a command line starts from.

A preset is a function that returns a complete config (`--preset NAME`); a file (`--config FILE`)
changes some of its settings, and flags change what the file says.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from plait.config import THIS_MACHINE, Config, Machine, names_of
from plait.lookup import lookup
from plait.machine.text_files import read_text

Settings = TypeVar("Settings", Config, Machine)


@dataclass(frozen=True)
class PresetRow:
    """A line of `PRESETS`.

    Attributes:
        build: Makes the config.
        summary: What it is, in one line.
        methods: What `plait compare` compares.
        lrs: Learning rates by method for `plait compare`; the config's own where none is given.
        machine: Where and how fast.
    """

    build: Callable[[], Config]
    summary: str
    methods: str = "adf,dec-lora,ffa,rolora"
    lrs: str = ""
    machine: Machine = THIS_MACHINE


def _demo() -> Config:
    # As much of the published protocol as two cores do in minutes: its topology and phases, on a
    # smaller model of which the upper half is adapted, for fewer and shorter rounds.
    return Config(
        task="demo",
        label_skew="dirichlet:0.5",
        topology="pairs",
        p=0.1,
        rounds=20,
        switch_every=5,
        local_steps=3,
        batch_size=8,
        top_layers=3,
        dtype="auto",
        eval_every=5,
        eval_rows=64,
    )


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
        eval_every=1,
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


def _lm_demo() -> Config:
    # Four domains at four clients. Of texts of 24 tokens a run trains on 4 x 6 x 2 x 4 = 192, and
    # judges one model and at the end five on 48: with SmolLM2 on a core of AVX2 48 s and 42 s, and
    # 17 s to begin. Four methods and a control, two seeds each, are ten runs, two at a time.
    return Config(
        task="snippets",
        backbone="smollm2",
        label_skew="key",
        clients=4,
        topology="ring",
        rounds=6,
        switch_every=2,
        local_steps=2,
        batch_size=4,
        max_length=64,
        dtype="auto",
        lr=3e-3,
        eval_every=100,
    )


def _flowertune(backbone: str, train_file: str, clients: int) -> Config:
    # The FlowerTune leaderboard's protocol (Flower 77068b8) as OpenFedLLM's (14c6af2) set it, whose
    # server asks a tenth of the clients in each round; here all train, and meet in random pairs.
    return Config(
        task="chat",
        train_file=train_file,
        backbone=backbone,
        label_skew="iid",
        clients=clients,
        rounds=200,
        local_steps=10,
        batch_size=16,
        max_length=512,
        rank=32,
        alpha=64.0,
        dtype="auto",
        load_in="4bit",
        lr=5e-5,
        lr_schedule="cosine",
        lr_end=1e-6,
        eval_rows=256,
    )


_GENERAL = "vicgalle/alpaca-gpt4"


def _openfedllm() -> Config:
    # It takes 20,000 of the rows, and the base in 8 bits.
    general = _flowertune("meta-llama/Llama-2-7b-hf", _GENERAL, 20)
    return dataclasses.replace(general, client_size=1000, load_in="8bit")


PRESETS: dict[str, PresetRow] = {
    "demo": PresetRow(
        _demo,
        "The paper's experiment in small: embedded model and text, minutes",
        methods="adf,dec-lora,ffa,rolora,local",
        # Found by `plait compare --preset demo --lrs "" --lr-grid 2e-3,5e-3,1e-2`: on validation
        # rows, with a seed that is not reported.
        lrs="adf=5e-3,dec-lora=2e-3,ffa=1e-2,rolora=5e-3,local=2e-3",
    ),
    "smoke": PresetRow(
        _smoke,
        "Three clients, two rounds of one step: does it run at all?",
        # Of 5,000 texts it trains on 12: computing the layers below for all would take longest.
        machine=Machine(cache_gib=0.0),
    ),
    "paper": PresetRow(_paper, "ADF-LoRA's published protocol: RoBERTa-large, SST-2, 150 rounds"),
    "lm-demo": PresetRow(
        _lm_demo,
        "A language model on four domains of text: embedded model and text, minutes",
        methods="adf,dec-lora,ffa,local",
    ),
    "flowertune-general": PresetRow(
        partial(_flowertune, "mistralai/Mistral-7B-v0.3", _GENERAL, 20),
        "FlowerTune's general NLP: Mistral 7B, Alpaca-GPT4 from the hub, 20 clients",
    ),
    "flowertune-finance": PresetRow(
        partial(_flowertune, "mistralai/Mistral-7B-v0.3", "FinGPT/fingpt-sentiment-train", 50),
        "FlowerTune's finance: Mistral 7B, FinGPT's sentiment from the hub, 50 clients",
    ),
    "openfedllm": PresetRow(
        _openfedllm,
        "OpenFedLLM's instruction tuning: Llama 2 7B, Alpaca-GPT4 from the hub, 20 clients",
    ),
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


def start_from(preset: str | None, file: Path | None) -> tuple[Config, Machine]:
    """The settings of a preset, changed by what a file says.

    Args:
        preset: A key of `PRESETS`; the defaults for None.
        file: TOML with keys of `Config` and `Machine`, or a run's `config.json`.

    Raises:
        ValueError: No such preset, or a file that is not what it should be.
        OSError: The file can't be read.
    """
    row = lookup(PRESETS, preset, "preset") if preset else PresetRow(Config, "")
    config, machine = row.build(), row.machine
    return (config, machine) if file is None else both_changed(config, machine, file)


def both_changed(config: Config, machine: Machine, file: Path) -> tuple[Config, Machine]:
    """Both with other values, as a file has them; as `start_from`."""
    values = read_settings(file)
    of_machine = {name: values.pop(name) for name in names_of(Machine) & values.keys()}
    return changed(config, values, str(file)), changed(machine, of_machine, str(file))


def changed(settings: Settings, values: dict[str, Any], origin: str) -> Settings:
    """The settings with other values, as a file has them.

    Args:
        settings: What to change.
        values: Setting -> its value.
        origin: Where they come from, for the message.

    Raises:
        ValueError: No such setting, or a value that it can't have.
    """
    hints = get_type_hints(type(settings))
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(
            f"{origin}: Unknown settings: {', '.join(unknown)}. `plait run --help` has all."
        )
    for name, value in values.items():
        if not fits(value, hints[name]):
            kind = str(hints[name]).removeprefix("typing.").removeprefix("<class '").rstrip("'>")
            raise ValueError(f"{origin}: {name} is {value!r}; it must be {kind}.")
    try:
        return dataclasses.replace(settings, **values)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def read_settings(file: Path) -> dict[str, Any]:
    """The top level of a TOML or JSON file.

    Raises:
        ValueError: It is neither, or not a table.
        OSError: It can't be read.
    """
    kind = "JSON" if file.suffix == ".json" else "TOML"
    text = read_text(file)
    try:
        values = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except ValueError as error:  # of either decoder
        raise ValueError(f"{file} is not {kind}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f'{file} holds no settings; write {{"rounds": 20}} and so on.')
    return values


def as_settings(message: str) -> str:
    """A message with the flags of `plait run` as files name them, for commands that have none.

    Example:
        >>> as_settings("Lower --lr, or pass --clip-norm 1; see --help.")
        'Lower `lr`, or pass `clip_norm` 1; see --help.'
    """
    known = names_of(Config) | names_of(Machine) | {"out"}
    return re.sub(
        r"--([a-z][a-z-]*[a-z]|p)\b",
        lambda flag: f"`{name}`" if (name := flag[1].replace("-", "_")) in known else flag[0],
        message,
    )


def fits(value: object, hint: Any) -> bool:
    """Whether a value from a file is of the type of a setting; an integer will do for a float."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType) or NoneType in get_args(hint):
        return any(fits(value, one) for one in get_args(hint))
    return type(value) in ((int, float) if hint is float else (hint,))
