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

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigvalsh

from plait import graphs
from plait.base_graph import base_turns
from plait.config import Config
from plait.graphs import Graphs, one_peer_period
from plait.lookup import lookup
from plait.machine.file_cache import kept
from plait.mixing_matrix import WEIGHTS, Matrix
from plait.rng import stream

MixingSchedule = Callable[[int], Matrix]

MOST_ROUNDS = 1000
"""Rounds in which `measure` waits for consensus."""


# -- schedules: config -> (round -> W)


def _weighted(build: Callable[[Config], Graphs], config: Config) -> MixingSchedule:
    """The schedule of a graph: `config.weights` of the graph of each round."""
    graph, row = build(config), lookup(WEIGHTS, config.weights, "weights")

    def schedule(t: int) -> Matrix:
        return row.weigh(graph(t), stream(config.seed, "weights", t))

    return schedule


def _static(build: Callable[[Config], Graphs], config: Config) -> MixingSchedule:
    """As `_weighted` for a graph that never changes: W is computed once where it is the same."""
    schedule = _weighted(build, config)
    if not WEIGHTS[config.weights].static:
        return schedule
    W = schedule(0)
    return lambda t: W.copy()  # not shared: a caller may write into it


def _half_with(partner: npt.NDArray[np.int64]) -> Matrix:
    """Partners (N,) -> W (N, N): half of oneself, half of the partner."""
    W = np.eye(len(partner)) / 2
    W[np.arange(len(partner)), partner] += 0.5
    return W


def _one_peer_exponential(config: Config) -> MixingSchedule:
    N, period = config.clients, one_peer_period(config.clients)
    return lambda t: _half_with((np.arange(N) + 2 ** (t % period)) % N)


def _hypercube(config: Config) -> MixingSchedule:
    N = config.clients
    if N < 2 or N & (N - 1):
        below = max(2, 1 << (N.bit_length() - 1))
        raise ValueError(
            f"Topology hypercube needs a power of two as the number of clients, such as {below} "
            f"or {2 * below}; there are {N}. one_peer_exponential takes any number."
        )
    return lambda t: _half_with(np.arange(N) ^ 2 ** (t % one_peer_period(N)))


def _base(config: Config) -> MixingSchedule:
    turns = base_turns(config.clients, config.degree or 1)
    return lambda t: turns[t % len(turns)]()


def _equistatic(config: Config) -> MixingSchedule:
    """U-EquiStatic: the mean over drawn distances on a ring, there and back, and 1/N of oneself.

    A distance may be drawn again, and then weighs as much more, as in the code of its authors
    (github.com/kexinjinnn/EquiTopo): so clients may have fewer neighbours than `degree`.
    """
    N, M = config.clients, graphs.degree_of(config) // 2

    def draw(rng: np.random.Generator) -> Matrix:
        W = np.eye(N) / N
        for distance in rng.integers(1, N, M):
            step = np.roll(np.eye(N), distance, axis=1)
            W += (step + step.T) * ((N - 1) / N / (2 * M))
        return W

    W = graphs.first_connected(draw, config, "Raise degree.")
    return lambda t: W.copy()


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
    uses: tuple[str, ...] = ()
    """The settings that apply beside `weights`: of `p`, `degree`, `radius` and `edges_file`."""
    period: Callable[[Config], int] | None = None
    """After how many rounds W repeats itself, where ceil(log2 N) isn't right (`measure_rho`)."""


TOPOLOGIES: dict[str, TopologyRow] = {
    "pairs": TopologyRow(
        partial(_weighted, graphs.pairs),
        "each pair meets with probability p, anew in every round",
        static=False,
        exchangeable=True,
        uses=("p",),
    ),
    "erdos_renyi": TopologyRow(
        partial(_static, graphs.erdos_renyi),
        "one connected random graph, each edge with probability p",
        uses=("p",),
    ),
    "ring": TopologyRow(partial(_static, graphs.ring), "each client has two neighbours"),
    "complete": TopologyRow(
        partial(_static, graphs.complete), "everybody meets everybody every round"
    ),
    "star": TopologyRow(
        partial(_static, graphs.star), "all meet client 0 only: gossip, not FedAvg"
    ),
    "torus": TopologyRow(
        partial(_static, graphs.torus), "a grid, nearly square, with joined borders"
    ),
    "exponential": TopologyRow(
        partial(_static, graphs.exponential), "neighbours at distance 1, 2, 4, 8, ... on a ring"
    ),
    "regular": TopologyRow(
        partial(_static, graphs.regular),
        "one connected random graph, as many neighbours for each client",
        uses=("degree",),
    ),
    "small_world": TopologyRow(
        partial(_static, graphs.small_world),
        "nearest neighbours on a ring, each edge rewired with probability p (Watts-Strogatz)",
        uses=("degree", "p"),
    ),
    "equistatic": TopologyRow(
        _equistatic,
        "neighbours at drawn distances on a ring (U-EquiStatic)",
        weighted=False,
        uses=("degree",),
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
    "base": TopologyRow(
        _base,
        "Base-(k+1), k the degree: the exact average every few rounds, for any N",
        static=False,
        weighted=False,
        uses=("degree",),
        period=lambda config: len(base_turns(config.clients, config.degree or 1)),
    ),
    "mobility": TopologyRow(
        partial(_weighted, graphs.mobility),
        "clients walk about the unit square (random waypoints) and meet within a radius",
        static=False,
        exchangeable=True,
        uses=("radius",),
    ),
    "file": TopologyRow(
        partial(_weighted, graphs.from_file),
        "edges_file: lines `i j`, or a contact trace `round i j` that starts over at its end",
        static=False,  # a trace is not; an edge list is treated as one that repeats itself
        uses=("edges_file",),
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
            f"Topology {config.topology} has weights of its own; "
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
    schedule, step = topology_row(config).build(config), config.gossip_step
    if step == 1:
        return schedule
    return lambda round_: (1 - step) * np.eye(config.clients) + step * schedule(round_)


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
    rounds = rounds or one_peer_period(N) * max(2, min(500, 200_000 // N**2))
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
    return measure_rho(
        build_schedule(config),
        config.clients,
        row.static,
        rounds=row.period(config) if row.period else None,
        exchangeable=row.exchangeable,
    )


@kept(64)
def exact_after(config: Config, start: int = 0) -> int | None:
    """Rounds from `start` on after which all clients have the exact average of before.

    None where that takes more than two periods of the one-peer schedules, or never comes.

    Example:
        >>> [exact_after(Config(topology=t, clients=8)) for t in ("hypercube", "complete", "ring")]
        [3, 1, None]
    """
    row, N = topology_row(config), config.clients
    schedule, product = build_schedule(config), np.eye(N)
    period = row.period(config) if row.period else one_peer_period(N)
    for rounds in range(1, 2 if row.static else 2 * period + 1):
        product = schedule(start + rounds - 1) @ product
        if np.allclose(product, 1.0 / N, rtol=0, atol=1e-12):
            return rounds
    return None


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What a topology costs and brings.

    Attributes:
        rho: What a round leaves of the disagreement, in the mean square.
        degree: Messages that a client sends in a round, in the mean.
        max_degree: The most others that a client hears in a round.
        rounds: Rounds after which less than 1/1000 is left of any disagreement; None if that takes
            more than `MOST_ROUNDS`.
        exact: Nothing is left of it then, but for rounding.
    """

    rho: float
    degree: float
    max_degree: int
    rounds: int | None
    exact: bool


def measure(config: Config) -> Measures:
    """The measures of the config's topology, from round 0 on.

    Raises:
        ValueError: As `build_schedule`.

    Example:
        >>> one = measure(Config(topology="hypercube", clients=8))
        >>> one.degree, one.rounds, one.exact
        (1.0, 3, True)
    """
    row = topology_row(config)
    schedule, rho = build_schedule(config), rho_of(config)
    heard = [np.count_nonzero(W - np.diag(W.diagonal()), axis=1)
             for W in map(schedule, range(1 if row.static else 100))]  # fmt: skip
    rounds, left = _consensus(schedule, config.clients)
    return Measures(
        rho=rho,
        degree=float(np.mean(heard)),
        max_degree=int(np.max(heard)),
        rounds=rounds,
        exact=left < 1e-12,
    )


def _consensus(schedule: MixingSchedule, N: int) -> tuple[int | None, float]:
    """Rounds until ||W ... W W - J||_2 is below 1e-3, and what it is then."""
    apart = np.eye(N) - 1.0 / N
    for t in range(MOST_ROUNDS):
        apart = schedule(t) @ apart
        # The Frobenius norm is at most sqrt(N) times as large, and much faster.
        if np.linalg.norm(apart) < 1e-3 * math.sqrt(N):
            left = float(np.linalg.norm(apart, ord=2))
            if left < 1e-3:
                return t + 1, left
    return None, 1.0
