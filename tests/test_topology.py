"""Conformance of every row of TOPOLOGIES x WEIGHTS, the published rho, and the errors."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import get_args

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.config import Config, Weights
from plait.mixing_matrix import WEIGHTS
from plait.topology import (
    TOPOLOGIES,
    build_schedule,
    exact_after,
    measure,
    measure_rho,
    neighbours,
    rho_of,
    rho_of_round,
    topology_row,
)

SIZES = {
    "torus": st.sampled_from([4, 6, 8, 9, 12, 20]),
    "hypercube": st.sampled_from([2, 4, 8, 16]),
    **dict.fromkeys(["regular", "small_world", "equistatic"], st.integers(5, 24)),
}
CASES = [
    (topology, weights)
    for topology, row in TOPOLOGIES.items()
    for weights in (WEIGHTS if row.weighted else ["metropolis"])
]
TRACE = "# round i j\n0 0 1\n0 1 2\n\n2 3 4\n2 3 0\n2,4,3\n"


@pytest.fixture(scope="session")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("topology") / "trace.txt"
    path.write_text(TRACE)
    return str(path)


def configs(topology: str, weights: str, edges_file: str) -> st.SearchStrategy[Config]:
    smallest = 5 if topology == "file" else 1
    return st.builds(
        Config,
        topology=st.just(topology),
        weights=st.just(weights),
        edges_file=st.just(edges_file),
        clients=SIZES.get(topology, st.integers(smallest, 24)),
        p=st.floats(0.6 if topology == "erdos_renyi" else 0, 1),
        seed=st.integers(0, 2**40),
    )


@pytest.mark.parametrize(("topology", "weights"), CASES)
def test_every_schedule_is_what_its_row_says(topology, weights, trace_file):
    @settings(max_examples=25, deadline=None)
    @given(config=configs(topology, weights, trace_file), t=st.integers(0, 300))
    def holds(config, t):
        row, schedule = topology_row(config), build_schedule(config)
        W = schedule(t)
        assert W.shape == (config.clients, config.clients)
        assert W.dtype == np.float64
        np.testing.assert_allclose(W.sum(axis=1), 1, rtol=0, atol=1e-12)
        if row.doubly_stochastic:
            np.testing.assert_allclose(W.sum(axis=0), 1, rtol=0, atol=1e-12)
        if row.symmetric:
            np.testing.assert_array_equal(W, W.T)
        if weights != "laplacian":
            assert W.min() >= 0
        assert np.linalg.norm(W, ord=2) <= 1 + 1e-12
        if row.static:
            np.testing.assert_array_equal(W, schedule(t + 1))
        schedule(t + 1)[:] = np.nan  # what a caller does with its W stays with the caller
        np.testing.assert_array_equal(W, schedule(t))
        np.testing.assert_array_equal(W, build_schedule(config)(t))

    holds()


@pytest.mark.parametrize(("topology", "weights"), CASES)
def test_a_flag_that_is_off_is_off_for_a_reason(topology, weights, trace_file):
    clients = 16 if topology != "file" else 5
    config = Config(
        topology=topology, weights=weights, clients=clients, p=0.5, edges_file=trace_file
    )
    row, schedule = topology_row(config), build_schedule(config)
    first = [schedule(t) for t in range(8)]
    assert row.symmetric == all(np.array_equal(W, W.T) for W in first)
    assert row.static == all(np.array_equal(W, first[0]) for W in first)


def test_seeds_and_rounds_draw_different_graphs():
    schedule, other = (build_schedule(Config(p=0.5, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(schedule(0), schedule(1))
    assert not np.array_equal(schedule(0), other(0))
    config = Config(topology="erdos_renyi", p=0.5)
    another = dataclasses.replace(config, seed=1)
    assert not np.array_equal(build_schedule(config)(0), build_schedule(another)(0))


def test_pairs_meet_with_probability_p_independently():
    schedule = build_schedule(Config(p=0.3))
    met = np.mean([schedule(t) != 0 for t in range(2000)], axis=0)
    np.testing.assert_allclose(met[~np.eye(10, dtype=bool)], 0.3, atol=0.05)
    both = np.mean([W[0, 1] * W[0, 2] != 0 for W in map(schedule, range(2000))])
    assert both == pytest.approx(0.09, abs=0.03)


def test_those_who_move_meet_again_and_all_when_the_radius_is_the_square():
    config = Config(topology="mobility", clients=30, radius=0.15)
    schedule = build_schedule(config)
    met = np.array([schedule(t) != 0 for t in range(100)])[:, ~np.eye(30, dtype=bool)]
    next_round = (met[1:] & met[:-1]).sum() / met[:-1].sum()
    long_after = (met[50:] & met[:-50]).sum() / met[:-50].sum()
    assert 0.05 < met.mean() < 0.15
    assert next_round > 0.4 > 2 * long_after
    everywhere = build_schedule(dataclasses.replace(config, radius=2.0))
    np.testing.assert_allclose(everywhere(7), np.full((30, 30), 1 / 30), rtol=0, atol=1e-15)


# -- the graphs and the weights

NETWORKX = {
    "ring": nx.cycle_graph(12),
    "complete": nx.complete_graph(12),
    "star": nx.star_graph(11),
    "torus": nx.convert_node_labels_to_integers(nx.grid_2d_graph(3, 4, periodic=True)),
    "exponential": nx.circulant_graph(12, [1, 2, 4, 8]),
}


@pytest.mark.parametrize("topology", NETWORKX)
def test_neighbours_are_those_of_the_graph(topology):
    W = build_schedule(Config(topology=topology, clients=12))(0)
    for i in range(12):
        assert neighbours(W, i) == sorted(NETWORKX[topology].neighbors(i))


def test_neighbours_of_a_directed_round_are_those_who_are_listened_to():
    W = build_schedule(Config(topology="one_peer_exponential", clients=10))(3 + 4)
    assert neighbours(W, 5) == [3]  # 5 + 2^3 = 13
    assert neighbours(W.T, 5) == [7]


@pytest.mark.parametrize(("clients", "degree"), [(9, 4), (10, 3), (12, 2)])
def test_a_regular_graph_has_as_many_neighbours_for_each(clients, degree):
    config = Config(topology="regular", clients=clients, degree=degree)
    W = build_schedule(config)(0)
    assert [len(neighbours(W, i)) for i in range(clients)] == [degree] * clients
    other = build_schedule(dataclasses.replace(config, seed=1))(0)
    assert not np.array_equal(W, other)


def test_a_small_world_is_a_ring_of_nearest_neighbours_but_for_rewired_edges():
    config = Config(topology="small_world", clients=30, degree=4, p=0)
    ring = nx.to_numpy_array(nx.circulant_graph(30, [1, 2])) != 0
    rewired = dataclasses.replace(config, p=0.2)
    assert np.array_equal((build_schedule(config)(0) != 0) & ~np.eye(30, dtype=bool), ring)
    kept = (build_schedule(rewired)(0) != 0)[ring].mean()
    assert 0.7 < kept < 0.95


def test_equistatic_is_the_mean_over_steps_there_and_back():
    W = build_schedule(Config(topology="equistatic", clients=11, degree=4))(0)
    assert W[0, 0] == pytest.approx(1 / 11)  # no distance is 0 or 11
    assert set(np.round(W[0, 1:] * 4 * 11 / 10, 9)) <= {0, 1, 2, 3, 4}
    for i in range(11):
        np.testing.assert_array_equal(np.roll(W[i], -i), W[0])


def test_metropolis_on_a_star():
    W = build_schedule(Config(topology="star", clients=4))(0)
    expected = np.array([[1, 1, 1, 1], [1, 3, 0, 0], [1, 0, 3, 0], [1, 0, 0, 3]]) / 4
    np.testing.assert_allclose(W, expected, atol=1e-15)


@pytest.mark.parametrize("clients", [12, 240])  # a dense and an iterative eigenvalue
def test_laplacian_weights_are_those_of_dec_lora(clients):
    config = Config(topology="erdos_renyi", weights="laplacian", clients=clients, p=0.4)
    W = build_schedule(config)(0)
    plain = build_schedule(dataclasses.replace(config, weights="metropolis"))(0)
    L = nx.laplacian_matrix(nx.from_numpy_array((plain != 0) ^ np.eye(clients, dtype=bool)))
    Q = np.eye(clients) - 2 * L / (3 * np.linalg.eigvalsh(L.toarray())[-1])
    np.testing.assert_allclose(W, Q, rtol=0, atol=1e-12)


def test_laplacian_of_no_edges_is_the_identity():
    W = build_schedule(Config(weights="laplacian", p=0))(0)
    np.testing.assert_array_equal(W, np.eye(10))


def test_sequential_is_a_product_of_pairwise_averages_in_a_new_order_each_round():
    schedule = build_schedule(Config(topology="ring", weights="sequential", clients=3))

    def average(i, j):
        P = np.eye(3)
        P[np.ix_([i, j], [i, j])] = 0.5
        return P

    meetings = [average(0, 1), average(0, 2), average(1, 2)]
    orders = [c @ b @ a for a, b, c in itertools.permutations(meetings)]
    seen = {
        next(k for k, order in enumerate(orders) if np.array_equal(schedule(t), order))
        for t in range(100)
    }
    assert seen == set(range(6))


def test_a_gossip_step_is_that_part_of_the_way():
    plain, half = (Config(topology="hypercube", clients=8, gossip_step=g) for g in (1.0, 0.5))
    W, expected = build_schedule(half)(1), build_schedule(plain)(1)
    np.testing.assert_allclose(W, (np.eye(8) + expected) / 2)
    assert (exact_after(plain), exact_after(half)) == (3, None)
    assert rho_of(half) > rho_of(plain)


def test_hypercube_averages_exactly_every_log2_n_rounds():
    schedule = build_schedule(Config(topology="hypercube", clients=8))
    for start in (0, 1, 5):
        product = schedule(start + 2) @ schedule(start + 1) @ schedule(start)
        np.testing.assert_allclose(product, np.full((8, 8), 1 / 8), rtol=0, atol=1e-15)
    assert not np.allclose(schedule(1) @ schedule(0), np.full((8, 8), 1 / 8))


def test_one_peer_exponential_is_exact_too_when_n_is_a_power_of_two():
    schedule = build_schedule(Config(topology="one_peer_exponential", clients=8))
    product = schedule(2) @ schedule(1) @ schedule(0)
    np.testing.assert_allclose(product, np.full((8, 8), 1 / 8), rtol=0, atol=1e-15)


# -- rho


@pytest.mark.parametrize(
    ("p", "published"),
    [(0.5, 0.395), (0.2, 0.660), (0.1, 0.801), (0.05, 0.895), (0.02, 0.957), (0.01, 0.978)],
)
def test_rho_of_pairs_is_the_published_one(p, published):
    assert rho_of(Config(p=p)) == pytest.approx(published, abs=0.01)


def test_rho_of_ring_and_of_sequential_is_the_published_one():
    assert rho_of(Config(topology="ring")) == pytest.approx(0.873, abs=5e-4)
    assert rho_of(Config(p=0.1, weights="sequential")) == pytest.approx(0.775, abs=0.01)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rho_of_pairs_has_no_bias(p):
    """Against the expectation over all 64 graphs of 4 clients, each with its probability."""
    expected, edges = np.zeros((4, 4)), list(itertools.combinations(range(4), 2))
    for present in itertools.product([0, 1], repeat=len(edges)):
        graph = nx.Graph([edge for edge, there in zip(edges, present, strict=True) if there])
        graph.add_nodes_from(range(4))
        W = np.zeros((4, 4))
        for i, j in graph.edges:
            W[i, j] = W[j, i] = 1 / (1 + max(graph.degree[i], graph.degree[j]))
        M = W + np.diag(1 - W.sum(axis=1)) - 1 / 4
        expected += p ** sum(present) * (1 - p) ** (6 - sum(present)) * M.T @ M
    exact = math.sqrt(np.linalg.eigvalsh(expected)[-1])
    schedule = build_schedule(Config(p=p, clients=4))
    by_trace = measure_rho(schedule, 4, static=False, rounds=8000, exchangeable=True)
    by_eigenvalue = measure_rho(schedule, 4, static=False, rounds=4000)
    assert by_trace == pytest.approx(exact, abs=0.005)
    assert by_eigenvalue == pytest.approx(exact, abs=0.015)


def test_rho_of_a_config_takes_the_estimate_without_bias():
    # 60,000 rounds give .3897 and .8878; the largest eigenvalue over 2,000 gives .402 and .894.
    assert rho_of(Config(p=0.5)) == pytest.approx(0.3897, abs=0.004)
    assert rho_of(Config(p=0.05)) == pytest.approx(0.8878, abs=0.004)


def test_rho_of_a_schedule_that_does_not_vary_is_that_of_its_round():
    W = build_schedule(Config(topology="ring", weights="sequential", clients=3))(0)
    assert measure_rho(lambda t: W, 3, static=False) == pytest.approx(rho_of_round(W))


def test_rho_of_the_one_peer_schedules_is_exact():
    # Each of the log2 N rounds removes half of the remaining modes; the worst survives all but one.
    assert rho_of(Config(topology="hypercube", clients=8)) == pytest.approx(math.sqrt(2 / 3))
    config = Config(topology="one_peer_exponential", clients=8)
    assert rho_of(config) == pytest.approx(
        measure_rho(build_schedule(config), 8, static=False, rounds=3), abs=1e-12
    )


def test_measures():
    cube = measure(Config(topology="hypercube", clients=8))
    assert (cube.degree, cube.max_degree, cube.rounds, cube.exact) == (1, 1, 3, True)
    star = measure(Config(topology="star", clients=6))
    assert (star.degree, star.max_degree) == (pytest.approx(10 / 6), 5)
    ring = measure(Config(topology="ring"))
    assert (ring.rounds, ring.exact) == (math.ceil(math.log(1e-3) / math.log(ring.rho)), False)
    assert measure(Config(p=0, clients=2)).rounds is None
    assert measure(Config(clients=1)).rounds == 1


def test_rho_at_the_extremes():
    assert rho_of(Config(topology="complete")) == pytest.approx(0, abs=1e-12)
    assert rho_of(Config(p=0)) == pytest.approx(1)
    assert rho_of(Config(clients=1)) == 0
    assert rho_of_round(np.ones((1, 1))) == 0
    assert rho_of_round(np.eye(5)) == pytest.approx(1)


def test_rho_of_a_directed_round_is_a_singular_value():
    W = build_schedule(Config(topology="ring", weights="sequential", clients=3))(0)
    M = W - 1 / 3
    assert rho_of_round(W) == pytest.approx(math.sqrt(np.linalg.eigvalsh(M.T @ M)[-1]))
    assert rho_of_round(W) != pytest.approx(np.abs(np.linalg.eigvals(M)).max())


# -- files


def write(folder: Path, text: str) -> str:
    path = folder / "edges.txt"
    path.write_text(text)
    return str(path)


def test_an_edge_list_is_a_static_graph(tmp_path):
    path = write(tmp_path, "0 1\n1 2  # the bridge\n2,3\n1 0\n")
    schedule = build_schedule(Config(topology="file", clients=4, edges_file=path))
    assert [neighbours(schedule(7), i) for i in range(4)] == [[1], [0, 2], [1, 3], [2]]


def test_a_trace_plays_its_rounds_and_starts_over(trace_file):
    schedule = build_schedule(Config(topology="file", clients=5, edges_file=trace_file))
    for start in (0, 3):
        met = [[neighbours(schedule(start + t), i) for i in range(5)] for t in range(3)]
        assert met[0] == [[1], [0, 2], [1], [], []]
        assert met[1] == [[], [], [], [], []]
        assert met[2] == [[3], [], [], [0, 4], [3]]


BAD_FILES = [
    ("0 1\n1 x\n", r"line 2: '1 x' is neither"),
    ("0 1\n\n1 -2\n", r"line 3: '1 -2' is neither"),
    ("0 1\n0 1 2\n", r"line 2: '0 1 2' is neither"),
    ("0 1 2 3\n", r"line 1: '0 1 2 3' is neither"),
    ("0 1\n1 4\n", r"line 2: there is no client 4; the 4 clients are numbered from 0 to 3"),
    ("5 0 1\n9 4 0\n", r"line 2: there is no client 4"),
    ("0 1\n2 2\n", r"line 2: client 2 meets itself"),
    ("# nothing\n", r"has no edges"),
    ("0 1\n", r"not connected: 2 of 4 clients are cut off from the rest \(2, 3\)"),
    ("0 1\n1 2\n", r"not connected: 1 of 4 clients are cut off from the rest \(3\)"),
    ("20 0 1\n", r"first contact is in round 20 and the run has 20 rounds"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_wrong_file_is_refused_with_the_line(tmp_path, text, message):
    config = Config(topology="file", clients=4, edges_file=write(tmp_path, text))
    with pytest.raises(ValueError, match=message):
        build_schedule(config)


# -- other errors

BAD_CONFIGS = [
    (Config(topology="file"), "needs edges_file"),
    (Config(topology="file", edges_file="/no/such/file"), "Cannot read edges_file /no/such/file"),
    (Config(topology="torus", clients=11), "such as 9, 12 or 16"),
    (Config(topology="torus", clients=2), "such as 4, 6 or 9"),
    (Config(topology="hypercube", clients=10), "such as 8 or 16; there are 10"),
    (Config(topology="hypercube", clients=1), "such as 2 or 4; there are 1"),
    (Config(topology="hypercube", clients=8, weights="laplacian"), "weights of its own"),
    (Config(topology="erdos_renyi", p=0), "None of 100 .* Raise p to 0.46"),
    (Config(topology="base", weights="laplacian"), "weights of its own"),
    (Config(topology="regular", clients=3), "isn't given, .* 4; .* of 3 clients takes an even one"),
    (Config(topology="regular", clients=4), "degree isn't given, and then it is 4; .* one below 4"),
    (Config(topology="regular", clients=4, degree=4), "degree is 4; .* takes one below 4"),
    (Config(topology="regular", clients=6, degree=1), "None of 100 .* Raise degree"),
    (Config(topology="small_world", degree=3), "takes an even one below 10"),
    (Config(topology="rnig"), "Did you mean ring"),
    (Config(weights="metropolys"), "Did you mean metropolis"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_a_config_without_a_graph_is_refused_with_advice(config, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(config)


def test_weights_and_topologies_are_those_of_the_config():
    assert tuple(WEIGHTS) == get_args(Weights)
    assert all(row.summary for row in (*WEIGHTS.values(), *TOPOLOGIES.values()))
