"""Docstrings here say `Example:`, and mkdocstrings sets doctests as code under `Examples:` only."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExamplesSection(griffe.Extension):
    """Reads the one as the other."""

    def on_object(self, *, obj: griffe.Object, **_others: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
