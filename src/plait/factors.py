"""The blocks that a client's state is made of."""

from __future__ import annotations

from enum import Flag


class Factor(Flag):
    """A block of a client's trainable state: the LoRA factors of W0 + (alpha/r) B A, the head."""

    NONE = 0
    A = 1
    B = 2
    HEAD = 4
    AB = A | B


A, B, AB, NONE = Factor.A, Factor.B, Factor.AB, Factor.NONE
