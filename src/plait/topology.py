"""Who meets whom, and with what weight: a topology is a function from the round to a matrix.

    N clients, t round, J = ones / N
    adjacency (N, N) bool, symmetric with an empty diagonal: who meets whom in a round
    W         (N, N) float64: W[i, j] is the weight that client i gives to j; rows sum to 1

A schedule is a graph for each round and a rule that turns the graph into weights, and both depend
on the config alone: every peer of a federation computes the same W on its own, without a message.
Every schedule here is doubly stochastic, so that mixing conserves the mean of the clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
from scipy.linalg import eigvalsh
from scipy.sparse.csgraph import connected_components

from plait.config import Config
from plait.contact_traces import from_edges, read_contacts
from plait.lookup import lookup
from plait.mixing_matrix import WEIGHTS, Adjacency, Matrix
from plait.rng import stream

MixingSchedule = Callable[[int], Matrix]
Graphs = Callable[[int], Adjacency]

REDRAWS = 100
"""Random graphs that `erdos_renyi` tries before it gives up on a connected one."""


# -- graphs: config -> (round -> adjacency)


def _random_graph(rng: np.random.Generator, N: int, p: float) -> Adjacency:
    # Not networkx: slow for a graph per round, and peers with other versions must draw the same.
    upper = np.triu(rng.random((N, N)) < p, k=1)
    return np.logical_or(upper, upper.T)


def _pairs(config: Config) -> Graphs:
    def graph(t: int) -> Adjacency:
        return _random_graph(stream(config.seed, "topology", t), config.clients, config.p)

    return graph


def _erdos_renyi(config: Config) -> Graphs:
    N, p = config.clients, config.p
    for attempt in range(REDRAWS):
        adjacency = _random_graph(stream(config.seed, "graph", attempt), N, p)
        if not _cut_off(adjacency):
            return lambda t: adjacency
    raise ValueError(
        f"None of {REDRAWS} random graphs of {N} clients with p={p} is connected. "
        f"Raise p to {min(1.0, 2 * math.log(N) / N):.2f} or so, or use the topology pairs, "
        "which draws a new graph in each round and needs none to be connected."
    )


def _fixed(graph: nx.Graph[Any]) -> Graphs:
    adjacency = nx.to_numpy_array(graph).astype(np.bool_)
    np.fill_diagonal(adjacency, False)  # networkx closes a ring of one client on itself
    return lambda t: adjacency


def _ring(config: Config) -> Graphs:
    return _fixed(nx.cycle_graph(config.clients))


def _complete(config: Config) -> Graphs:
    return _fixed(nx.complete_graph(config.clients))


def _star(config: Config) -> Graphs:
    return _fixed(nx.star_graph(config.clients - 1))


def _torus(config: Config) -> Graphs:
    N = config.clients
    side = max(d for d in range(1, math.isqrt(N) + 1) if N % d == 0)
    if side == 1:
        s = max(2, math.isqrt(N))
        raise ValueError(
            f"{N} clients fill no grid of at least 2 x 2, which topology torus needs: N must be a "
            f"product of two numbers above 1, such as {s * s}, {s * (s + 1)} or {(s + 1) ** 2}."
        )
    return _fixed(nx.grid_2d_graph(side, N // side, periodic=True))


def _exponential(config: Config) -> Graphs:
    hops = [2**j for j in range(_one_peer_period(config.clients))]
    return _fixed(nx.circulant_graph(config.clients, hops))


def _file(config: Config) -> Graphs:
    # A trace starts over at its end: a run without contacts from there on is local training.
    if config.edges_file is None:
        raise ValueError("Topology file needs edges_file, the path of an edge list or a trace.")
    rows = read_contacts(Path(config.edges_file), config.clients)
    if rows.shape[1] == 2:
        adjacency = _require_connected(from_edges(rows, config.clients), config.edges_file)
        return lambda t: adjacency
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


# -- schedules: config -> (round -> W)


def _weighted(graphs: Callable[[Config], Graphs], config: Config) -> MixingSchedule:
    """The schedule of a graph: `config.weights` of the graph of each round."""
    graph, row = graphs(config), lookup(WEIGHTS, config.weights, "weights")

    def schedule(t: int) -> Matrix:
        return row.weigh(graph(t), stream(config.seed, "weights", t))

    return schedule


def _static(graphs: Callable[[Config], Graphs], config: Config) -> MixingSchedule:
    """As `_weighted` for a graph that never changes: W is computed once where it is the same."""
    schedule = _weighted(graphs, config)
    if not WEIGHTS[config.weights].static:
        return schedule
    W = schedule(0)
    return lambda t: W.copy()  # not shared: a caller may write into it


def _one_peer_period(N: int) -> int:
    """ceil(log2 N), and 1 for a single client."""
    return max(1, (N - 1).bit_length())


def _half_with(partner: npt.NDArray[np.int64]) -> Matrix:
    """Partners (N,) -> W (N, N): half of oneself, half of the partner."""
    W = np.eye(len(partner)) / 2
    W[np.arange(len(partner)), partner] += 0.5
    return W


def _one_peer_exponential(config: Config) -> MixingSchedule:
    N, period = config.clients, _one_peer_period(config.clients)
    return lambda t: _half_with((np.arange(N) + 2 ** (t % period)) % N)


def _hypercube(config: Config) -> MixingSchedule:
    N = config.clients
    if N < 2 or N & (N - 1):
        below = max(2, 1 << (N.bit_length() - 1))
        raise ValueError(
            f"Topology hypercube needs a power of two as the number of clients, such as {below} "
            f"or {2 * below}; there are {N}. one_peer_exponential takes any number."
        )
    return lambda t: _half_with(np.arange(N) ^ 2 ** (t % _one_peer_period(N)))


@dataclass(frozen=True)
class TopologyRow:
    """A topology: how its schedule is built, and what holds for every W of it."""

    build: Callable[[Config], MixingSchedule]
    summary: str
    static: bool = True
    """W is the same in every round."""
    symmetric: bool = True
    doubly_stochastic: bool = True
    weighted: bool = True
    """`config.weights` applies; the one-peer schedules are defined by weights of their own."""
    exchangeable: bool = False
    """Renumbering the clients leaves the distribution of W as it is (see `measure_rho`)."""
    uses_p: bool = False
    """`config.p` applies."""


TOPOLOGIES: dict[str, TopologyRow] = {
    "pairs": TopologyRow(
        partial(_weighted, _pairs),
        "each pair meets with probability p, anew in every round",
        static=False,
        exchangeable=True,
        uses_p=True,
    ),
    "erdos_renyi": TopologyRow(
        partial(_static, _erdos_renyi),
        "one connected random graph, each edge with probability p",
        uses_p=True,
    ),
    "ring": TopologyRow(partial(_static, _ring), "each client has two neighbours"),
    "complete": TopologyRow(partial(_static, _complete), "everybody meets everybody every round"),
    "star": TopologyRow(partial(_static, _star), "all meet client 0 only: gossip, not FedAvg"),
    "torus": TopologyRow(partial(_static, _torus), "a grid, nearly square, with joined borders"),
    "exponential": TopologyRow(
        partial(_static, _exponential), "neighbours at distance 1, 2, 4, 8, ... on a ring"
    ),
    "one_peer_exponential": TopologyRow(
        _one_peer_exponential,
        "each client listens to one other, at distance 1, 2, 4, ... by turns (directed)",
        static=False,
        symmetric=False,
        weighted=False,
    ),
    "hypercube": TopologyRow(
        _hypercube,
        "pairs along each dimension by turns: the exact average every log2 N rounds",
        static=False,
        weighted=False,
    ),
    "file": TopologyRow(
        partial(_weighted, _file),
        "edges_file: lines `i j`, or a contact trace `round i j` that starts over at its end",
        static=False,  # a trace is not; an edge list is treated as one that repeats itself
    ),
}


def topology_row(config: Config) -> TopologyRow:
    """The row of the config's topology, with its flags as the config's weights leave them.

    A static graph under `sequential` weights, for instance, is neither static nor symmetric.

    Raises:
        ValueError: Unknown topology or weights, or weights for a topology that has its own.

    Example:
        >>> topology_row(Config(topology="ring", weights="sequential")).symmetric
        False
    """
    row = lookup(TOPOLOGIES, config.topology, "topology")
    weights = lookup(WEIGHTS, config.weights, "weights")
    if row.weighted:
        static, symmetric = row.static and weights.static, row.symmetric and weights.symmetric
        return replace(row, static=static, symmetric=symmetric)
    if config.weights != Config.weights:
        raise ValueError(
            f"Topology {config.topology} has weights of its own, 1/2 for each of two; "
            f"leave out weights={config.weights}."
        )
    return row


def build_schedule(config: Config) -> MixingSchedule:
    """The schedule of a config: round -> W (N, N), float64, W[i, j] what client i gives to j.

    A schedule is a pure function: the same round gives the same W in every process, whatever
    was asked before.

    Raises:
        ValueError: The config asks for a graph that can't be, such as a torus of 7 clients.

    Example:
        >>> build_schedule(Config(topology="ring", clients=4))(0).round(2).tolist()[0]
        [0.33, 0.33, 0.0, 0.33]
    """
    return topology_row(config).build(config)


# -- measures


def neighbours(W: Matrix, i: int) -> list[int]:
    """The others that client i gives weight to, ascending: those whose message it needs.

    Those that need the message of i are `neighbours(W.T, i)`; the two differ on directed graphs.

    Args:
        W: Mixing matrix (N, N).
        i: Client.

    Example:
        >>> neighbours(build_schedule(Config(topology="ring", clients=5))(0), 0)
        [1, 4]
    """
    return [int(j) for j in np.flatnonzero(W[i]) if j != i]


def rho_of_round(W: Matrix) -> float:
    """||W - J||_2: what one round leaves, at worst, of the disagreement between the clients.

    Args:
        W: Mixing matrix (N, N).

    Returns:
        0 for exact averaging, 1 if some clients learn nothing of some others.

    Example:
        >>> round(rho_of_round(build_schedule(Config(topology="ring", clients=10))(0)), 3)
        0.873
    """
    return float(np.linalg.norm(W - 1.0 / len(W), ord=2))


def measure_rho(
    schedule: MixingSchedule,
    N: int,
    static: bool,
    rounds: int | None = None,
    exchangeable: bool = False,
) -> float:
    """The contraction of a round in the mean square, sqrt(lambda_max(E[(W - J)^T (W - J)])).

    The definition of TAD-LoRA (arXiv 2602.00451) and of decentralized SGD at large. Static graphs
    exactly; others as a mean over the first rounds. `rho_of` takes the flags from the config.

    Args:
        schedule: Round -> W (N, N).
        N: Number of clients.
        static: W is the same in every round, so one is enough.
        rounds: Rounds in the mean. By default 2,000 for 10 clients down to 20 for 1,000, in whole
            periods of the one-peer schedules, for which the result is then exact.
        exchangeable: All clients are alike, so the mean is a multiple of I - J and its trace says
            which. A largest eigenvalue over few rounds errs upwards, the trace does not.

    Example:
        >>> measure_rho(build_schedule(Config(topology="complete")), 10, static=True) < 1e-12
        True
    """
    if N == 1:
        return 0.0
    if static:
        return rho_of_round(schedule(0))
    rounds = rounds or _one_peer_period(N) * max(2, min(500, 200_000 // N**2))
    deviations = (schedule(t) - 1.0 / N for t in range(rounds))
    if exchangeable:
        return math.sqrt(sum(float(np.vdot(M, M)) for M in deviations) / (rounds * (N - 1)))
    total = np.zeros((N, N))
    for M in deviations:
        total += M.T @ M
    return math.sqrt(max(0.0, float(eigvalsh(total / rounds)[-1])))


def rho_of(config: Config) -> float:
    """`measure_rho` of the config's topology, with its flags.

    Example:
        >>> round(rho_of(Config(topology="ring", clients=10)), 3)
        0.873
    """
    row = topology_row(config)
    return measure_rho(row.build(config), config.clients, row.static, exchangeable=row.exchangeable)
