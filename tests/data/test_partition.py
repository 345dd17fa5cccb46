from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.config import Config
from plait.data import partition
from plait.data.objectives import CLASSIFICATION, REGRESSION
from plait.data.partition import PARTITIONS, largest_remainder, paper_mixtures
from plait.data.tasks import Rows, Task, load_task

KEYS = ("clinic", "bank", "school", "court")


def make_rows(labels, keys: bool = False) -> Rows:
    labels = np.asarray(labels)
    owner = tuple(KEYS[i % len(KEYS)] for i in range(len(labels))) if keys else None
    return Rows(tuple((str(i),) for i in range(len(labels))), labels, owner)


def balanced(C: int, each: int, keys: bool = False) -> Rows:
    return make_rows(np.tile(np.arange(C), each), keys)


def deal(rows: Rows, C: int, config: Config) -> list[np.ndarray]:
    """Rows of C classes, or of a regression for one, dealt as the config says."""
    names = tuple(map(str, range(C))) if C > 1 else ()
    objective = CLASSIFICATION if C > 1 else REGRESSION
    return partition.deal(Task("rows", rows, rows, rows, names, "", objective), config)


def counts_of(rows: Rows, hands, C: int) -> np.ndarray:
    return np.stack([np.bincount(rows.labels[hand], minlength=C) for hand in hands])


def skew_of(name: str) -> str:
    example = PARTITIONS[name].example
    return f"{name}:{example}" if example else name


# -- conformance: what holds for every partition

TAKE_A_SIZE = [name for name in PARTITIONS if name != "sizes"]


@pytest.mark.parametrize("client_size", [None, 30])
@pytest.mark.parametrize("C", [2, 3, 6])
@pytest.mark.parametrize("name", PARTITIONS)
def test_hands_are_disjoint_sorted_and_not_empty(name, C, client_size):
    rows = balanced(C, 100, keys=True)
    if name not in TAKE_A_SIZE:
        client_size = None
    config = Config(clients=4, label_skew=skew_of(name), client_size=client_size)
    hands = deal(rows, C, config)
    assert len(hands) == 4
    dealt = np.concatenate(hands)
    assert len(set(dealt.tolist())) == len(dealt)
    assert 0 <= dealt.min() <= dealt.max() < len(rows)
    for hand in hands:
        assert hand.dtype == np.int64
        assert len(hand) > 0
        assert (np.diff(hand) > 0).all()
    if client_size:
        assert [len(hand) for hand in hands] == [client_size] * 4


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_seed_decides(name):
    rows = balanced(3, 100, keys=True)

    def dealt(seed: int, **other: int) -> list[list[int]]:
        size = 40 if name in TAKE_A_SIZE else None
        config = Config(clients=4, label_skew=skew_of(name), client_size=size, seed=seed, **other)
        return [hand.tolist() for hand in deal(rows, 3, config)]

    assert dealt(0) == dealt(0, rounds=99)
    assert dealt(0) != dealt(1)


@pytest.mark.parametrize("name", PARTITIONS)
def test_regression_is_dealt_or_refused(name):
    rows = make_rows(np.linspace(0, 5, 80, dtype=np.float32), keys=True)
    config = Config(clients=4, label_skew=skew_of(name))
    if PARTITIONS[name].needs_classes:
        with pytest.raises(
            ValueError, match=f"{name}.* is a regression: use iid or shards or sizes or key"
        ):
            deal(rows, 1, config)
    else:
        assert sorted(np.concatenate(deal(rows, 1, config)).tolist()) == list(range(80))


@pytest.mark.parametrize("name", PARTITIONS)
def test_too_large_a_client_size_is_refused(name):
    config = Config(clients=4, label_skew=skew_of(name), client_size=61)
    with pytest.raises(ValueError, match="61"):
        deal(balanced(3, 80, keys=True), 3, config)


@pytest.mark.parametrize("name", [name for name in PARTITIONS if name != "key"])
def test_more_clients_than_rows_is_refused(name):
    with pytest.raises(ValueError, match=r"clients|Client"):
        deal(balanced(2, 3), 2, Config(clients=7, label_skew=skew_of(name)))


@pytest.mark.parametrize("name", PARTITIONS)
def test_summaries_are_one_line(name):
    assert 10 < len(PARTITIONS[name].summary) < 80


# -- properties

LABELS = st.lists(st.integers(0, 3), min_size=40, max_size=300)


@settings(max_examples=40, deadline=None)
@given(labels=LABELS, clients=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_iid_deals_every_row_evenly(labels, clients, seed):
    hands = deal(make_rows(labels), 4, Config(clients=clients, seed=seed, label_skew="iid"))
    assert sorted(np.concatenate(hands).tolist()) == list(range(len(labels)))
    lengths = [len(hand) for hand in hands]
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=40, deadline=None)
@given(labels=LABELS, clients=st.integers(1, 5), alpha=st.floats(0.3, 50), seed=st.integers(0, 999))
def test_dirichlet_deals_every_row_or_says_why_not(labels, clients, alpha, seed):
    config = Config(clients=clients, seed=seed, label_skew=f"dirichlet:{alpha}", batch_size=4)
    try:
        hands = deal(make_rows(labels), 4, config)
    except ValueError as error:
        assert "always had fewer than" in str(error)  # noqa: PT017 - both outcomes are right
        return
    assert sorted(np.concatenate(hands).tolist()) == list(range(len(labels)))
    assert min(map(len, hands)) >= min(4, len(labels) // (2 * clients))


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=8)
    .filter(lambda rows: all(map(sum, rows))),
    available=st.lists(st.integers(30, 200), min_size=3, max_size=3),
    size=st.none() | st.integers(1, 60),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_mixtures_are_exact_or_refused(tmp_path_factory, weights, available, size, seed):
    file = tmp_path_factory.mktemp("mix") / "mix.json"
    file.write_text(json.dumps(weights))
    rows = make_rows(np.repeat(np.arange(3), available))
    shares = np.array(weights) / np.sum(weights, axis=1, keepdims=True)
    config = Config(clients=len(weights), label_skew=str(file), client_size=size, seed=seed)

    def fits(n: int) -> bool:
        return bool((largest_remainder(n, shares).sum(0) <= available).all())

    if size is not None and not fits(size):
        with pytest.raises(ValueError, match=r"Label \d runs out"):
            deal(rows, 3, config)
        return
    got = counts_of(rows, deal(rows, 3, config), 3)
    n = int(got[0].sum())
    assert size in (None, n)
    np.testing.assert_array_equal(got, largest_remainder(n, shares))
    if size is None:  # no larger size fits: checked one by one, where the code has a bound
        assert not any(fits(m) for m in range(n + 1, sum(available) + 1))


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(0, 10_000),
    weights=st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any),
)
def test_largest_remainder_is_within_one_of_exact(size, weights):
    shares = np.array(weights) / sum(weights)
    counts = largest_remainder(size, shares)
    assert counts.sum() == size
    assert (np.abs(counts - size * shares) < 1).all()
    assert (counts[shares == 0] == 0).all()


# -- each partition by its own promise


def test_paper_binary_is_the_papers_protocol():
    rows = balanced(2, 500)
    counts = counts_of(rows, deal(rows, 2, Config(clients=10)), 2)
    assert counts.tolist() == [[90, 10]] * 3 + [[10, 90]] * 3 + [[50, 50]] * 4


def test_paper_three_classes_is_the_papers_protocol():
    rows = balanced(3, 500)
    counts = counts_of(rows, deal(rows, 3, Config(clients=10, client_size=100)), 3)
    assert counts.tolist() == [[90, 5, 5]] * 4 + [[5, 90, 5]] * 3 + [[5, 5, 90]] * 3


def test_paper_keeps_its_proportions_for_other_numbers_of_clients():
    assert (
        paper_mixtures(20, np.array([0.5, 0.5]))[:, 0].tolist() == [0.9] * 6 + [0.1] * 6 + [0.5] * 8
    )
    assert paper_mixtures(1, np.array([0.5, 0.5])).tolist() == [[0.5, 0.5]]
    for C in range(2, 9):
        for N in (1, 2, 7, 50):
            mixtures = paper_mixtures(N, np.full(C, 1 / C))
            assert mixtures.shape == (N, C)
            np.testing.assert_allclose(mixtures.sum(1), 1)


def test_paper_gives_a_rare_class_no_client_of_its_own():
    mixtures = paper_mixtures(10, np.array([0.02, 0.2, 0.2, 0.2, 0.19, 0.19]))
    assert np.bincount(mixtures.argmax(1), minlength=6).tolist() == [0, 2, 2, 2, 2, 2]
    np.testing.assert_allclose(np.sort(mixtures, axis=1), [[0.02] * 5 + [0.9]] * 10)


def test_paper_on_the_demo_uses_most_of_the_data():
    train = load_task(Config(task="demo")).train
    hands = deal(train, 6, Config())
    assert {len(hand) for hand in hands} == {308}
    shares = counts_of(train, hands, 6) / 308
    np.testing.assert_allclose(shares.max(1), 0.9, atol=0.01)


def test_running_out_says_which_label_and_how_many():
    rows = make_rows([0] * 500 + [1] * 100)
    message = "Label 1 runs out: 10 clients need 250 rows of it and there are 100.*client_size than"
    with pytest.raises(ValueError, match=message):
        deal(rows, 2, Config(clients=10, client_size=50))


def test_small_alpha_skews_more_than_large_alpha():
    rows = balanced(4, 500)

    def skew(alpha: float, size: int | None) -> float:
        config = Config(clients=10, label_skew=f"dirichlet:{alpha}", client_size=size)
        counts = counts_of(rows, deal(rows, 4, config), 4)
        return float((counts.max(1) / counts.sum(1)).mean())

    for size in (None, 60):
        assert skew(0.1, size) > 0.7
        assert skew(1000, size) < 0.35


def test_equal_dirichlet_follows_the_prior():
    rows = make_rows([0] * 3000 + [1] * 1000)
    config = Config(clients=60, label_skew="dirichlet:1000", client_size=20)
    counts = counts_of(rows, deal(rows, 2, config), 2)
    assert counts.sum(0) / counts.sum() == pytest.approx([0.75, 0.25], abs=0.03)


def test_dirichlet_leaves_no_client_tiny():
    rows = balanced(2, 400)
    for seed in range(20):
        hands = deal(rows, 2, Config(clients=10, label_skew="dirichlet:0.3", seed=seed))
        assert min(map(len, hands)) >= 10


def test_dirichlet_that_cannot_be_names_the_fix():
    rows = balanced(2, 400)
    with pytest.raises(ValueError, match=r"1000 draws .*fewer than 4 of the 800.*--client-size 4"):
        deal(rows, 2, Config(clients=100, label_skew="dirichlet:0.1"))
    with pytest.raises(ValueError, match=r"Label \d runs out.*smaller client_size than 266"):
        deal(rows, 2, Config(clients=3, label_skew="dirichlet:0.01", client_size=266))


def test_shards_are_of_sorted_rows_and_as_many_for_each():
    rows = make_rows(np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60)))
    for seed in range(5):
        hands = deal(rows, 10, Config(clients=30, label_skew="shards:2", seed=seed))
        counts = counts_of(rows, hands, 10)
        # Sixty shards of ten rows: a label has six of them, and none has two labels.
        assert (counts.sum(1) == 20).all()
        assert (counts % 10 == 0).all()
        assert (counts > 0).sum(1).max() == 2
    assert sorted(np.concatenate(hands).tolist()) == list(range(600))
    one = counts_of(rows, deal(rows, 10, Config(clients=10, label_skew="shards:1")), 10)
    assert sorted(one.argmax(1).tolist()) == list(range(10))
    some = deal(rows, 10, Config(clients=7, label_skew="shards:3", client_size=31))
    assert (counts_of(rows, some, 10) > 0).sum(1).max() <= 6
    assert [len(hand) for hand in some] == [31] * 7


def test_sizes_are_given():
    rows = balanced(3, 40)
    hands = deal(rows, 3, Config(clients=3, label_skew="sizes:70,7,30"))
    assert [len(hand) for hand in hands] == [70, 7, 30]
    with pytest.raises(ValueError, match=r"sizes of 3 clients and there are 10: .*--clients 3"):
        deal(rows, 3, Config(label_skew="sizes:70,7,30"))
    with pytest.raises(ValueError, match="needs 121 rows and there are 120"):
        deal(rows, 3, Config(clients=2, label_skew="sizes:120,1"))
    with pytest.raises(ValueError, match="Client 1 of 2 would get no rows"):
        deal(rows, 3, Config(clients=2, label_skew="sizes:120,0"))


def test_key_is_one_client_for_each_key():
    rows = balanced(2, 40, keys=True)
    hands = deal(rows, 2, Config(clients=4, label_skew="key"))
    assert rows.keys is not None
    assert [{rows.keys[i] for i in hand} for hand in hands] == [{key} for key in sorted(KEYS)]
    assert sum(map(len, hands)) == len(rows)


def test_key_on_the_natural_clients():
    train = load_task(Config(task="sentiment")).train
    hands = deal(train, 2, Config(task="sentiment", clients=4, label_skew="key"))
    assert [len(hand) for hand in hands] == [9888, 4559, 3229, 3910]


def test_key_refusals():
    with pytest.raises(ValueError, match=r"10 clients and 4 keys \(bank, clinic, .*--clients 4"):
        deal(balanced(2, 40, keys=True), 2, Config(label_skew="key"))
    with pytest.raises(ValueError, match="pass --key-column"):
        deal(balanced(2, 40), 2, Config(label_skew="key"))
    config = Config(clients=4, label_skew="key", client_size=21)
    with pytest.raises(ValueError, match=r"Client 0 has 20 rows .* client_size is 21"):
        deal(balanced(2, 40, keys=True), 2, config)


@pytest.mark.parametrize(
    ("skew", "message"),
    [
        ("papre", r"Unknown label skew 'papre'. Did you mean paper"),
        ("dirichlet", r"'dirichlet': write `dirichlet:0\.5`"),
        ("iid:3", r"'iid:3': write `iid`"),
        ("dirichlet:x", "alpha must be a number above 0"),
        ("dirichlet:0", "alpha must be a number above 0"),
        ("shards:0", "shards of a client must be a number above 0"),
        ("shards:x", "shards of a client must be a number above 0"),
        ("sizes:1,x", "write numbers of rows, such as sizes:100,200,50"),
        ("dirichlet:nan", "alpha must be a number above 0"),
        ("no/such.json", "a list for each of 2 clients, each with a weight for each of 3 labels"),
    ],
)
def test_wrong_names_and_arguments(skew, message):
    with pytest.raises(ValueError, match=message):
        deal(balanced(3, 40), 3, Config(clients=2, label_skew=skew))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2, 3]]", r"shape \(1, 3\); clients and labels make \(2, 3\)"),
        ("[[1, 2, 3], [1, 2]]", "a list for each of 2 clients"),
        ('{"a": 1}', "a list for each of 2 clients"),
        ("[[1, 0, 0], [1, -1, 1]]", "the weights of client 1 are .* 0 or more"),
        ("[[0, 0, 0], [1, 1, 1]]", "the weights of client 0 are .* not all 0"),
        ("[[NaN, 0, 1], [1, 1, 1]]", "the weights of client 0"),
        ("nonsense", "Could not read"),
    ],
)
def test_wrong_mixture_files(tmp_path, content, message):
    (tmp_path / "mix.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        deal(balanced(3, 40), 3, Config(clients=2, label_skew=str(tmp_path / "mix.json")))
