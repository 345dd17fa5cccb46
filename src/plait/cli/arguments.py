"""From what was typed to settings: what several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from plait.config import Config, Machine
from plait.presets import start_from

Command = TypeVar("Command")
Flag = tyro.conf.FlagCreatePairsOff[bool]
Names = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the settings of a command come from."""

    settings: tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[Config]]
    machine: tyro.conf.OmitArgPrefixes[Machine]
    preset: str | None = None
    """Start from a named experiment; `plait presets` lists them. Other flags change it."""
    config: Path | None = None
    """Start from a TOML file, or from a run's config.json. Other flags change it."""


def defaults(args: Sequence[str]) -> dict[str, Any]:
    """The `settings` and `machine` that a command line starts from: its preset, then its file.

    Example:
        >>> defaults(["--preset", "paper"])["settings"].rounds
        150
    """
    given = start_of(args)
    config, machine = start_from(given.preset, given.config)
    return {"settings": config, "machine": machine}


def start_of(args: Sequence[str]) -> argparse.Namespace:
    """`--preset` and `--config` of a command line, before anything else is read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", type=Path)
    given, _ = parser.parse_known_args(args)
    return given


def parse(
    kind: type[Command], name: str, args: Sequence[str], default: Command | None = None
) -> Command:
    """The options of a command from its words; tyro ends the process where they are wrong."""
    start = tyro.MISSING_NONPROP if default is None else default
    return tyro.cli(kind, prog=f"plait {name}", args=args, default=start)


def say_preparing(config: Config) -> None:
    """The first word on the screen: importing what computes and loading a model take a while."""
    print(f"preparing: {config.task}, {config.clients} clients, {config.backbone} ...", flush=True)


def split(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]
