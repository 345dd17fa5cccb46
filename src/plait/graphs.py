"""Who meets whom in a round: graphs, from the config.

    N clients, t round
    adjacency (N, N) bool, symmetric with an empty diagonal: who meets whom in a round

Topologies turn graphs into mixing matrices. All depend on the config alone, and any round can be
asked for without those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.sparse.csgraph import connected_components

from plait.config import Config
from plait.contact_traces import from_edges, read_contacts
from plait.later import networkx
from plait.mixing_matrix import Adjacency, Matrix
from plait.rng import stream

Graphs = Callable[[int], Adjacency]
Drawn = TypeVar("Drawn", Adjacency, Matrix)

REDRAWS = 100
"""Random graphs that are tried before giving up on a connected one."""

LEG = 5
"""Rounds that a client of `mobility` walks from one waypoint to the next."""


def one_peer_period(N: int) -> int:
    """ceil(log2 N), and 1 for a single client: how many distances 1, 2, 4, ... there are."""
    return max(1, (N - 1).bit_length())


# -- one graph for all rounds


def _adjacency(graph: networkx.Graph[Any]) -> Adjacency:
    adjacency = networkx.to_numpy_array(graph, nodelist=sorted(graph)).astype(np.bool_)
    np.fill_diagonal(adjacency, False)  # networkx closes a ring of one client on itself
    return adjacency


def _fixed(adjacency: Adjacency) -> Graphs:
    return lambda t: adjacency


def ring(config: Config) -> Graphs:
    """Each client has two neighbours."""
    return _fixed(_adjacency(networkx.cycle_graph(config.clients)))


def complete(config: Config) -> Graphs:
    """Everybody meets everybody."""
    return _fixed(_adjacency(networkx.complete_graph(config.clients)))


def star(config: Config) -> Graphs:
    """All meet client 0 only."""
    return _fixed(_adjacency(networkx.star_graph(config.clients - 1)))


def torus(config: Config) -> Graphs:
    """A grid, nearly square, with joined borders; a `ValueError` for numbers that fill none."""
    N = config.clients
    side = max(d for d in range(1, math.isqrt(N) + 1) if N % d == 0)
    if side == 1:
        s = max(2, math.isqrt(N))
        raise ValueError(
            f"{N} clients fill no grid of at least 2 x 2, which topology torus needs: N must be a "
            f"product of two numbers above 1, such as {s * s}, {s * (s + 1)} or {(s + 1) ** 2}."
        )
    return _fixed(_adjacency(networkx.grid_2d_graph(side, N // side, periodic=True)))


def exponential(config: Config) -> Graphs:
    """Neighbours at distance 1, 2, 4, 8, ... on a ring."""
    hops = [2**j for j in range(one_peer_period(config.clients))]
    return _fixed(_adjacency(networkx.circulant_graph(config.clients, hops)))


# -- one random graph for all rounds


def first_connected(
    draw: Callable[[np.random.Generator], Drawn], config: Config, fix: str
) -> Drawn:
    """The first drawn matrix (N, N) whose entries join all clients; a `ValueError` after many."""
    for attempt in range(REDRAWS):
        drawn = draw(stream(config.seed, "graph", attempt))
        if not _cut_off(drawn != 0):
            return drawn
    raise ValueError(
        f"None of {REDRAWS} random graphs of {config.clients} clients is connected. {fix}"
    )


def degree_of(config: Config, odd_too: bool = False) -> int:
    """`config.degree`, or 4, where so many clients can have so many neighbours each.

    Raises:
        ValueError: They can't, or it is odd and may not be.
    """
    degree, N = config.degree or 4, config.clients
    if degree < N and (odd_too or degree % 2 == 0):
        return degree
    kind = "one" if odd_too else "an even one"
    said = "is" if config.degree else "isn't given, and then it is"
    raise ValueError(
        f"degree {said} {degree}; topology {config.topology} of {N} clients takes {kind} below {N}."
    )


def _random_graph(rng: np.random.Generator, N: int, p: float) -> Adjacency:
    # Not networkx: slow for a graph per round, and peers with other versions must draw the same.
    upper = np.triu(rng.random((N, N)) < p, k=1)
    return np.logical_or(upper, upper.T)


def erdos_renyi(config: Config) -> Graphs:
    """One connected random graph, each edge with probability p."""
    N, p = config.clients, config.p
    fix = (
        f"Raise p to {min(1.0, 2 * math.log(N) / N):.2f} or so, or use the topology pairs, "
        "which draws a new graph in each round and needs none to be connected."
    )
    return _fixed(first_connected(lambda rng: _random_graph(rng, N, p), config, fix))


def regular(config: Config) -> Graphs:
    """One connected random graph in which each client has as many neighbours."""
    N, degree = config.clients, degree_of(config, odd_too=config.clients % 2 == 0)
    return _fixed(
        first_connected(
            lambda rng: _adjacency(networkx.random_regular_graph(degree, N, _seed(rng))),
            config,
            "Raise degree.",
        )
    )


def small_world(config: Config) -> Graphs:
    """Watts and Strogatz's: nearest neighbours on a ring, each edge rewired with probability p."""
    N, degree, p = config.clients, degree_of(config), config.p
    return _fixed(
        first_connected(
            lambda rng: _adjacency(networkx.watts_strogatz_graph(N, degree, p, _seed(rng))),
            config,
            "Raise degree or lower p.",
        )
    )


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))


# -- another graph in each round


def pairs(config: Config) -> Graphs:
    """Each pair meets with probability p, anew in every round."""
    N, p = config.clients, config.p
    return lambda t: _random_graph(stream(config.seed, "topology", t), N, p)


def mobility(config: Config) -> Graphs:
    """Clients walk between random points of the unit square and meet within a radius.

    Each takes `LEG` rounds from waypoint to waypoint, and set out at a moment of its own.
    """
    N, each = config.clients, np.arange(config.clients)
    start = stream(config.seed, "mobility").random(N)

    def graph(t: int) -> Adjacency:
        walked, first = t / LEG + start, t // LEG
        waypoints = np.stack(
            [stream(config.seed, "waypoints", first + j).random((N, 2)) for j in range(3)]
        )
        leg = walked.astype(np.int64) - first
        here, there = waypoints[leg, each], waypoints[leg + 1, each]
        place = here + (walked - first - leg)[:, None] * (there - here)
        apart = np.square(place[:, None] - place).sum(axis=-1)
        adjacency: Adjacency = apart <= min(config.radius, 2.0) ** 2
        np.fill_diagonal(adjacency, False)
        return adjacency

    return graph


def from_file(config: Config) -> Graphs:
    """An edge list, or a contact trace.

    A trace starts over at its end: a run without contacts from there on is local training.
    """
    if config.edges_file is None:
        raise ValueError("Topology file needs edges_file, the path of an edge list or a trace.")
    rows = read_contacts(Path(config.edges_file), config.clients)
    if rows.shape[1] == 2:
        return _fixed(_require_connected(from_edges(rows, config.clients), config.edges_file))
    if rows[:, 0].min() >= config.rounds:
        raise ValueError(
            f"{config.edges_file}: the first contact is in round {rows[:, 0].min()} and the run has"
            f" {config.rounds} rounds, so nobody would ever meet. Number the rounds from 0."
        )
    period = int(rows[:, 0].max()) + 1
    return lambda t: from_edges(rows[rows[:, 0] == t % period, 1:], config.clients)


def _cut_off(adjacency: Adjacency) -> list[int]:
    """The clients outside the largest connected part of the graph."""
    _, part = connected_components(adjacency, directed=False)
    return [int(i) for i in np.flatnonzero(part != np.bincount(part).argmax())]


def _require_connected(adjacency: Adjacency, name: str) -> Adjacency:
    if cut_off := _cut_off(adjacency):
        listed = ", ".join(map(str, cut_off[:20])) + (", ..." if len(cut_off) > 20 else "")
        raise ValueError(
            f"The graph of {name} is not connected: {len(cut_off)} of {len(adjacency)} clients "
            f"are cut off from the rest ({listed}). Add edges that join them."
        )
    return adjacency
