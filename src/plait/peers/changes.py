"""A message of which only what changed travels, to a neighbour that has the one before.

    for each slot: the places of its values that travel (uint32, ascending), then they (float32)

It stands for the whole message, and its header has that one's digest: a receiver that hasn't the
right one before finds out by it, says so (`NO_COPY`), and gets the whole one. So nobody has to keep
account of what others have, and whoever is started anew, joins or missed a message loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from plait.factors import Slot
from plait.peers.message_body import Template, pack
from plait.peers.refusals import Reason, Refused
from plait.wire_types import INDEX_BYTES, WireType, farthest

Rows = Mapping[Slot, Tensor]
"""Slot -> (P,) float32."""


def change_bytes(template: Template, wire: WireType) -> int:
    """Of what changed of a whole message with this template."""
    return sum(wire.change_bytes(template.layout.size(factor)) for _, factor in template.slots)


def pack_change(before: Rows, after: Rows, template: Template, wire: WireType) -> bytes:
    """The values of slots that aren't as they were, which are no more than the type lets travel."""
    body = b""
    for slot in template.slots:
        row, old = after[slot].cpu(), before[slot].cpu()
        places = farthest(row, old, wire.count(len(row))).numpy().nonzero()[0]
        body += places.astype("<u4").tobytes() + row.numpy()[places].astype("<f4").tobytes()
    return body


def whole_of(
    body: bytes | bytearray, before: Rows, template: Template, wire: WireType
) -> bytes | bytearray:
    """The body of the whole message that a change stands for, whose values are to be checked.

    Args:
        body: Of `pack_change`, as large as its slots have it.
        before: What it is a change of.
        template: Of the whole message.
        wire: With the share that travels.

    Raises:
        Refused: A slot isn't there, or places are none.
    """
    if not before.keys() >= set(template.slots):
        raise Refused(Reason.NO_COPY, "nothing is here that it could be a change of")
    rows, start = {}, 0
    for slot in template.slots:
        row = before[slot].numpy().copy()
        count = wire.count(len(row))
        places = np.frombuffer(body, "<u4", count, start).astype(np.int64)
        start += INDEX_BYTES * count
        if places[-1] >= len(row) or (np.diff(places) <= 0).any():
            raise Refused(Reason.MALFORMED, "places of values don't ascend, or lie beyond the end")
        row[places] = np.frombuffer(body, "<f4", count, start)
        start += wire.item_bytes * count
        rows[slot] = torch.from_numpy(row)
    return pack(rows, template)


@dataclass
class Copies:
    """What others sent last of each slot, to change it; before their first message, the start.

    Attributes:
        start: Peer -> all its slots that ever travel, before the first round.
    """

    start: Callable[[int], Rows]
    _kept: dict[int, dict[Slot, tuple[int, Tensor]]] = field(default_factory=dict)

    def of(self, peer: int, slots: Collection[Slot]) -> Rows:
        """Those of some slots of a peer that there are."""
        kept = self._kept.setdefault(peer, {})
        if not kept.keys() >= set(slots):
            kept |= {slot: (-1, row) for slot, row in self.start(peer).items() if slot not in kept}
        return {slot: kept[slot][1] for slot in slots if slot in kept}

    def keep(self, peer: int, round_: int, rows: Rows) -> None:
        """Take over what came; of an earlier round than what is here, nothing."""
        kept = self._kept.setdefault(peer, {})
        newer: Iterable[Slot] = (s for s in rows if s not in kept or kept[s][0] < round_)
        kept |= {slot: (round_, rows[slot]) for slot in newer}
