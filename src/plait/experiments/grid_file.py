"""A sweep's file and the settings in it; reading these takes no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.config import Config, Machine, names_of
from plait.presets import as_settings, changed, read_settings, start_from

NOT_SHARED = ("method", "seed", "lr", "eval_split")
"""Settings that are of a run, not of a comparison."""


def read_grid(file: Path, plugin: str | None = None) -> tuple[dict[str, Any], Config, Machine]:
    """The tables of a sweep's file, and the settings that all its runs share.

    Args:
        file: TOML.
        plugin: The setting of this name, in the place of the file's.

    Raises:
        ValueError: The settings can't be; the message has the file and the fix.
        OSError: It can't be read.
    """
    values = read_settings(file)
    try:
        settings = values.get("settings", {}) | ({"plugin": plugin} if plugin else {})
        return values, *_settings(values, settings)
    except (ValueError, TypeError) as error:
        raise ValueError(as_settings(f"{file}: {error}")) from error


def _settings(values: dict[str, Any], settings: dict[str, Any]) -> tuple[Config, Machine]:
    for name in (*settings, *values.get("axes", {})):
        if name in NOT_SHARED:
            raise ValueError(f"{name} differs between runs; see methods, seeds, lrs and lr_grid.")
    config, machine = start_from(values.get("preset"), None)
    of_machine = {name: settings.pop(name) for name in names_of(Machine) & settings.keys()}
    return changed(config, settings, "settings"), changed(machine, of_machine, "settings")
