"""The body of a message: factors as safetensors bytes, trusted only after every check.

A receiver knows which tensors it wants, so its own template decides: names, shapes, dtype and
places are compared with it before a tensor is made, and values are looked at before one is given
out. The format is a length (8 bytes, little-endian), a JSON head, and the values; it is read here
and not by the safetensors package because that one takes whatever tensors the head declares, and
to have one copy of the values instead of three.

Legend: P parameters of one client's slot.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plait.factors import Slot, slot_name
from plait.lora import Layout
from plait.peers.refusals import Reason, Refused
from plait.wire_types import OF_DTYPE, WireType

LENGTH = struct.Struct("<Q")
Span = tuple[int, int]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """A tensor of a body: a slot of one layer, or of a parameter of the head; or scales."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return OF_DTYPE[self.dtype].item_bytes * math.prod(self.shape)


@dataclass(frozen=True)
class Template:
    """The tensors that a body must hold, no more and no fewer, in the order of a client's row.

    Attributes:
        layout: Where everything lies in a row.
        slots: Whose rows they are.
        wire: The type of all values.
    """

    layout: Layout
    slots: tuple[Slot, ...]
    wire: WireType

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The tensors: of each slot its parts, and then their scales if the type has any."""
        return tuple(part for slot in self.slots for part in self._parts_of(slot))

    def _parts_of(self, slot: Slot) -> Iterator[Part]:
        shapes = self.layout.shapes(slot[1])
        for name, shape in shapes.items():
            yield Part(f"{slot_name(slot)}/{name}", shape, self.wire.dtype)
        if scale := self.wire.scale:
            yield Part(f"scales/{slot_name(slot)}", (len(shapes),), scale.dtype)

    @cached_property
    def values_bytes(self) -> int:
        """Bytes of all values."""
        return sum(part.num_bytes for part in self.parts)

    @cached_property
    def head(self) -> bytes:
        """The length and the JSON head that a body of ours begins with, padded to 8 bytes."""
        entries: dict[str, Any] = {}
        start = 0
        for part in self.parts:
            span = [start, start + part.num_bytes]
            entries[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": span}
            start += part.num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return LENGTH.pack(len(text)) + text

    def rows(self, values: memoryview) -> Iterator[tuple[Slot, Values]]:
        """Each slot with its row (P,) float32, of all values' bytes; of float32 views of them."""
        for slot in self.slots:
            sizes = self.layout.sizes(slot[1])
            size = self.wire.num_bytes(sizes)
            yield slot, self.wire.from_bytes(values[:size], sizes)
            values = values[size:]

    @property
    def most_bytes(self) -> int:
        """The most that a body may have: another writer's head may be longer than ours."""
        return 2 * len(self.head) + self.values_bytes

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits that are equal when names, shapes, order and dtype are."""
        return sha256(self.head).hexdigest()[:16]


@lru_cache(maxsize=16)
def template_of(layout: Layout, slots: tuple[Slot, ...], dtype: str = "F32") -> Template:
    """The tensors of some slots of a layout."""
    return Template(layout, slots, OF_DTYPE[dtype])


def pack(slots: Mapping[Slot, Tensor], template: Template) -> bytes:
    """Slots as a body, in a copy of their own: they may change afterwards.

    Args:
        slots: Slot -> (P,) float32.
        template: Its tensors.
    """
    rows = {slot: slots[slot].detach().cpu().contiguous() for slot in template.slots}
    sizes = template.layout.sizes
    arrays = [template.wire.to_array(row, sizes(slot[1])) for slot, row in rows.items()]
    assert sum(array.nbytes for array in arrays) == template.values_bytes
    return b"".join([template.head, *(array.data.cast("B") for array in arrays)])


def unpack(
    body: bytes | bytearray, template: Template, norm_bound: float | None = None
) -> dict[Slot, Tensor]:
    """The slots of a body that holds exactly the template's tensors, all of them finite.

    Args:
        body: Of `pack`, or of any writer of safetensors.
        template: What is expected.
        norm_bound: The largest Euclidean norm of all values together.

    Returns:
        Slot -> (P,) float32, in memory of their own.

    Raises:
        Refused: It doesn't hold what is expected; the detail says where.
    """
    if not LENGTH.size <= len(body) <= template.most_bytes:
        raise Refused(Reason.MALFORMED, f"a body of {len(body)} bytes")
    ours = len(template.head) + template.values_bytes
    if len(body) == ours and body.startswith(template.head):
        values = memoryview(body)[len(template.head) :]
    else:
        values = _in_order(body, template)
    rows = {slot: row.copy() for slot, row in template.rows(values)}
    _check_values(rows, norm_bound)
    return {slot: torch.from_numpy(row) for slot, row in rows.items()}


def digest_of(rows: Mapping[Slot, Tensor | Values]) -> str:
    """The SHA-256 of rows' values, float32, little-endian, in their order, as hex digits.

    Args:
        rows: Slot -> (P,) float32 on the CPU.
    """
    found = sha256()
    for row in rows.values():
        found.update(np.ascontiguousarray(row, "<f4").data)
    return found.hexdigest()


def _check_values(rows: Mapping[Slot, Values], norm_bound: float | None) -> None:
    # NumPy's reductions and not torch's or BLAS's: those would start, and keep spinning, a pool of
    # threads for the transport's thread, next to the one that trains.
    for slot, row in rows.items():
        if not (np.isfinite(row.min()) and np.isfinite(row.max())):  # NaN is both
            raise Refused(Reason.NOT_FINITE, f"{slot_name(slot)} holds NaN or infinity")
    if norm_bound is None:
        return
    norm = math.sqrt(sum(float(np.square(row, dtype=np.float64).sum()) for row in rows.values()))
    if norm > norm_bound:
        raise Refused(Reason.NORM_TOO_LARGE, f"the norm is {norm:.3g}, the bound {norm_bound:.3g}")


def _in_order(body: bytes | bytearray, template: Template) -> memoryview:
    """The values of a body with another writer's head, brought into the template's order."""
    start, spans = _read_head(body, template)
    places = (spans[part.name] for part in template.parts)
    return memoryview(bytearray().join(body[start + a : start + b] for a, b in places))


def _read_head(body: bytes | bytearray, template: Template) -> tuple[int, dict[str, Span]]:
    """Where the values begin, and name -> (start, end) from there, all as the template wants."""
    values_start = LENGTH.size + LENGTH.unpack_from(body)[0]
    if len(body) - values_start != template.values_bytes:
        raise Refused(Reason.WRONG_SHAPE, f"expected {template.values_bytes} bytes of values")
    entries = _parse(bytes(body[LENGTH.size : values_start]))
    names = {part.name for part in template.parts}
    if entries.keys() != names:
        odd = sorted(entries.keys() ^ names)[0]
        raise Refused(Reason.WRONG_SHAPE, f"tensor {odd!r:.100} is missing, or not expected")
    spans = {part.name: _span(entries[part.name], part) for part in template.parts}
    edges = [(0, 0), *sorted(spans.values()), (template.values_bytes, template.values_bytes)]
    if any(before[1] != after[0] for before, after in pairwise(edges)):
        raise Refused(Reason.MALFORMED, "the tensors overlap, or leave a gap")
    return values_start, spans


def _parse(head: bytes) -> dict[str, Any]:
    try:
        # An int of thousands of digits is a ValueError, deep nesting a RecursionError.
        entries = json.loads(head, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise Refused(Reason.MALFORMED, f"the head is not JSON: {error!s:.100}") from None
    if not isinstance(entries, dict):
        raise Refused(Reason.MALFORMED, "the head is not a JSON object")
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key appears twice")
    return entries


def _span(entry: object, part: Part) -> Span:
    """The place that the head gives a tensor, when it describes it as the template does."""
    expected = {"dtype": part.dtype, "shape": list(part.shape)}
    if not isinstance(entry, dict) or entry.keys() != {*expected, "data_offsets"}:
        raise Refused(Reason.MALFORMED, f"{part.name} needs dtype, shape and data_offsets")
    span = entry.pop("data_offsets")
    if entry != expected:
        raise Refused(Reason.WRONG_SHAPE, f"{part.name} is {entry!r:.100}, expected {expected}")
    match span:
        case [int(start), int(end)] if start >= 0 and end - start == part.num_bytes:
            return start, end
    raise Refused(Reason.MALFORMED, f"{part.name} has data_offsets {span!r:.100}")
