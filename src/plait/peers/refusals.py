"""Why a message is not taken: one closed list, said to both sides and counted by reason."""

from __future__ import annotations

from enum import Enum


class Reason(Enum):
    """The reasons for which a peer refuses a message, or gets no answer."""

    MALFORMED = "malformed"
    TOO_LARGE = "too large"
    WRONG_VERSION = "wrong protocol version"
    WRONG_FEDERATION = "wrong federation"
    WRONG_CONFIG = "wrong config"
    WRONG_SENDER = "wrong sender"
    WRONG_RECEIVER = "wrong receiver"
    REVOKED = "revoked certificate"
    NOT_A_NEIGHBOUR = "not a neighbour"
    WRONG_PHASE = "wrong phase"
    STALE_ROUND = "stale round"
    TOO_FAR_AHEAD = "too far ahead"
    REPLAY = "replay"
    WRONG_SHAPE = "wrong shape"
    WRONG_DIGEST = "wrong digest"
    NOT_FINITE = "not finite"
    NORM_TOO_LARGE = "norm too large"
    BUSY = "busy"
    NOT_HERE = "not here"
    NOT_DUE = "not due"
    NO_COPY = "no copy"
    NO_ANSWER = "no answer"
    UNREACHABLE = "unreachable"
    OTHER = "other"


MOST_DETAIL = 1000


def plain(text: str, most: int) -> str:
    r"""Text that is nothing but text: one line of printable characters, cut to a length.

    Example:
        >>> plain("red \x1b[31m\nand more", 12)
        'red ?[31m?an'
    """
    return "".join(one if one.isprintable() else "?" for one in text[:most])


class Refused(Exception):  # noqa: N818 - a refusal is an outcome, not an error of this program
    """A message, or a call, that was not taken.

    Attributes:
        reason: Which of the reasons.
        detail: What was found and what was expected, for the log of either side; whoever it is
            from, it is plain text.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = plain(detail, MOST_DETAIL)
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
