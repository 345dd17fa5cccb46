"""Plugins: Python files of one's own that add rows to the tables, read before names are looked up.

A run keeps the paths of its plugins among its settings, so whoever carries it out or goes on with
it, in whichever process, reads them again.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def plugin_files(names: str | None) -> list[Path]:
    """The whole paths of some files, given with commas.

    Example:
        >>> [path.name for path in plugin_files("mine.py, ours/theirs.py")]
        ['mine.py', 'theirs.py']
    """
    parts = [part.strip() for part in (names or "").split(",")]
    return [Path(part).expanduser().resolve() for part in parts if part]


def load_plugins(names: str | None) -> None:
    """Run each file, once in a process.

    Args:
        names: Paths of Python files with commas, such as `my_methods.py`; or None.

    Raises:
        ValueError: There is no such file, or it can't be run; with its own words.
    """
    for path in plugin_files(names):
        name = f"plait_plugin:{path}"
        if name not in sys.modules:
            _run(path, name)


def _run(path: Path, name: str) -> None:
    if not path.is_file():
        raise ValueError(f"There is no plugin {path}; give --plugin a Python file.")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"The plugin {path} is not a Python file; its name must end in .py.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"The plugin {path} fails: {type(error).__name__}: {error}") from error
