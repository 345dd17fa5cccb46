"""What is kept of a config for the next call, for as long as the files that it names are the same.

A notebook's process lives on while files change; `functools.lru_cache` would go on with the old.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

Made = TypeVar("Made", bound=Callable[..., Any])
NAMES = ("train_file", "dev_file", "edges_file", "backbone")
"""The settings that may name a file or a folder."""


def kept(most: int) -> Callable[[Made], Made]:
    """A decorator: keep the last `most` results of a function whose first argument is a config."""

    def decorate(make: Made) -> Made:
        @lru_cache(maxsize=most)
        def known(_state: Hashable, config: Any, *more: Any) -> Any:
            return make(config, *more)

        @wraps(make)
        def found(config: Any, *more: Any) -> Any:
            return known(file_state(config), config, *more)

        return cast("Made", found)

    return decorate


def file_state(config: Any) -> tuple[tuple[str, int, int, int], ...]:
    """Path, inode, size and time of change, in nanoseconds, of each file that a config names."""
    named = [getattr(config, name) for name in NAMES]
    places = [Path(one) for one in named if one]
    files = [file for place in places for file in (place, *_inside(place)) if file.is_file()]
    states = [(str(file), file.stat()) for file in files]
    return tuple((name, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in states)


def _inside(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.is_dir() else []
