"""Ranks of clients, as they are given: a few numbers that are dealt by turns, or a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from plait.machine.text_files import read_text


@lru_cache(maxsize=8)
def listed(ranks: str) -> tuple[int, ...]:
    """The numbers of `4,8,16`.

    Raises:
        ValueError: It is something else.
    """
    found = [int(word) if word.strip().isdecimal() else 0 for word in ranks.split(",")]
    if min(found) < 1:
        raise ValueError(
            f"ranks is {ranks!r:.80}; write whole numbers above 0, 4,8,16, or name a file that has "
            "one on each line."
        )
    return tuple(found)


def read_ranks(given: str | int | Sequence[int]) -> tuple[int, ...]:
    """The numbers of `4,8,16`, of a file that has them on lines, or as they are.

    Raises:
        ValueError: They are none, or the file can't be read as text.
        OSError: It can't be read.
    """
    if not isinstance(given, str):
        given = ",".join(map(str, given if isinstance(given, Sequence) else (given,)))
    if not any(character.isalpha() or character in "/._" for character in given):
        return listed(given)  # not a path, and perhaps too long for one
    path = Path(given)
    if not path.is_file():
        return listed(given)
    try:
        return listed(",".join(read_text(path).replace(",", " ").split()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
