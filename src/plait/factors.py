"""The blocks that a client's state is made of, and the slots that hold them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Flag
from functools import reduce
from operator import or_


class Factor(Flag):
    """A block of a client's state: the LoRA factors of W0 + (alpha/r) B A, the head, and a base.

    What a method has added to W0 itself is (alpha/r) BASE_B BASE_A, and NOTE a few numbers by which
    clients agree; these never train.
    """

    NONE = 0
    A = 1
    B = 2
    HEAD = 4
    AB = A | B
    BASE_A = 8
    BASE_B = 16
    BASE = BASE_A | BASE_B
    NOTE = 32


A, B, AB, NONE = Factor.A, Factor.B, Factor.AB, Factor.NONE
BASE_A, BASE_B, BASE, NOTE = Factor.BASE_A, Factor.BASE_B, Factor.BASE, Factor.NOTE

Slot = tuple[str, Factor]
"""A kind and a factor, such as ("m", A): AdamW's first moment of A. All slots of a factor have its
shape."""

VALUE = "x"
"""The kind of slot that holds a factor itself."""


def public(kind: str) -> str:
    """The kind of slot that holds what others know of one, where not all of it is sent."""
    return f"public-{kind}"


def factors_of(slots: Iterable[Slot]) -> Factor:
    """The factors that have a slot among these."""
    return reduce(or_, (factor for _, factor in slots), NONE)


def factors_name(factors: Factor) -> str:
    """`B`, `AB`, `A|B|HEAD`, or `-` for none."""
    return (factors.name if factors else None) or "-"


def factors_named(name: str) -> Factor:
    """The factors of a `factors_name`."""
    return reduce(or_, (Factor[part] for part in name.split("|") if part != "-"), NONE)


def slots_name(slots: Iterable[Slot]) -> str:
    """Slots by their names: of a value that of its factor; `-` for none.

    Example:
        >>> slots_name([(VALUE, A), (VALUE, B), ("m", B)])
        'AB|m.B'
    """
    slots = list(slots)
    values = factors_of(slot for slot in slots if slot[0] == VALUE)
    others = [slot_name(slot) for slot in slots if slot[0] != VALUE]
    return "|".join([factors_name(values)] * bool(values) + others) or "-"


def slot_name(slot: Slot) -> str:
    """The name of one slot."""
    kind, factor = slot
    return str(factor.name) if kind == VALUE else f"{kind}.{factor.name}"
