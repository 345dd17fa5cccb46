"""Stacked LoRA: the adapters of all clients in one tensor for each factor.

All of a client's A factors lie side by side in one row of an (N, P_A) tensor, likewise B and the
head. Optimizer, mixing, metrics and the wire work on rows; the forward pass works on views.

Legend: N clients, r rank, R the base's rank, P_A = sum of r d_in over the adapted layers, P_B = sum
of d_out r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from plait.factors import VALUE, Factor, Slot
from plait.later import Tensor, functional, torch
from plait.machine.devices import exact
from plait.optimizers import ADAMW
from plait.rng import torch_stream

Dropout = Callable[[str, Tensor], Tensor]
"""(site name, its input (..., d_in)) -> what to multiply the packed input (T, d_in) with."""

UNTRAINED = Factor.BASE | Factor.NOTE
"""What no optimizer changes, and so needs no slots beside it."""

State = dict[Slot, Tensor]
"""Slot -> (n, P) float32, a row for each of n clients."""


@dataclass(frozen=True)
class Site:
    """A linear layer that is adapted: its module path and its sizes."""

    name: str
    d_in: int
    d_out: int


def layer_index(name: str) -> int:
    """The number of the encoder layer that a module path lies in, 0 where there is none.

    Example:
        >>> layer_index("bert.encoder.layer.3.attention.self.query")
        3
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a row.

    Attributes:
        sites: The adapted layers, in the model's order.
        rank: r.
        scale: What B A is multiplied with, such as alpha / r; clients of any rank have the same.
        head: Names and shapes of the head's parameters; empty when the head is frozen.
        base_rank: R of what is added to the frozen weights; 0 where they stay as they are.
        notes: How many numbers beside the factors clients agree by.
    """

    sites: tuple[Site, ...]
    rank: int
    scale: float
    head: tuple[tuple[str, tuple[int, ...]], ...] = ()
    base_rank: int = 0
    notes: int = 0

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The blocks that a client's state has."""
        head = (Factor.HEAD,) if self.head else ()
        base = (Factor.BASE_A, Factor.BASE_B) if self.base_rank else ()
        return (Factor.A, Factor.B, *head, *base, *((Factor.NOTE,) if self.notes else ()))

    def of_rank(self, rank: int) -> Layout:
        """The same of another rank; the scale stays."""
        return self if rank == self.rank else replace(self, rank=rank)

    def shapes(self, factor: Factor) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each part of one client's block."""
        if factor is Factor.HEAD:
            return dict(self.head)
        if factor is Factor.NOTE:
            return {"note": (self.notes,)}
        rank = self.base_rank if factor in Factor.BASE else self.rank
        if factor in (Factor.A, Factor.BASE_A):
            return {site.name: (rank, site.d_in) for site in self.sites}
        return {site.name: (site.d_out, rank) for site in self.sites}

    def sizes(self, factor: Factor) -> list[int]:
        """The number of parameters in each part of one client's block."""
        return [math.prod(shape) for shape in self.shapes(factor).values()]

    def size(self, factor: Factor) -> int:
        """P, the number of parameters in one client's block."""
        return sum(self.sizes(factor))

    def views(self, factor: Factor, flat: Tensor) -> dict[str, Tensor]:
        """(n, P) -> name -> (n, *shape). One split, so that its backward is one concatenation.

        Of A and B with whatever rank the rows have.
        """
        layout = self
        if factor in Factor.AB and flat.shape[1] != self.size(factor):
            layout = self.of_rank(self.rank * flat.shape[1] // self.size(factor))
        parts = flat.split(layout.sizes(factor), dim=1)
        return {
            name: part.unflatten(1, shape)
            for (name, shape), part in zip(layout.shapes(factor).items(), parts, strict=True)
        }

    def by_site(
        self, state: Mapping[Slot, Tensor], a: Factor = Factor.A, b: Factor = Factor.B
    ) -> list[tuple[Tensor, Tensor]]:
        """The values (n, P) of two factors -> (n, r, d_in) and (n, d_out, r) of each layer."""
        views = self.views(a, state[VALUE, a]), self.views(b, state[VALUE, b])
        return [(views[0][site.name], views[1][site.name]) for site in self.sites]


def joined(layout: Layout, factors: Mapping[Factor, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B (n, P) of rank r + R, whose product is all that is added to the frozen weights.

    Args:
        layout: Where everything lies.
        factors: Factor -> (n, P); A and B themselves are returned where it has no base.
    """
    flats = []
    for own, base, dim in ((Factor.A, Factor.BASE_A, 1), (Factor.B, Factor.BASE_B, 2)):
        flat = factors[own]
        if base in factors:
            views, more = layout.views(own, flat), layout.views(base, factors[base])
            both = [torch.cat([views[name], more[name]], dim=dim) for name in views]
            flat = torch.cat([one.flatten(1) for one in both], dim=1)
        flats.append(flat)
    return flats[0], flats[1]


def resized(layout: Layout, state: Mapping[Slot, Tensor], rank: int) -> State:
    """Rows (n, P) as those of clients of another rank: cut, or filled up with zeros.

    Args:
        layout: Of the rows as they are.
        state: The rows.
        rank: The other rank.
    """
    more = rank - layout.rank
    pads = {Factor.A: (0, 0, 0, more), Factor.B: (0, more)}

    def row(factor: Factor, flat: Tensor) -> Tensor:
        views = layout.views(factor, flat).values()
        return torch.cat([functional.pad(view, pads[factor]).flatten(1) for view in views], dim=1)

    return {
        slot: row(slot[1], value) if more and slot[1] in pads else value
        for slot, value in state.items()
    }


def cut(layout: Layout, state: State, ranks: Sequence[int]) -> None:
    """Set to zero what clients of smaller rank don't have, in place.

    Such a client is a row whose last directions are zero in A and in B: then their gradients are,
    too, and local steps leave them so.

    Args:
        layout: Of the largest rank.
        state: Slot -> (n, P).
        ranks: Of the n clients.
    """
    for rank in set(ranks) - {layout.rank}:
        rows = [k for k, own in enumerate(ranks) if own == rank]
        small = resized(layout, {slot: value[rows] for slot, value in state.items()}, rank)
        for slot, value in resized(layout.of_rank(rank), small, layout.rank).items():
            state[slot][rows] = value


def values(state: Mapping[Slot, Tensor]) -> Mapping[Factor, Tensor]:
    """Factor -> its value, of the factors that have one in a state. To be read, not written."""
    found = {factor: value for (kind, factor), value in state.items() if kind == VALUE}
    return MappingProxyType(found)


@dataclass
class Stack:
    """The state of n clients.

    Attributes:
        state: Each factor's value, and beside it what optimizer and method keep of it.
        steps: Factor -> (n,) float32, steps taken since what is beside it was last reset.
    """

    state: State
    steps: dict[Factor, Tensor]

    @property
    def factors(self) -> Mapping[Factor, Tensor]:
        """Factor -> its value (n, P). To be read; `state` is what changes."""
        return values(self.state)

    def beside(self, factor: Factor) -> dict[str, Tensor]:
        """Kind -> slot (n, P) of what is kept beside a factor's value."""
        return {k: slot for (k, f), slot in self.state.items() if f is factor and k != VALUE}

    def reset(self, factor: Factor, but: Sequence[str] = ()) -> None:
        """Start the optimizer anew for one factor of every client; the kinds `but` stay."""
        for kind, slot in self.beside(factor).items():
            if kind not in but:
                slot.zero_()
        if factor in self.steps:
            self.steps[factor].zero_()

    def part(self, rows: list[int]) -> Stack:
        """Some of the clients, in memory of their own; all in their order are the stack itself."""
        if rows == list(range(len(self.state[VALUE, Factor.A]))):
            return self
        state = {slot: value[rows] for slot, value in self.state.items()}
        return Stack(state, {factor: steps[rows] for factor, steps in self.steps.items()})

    def put(self, rows: list[int], part: Stack) -> None:
        """Take over what has become of a `part`."""
        if part is not self:
            for slot, value in part.state.items():
                self.state[slot][rows] = value
            for factor, steps in part.steps.items():
                self.steps[factor][rows] = steps


def initial_stack(
    layout: Layout,
    head: dict[str, Tensor],
    num_clients: int,
    seed: int,
    device: torch.device,
    kinds: Sequence[str] = ADAMW.kinds,
) -> Stack:
    """The common start: one A0 and one head for every client, B zero.

    Independently seeded A would shrink by about 1/sqrt(N) when averaged, and FFA-LoRA would not
    be exact. A0 has PEFT's default distribution, Kaiming uniform with a = sqrt(5).

    Args:
        layout: Where everything lies.
        head: The head's parameters by name, as the model starts with them.
        num_clients: N.
        seed: The seed of the run.
        device: Where the stack lives.
        kinds: The slots that are kept beside each value; zero at the start.
    """
    rows = {factor: torch.zeros(layout.size(factor)) for factor in layout.factors}
    rows[Factor.A] = initial_A(layout, seed)
    if layout.head:
        rows[Factor.HEAD] = torch.cat([head[name].float().flatten() for name, _ in layout.head])
    factors = {factor: row.to(device).repeat(num_clients, 1) for factor, row in rows.items()}
    state = {(VALUE, factor): value for factor, value in factors.items()}
    trained = {factor: value for factor, value in factors.items() if factor not in UNTRAINED}
    for kind in kinds:
        state |= {(kind, factor): torch.zeros_like(value) for factor, value in trained.items()}
    return Stack(state, {factor: torch.zeros(num_clients) for factor in trained})


def initial_A(layout: Layout, seed: int, *round_: int) -> Tensor:  # noqa: N802
    """(P,) A as all clients start with it, or start again with it after a round."""
    return torch.cat(
        [
            torch.empty(layout.rank * site.d_in).uniform_(
                -bound, bound, generator=torch_stream(seed, "A0", index, *round_)
            )
            for index, site in enumerate(layout.sites)
            for bound in [1 / math.sqrt(site.d_in)]
        ]
    )


def branch(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The LoRA branch of n clients: scale (x A^T) B^T.

    Args:
        x: (n, L, d_in).
        A: (n, r, d_in), any float type; computed in x's.
        B: (n, d_out, r).
        scale: alpha / r.

    Returns:
        (n, L, d_out).
    """
    low = torch.bmm(x, A.to(x.dtype).mT) * scale
    return torch.bmm(low, B.to(x.dtype).mT)


def product_norm(P: Tensor, Q: Tensor) -> float:
    """||P Q||_F of P (d_out, k) and Q (k, d_in); the product isn't formed where k is small."""
    P, Q = exact(P), exact(Q)
    if P.shape[1] >= min(P.shape[0], Q.shape[1]):
        return float((P @ Q).norm())
    squared = float(((P.T @ P) * (Q @ Q.T)).sum())
    return math.sqrt(max(squared, 0.0))
