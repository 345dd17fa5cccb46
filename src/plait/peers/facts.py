"""The facts in a peer's answer: a few words and numbers of somebody else, believed no further.

They end in a terminal, a log, Prometheus and comparisons of rounds. So they are looked at once,
where they come in: numbers are finite and of 53 bits, text is plain, and what has a name here is
what that name says. Whoever shows them needs no check of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, cast

from plait.peers.refusals import Reason, Refused, plain

MOST_TEXT = 2000
LARGEST = 1 << 53
"""Beyond it a float is no count any more."""


def read_facts(text: str) -> dict[str, Any]:
    """The facts of an answer.

    Raises:
        Refused: They are no JSON object, or one of them can't be.
    """
    try:
        facts = json.loads(text, parse_int=_int, parse_float=_float, parse_constant=_float)
        facts = _plain(facts)
    except (ValueError, RecursionError) as error:
        raise Refused(Reason.MALFORMED, f"the facts are not JSON: {error!s:.100}") from None
    if not isinstance(facts, dict):
        raise Refused(Reason.MALFORMED, "the facts are not a JSON object")
    for name in FACTS.keys() & facts.keys():
        if not FACTS[name](facts[name]):
            raise Refused(Reason.MALFORMED, f"{name} can't be {facts[name]!r:.80}")
    return cast("dict[str, Any]", facts)


def _int(digits: str) -> int:
    if len(digits) > len(str(LARGEST)) or abs(int(digits)) > LARGEST:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text:.20} is no number")
    return number


def _plain(value: Any) -> Any:
    """The same with nothing in its text that a terminal would take for more than text."""
    if isinstance(value, str):
        return plain(value, MOST_TEXT)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {plain(key, MOST_TEXT): _plain(one) for key, one in value.items()}
    return value


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 80


def _are_words(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_word, value))


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(_is_word(k) and _is_count(v) for k, v in value.items())


FACTS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("name", "phase"), _is_word),
    **dict.fromkeys(
        ("round", "rounds", "missing", "sent_bytes", "received_bytes", "members"), _is_count
    ),
    **dict.fromkeys(("time", "up_seconds", "loss", "score"), _is_number),
    **dict.fromkeys(("seen", "refused", "expires"), _are_counts),
    "absent": _are_words,
    "agreed": lambda value: value is None or isinstance(value, bool),
}
"""Name -> whether a value can be of that name; others are shown nowhere."""
