"""Looking a name up in one of the tables, with help when it isn't there."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

Row = TypeVar("Row")


def lookup(table: Mapping[str, Row], name: str, kind: str) -> Row:
    """`table[name]`, or a `ValueError` that lists the nearest names.

    Args:
        table: A table such as `METHODS`.
        name: The name that the user gave.
        kind: What the table holds, for the message, such as `"method"`.

    Example:
        >>> lookup({"ring": 1}, "rnig", "topology")
        Traceback (most recent call last):
        ValueError: Unknown topology 'rnig'. Did you mean ring?
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(table)}."
    raise ValueError(f"Unknown {kind} {name!r}. {hint}")
