"""Figures by definition, in words of their own, and that nobody else computes them."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

import plait
from fake_runs import events
from plait.config import Config
from plait.events import Evaluated, RoundDone, Started
from plait.figures import FIGURES, TAKES, class_table, client_table, macro_f1, summarize, taken
from plait.metrics import LayerState
from plait.runs.loggers import numbers

CONFIG = Config(clients=4, rounds=3)
SAID = list(events(CONFIG, 0.8))
ROUND, EVALUATION = SAID[-2], SAID[-1]
KEYS = [
    "method", "task", "seed", "rounds", "clients", "topology", "metric", "majority",
    "accuracy_client_mean", "accuracy_client_std", "accuracy_client_min",
    "accuracy_averaged_model", "loss_client_mean", "loss_averaged_model", "cross_term",
    "consensus_A", "consensus_B", "rho", "sent_bytes", "worker_bytes", "train_seconds",
    "mix_seconds", "eval_seconds", "wall_seconds", "config_digest",
]  # fmt: skip
LOGGED = {
    "train/loss_client_mean", "train/loss_client_max", "round/cross_term", "round/consensus_A",
    "round/consensus_B", "round/rho", "round/sent_bytes", "time/train_seconds",
    "time/mix_seconds", "eval/accuracy_client_mean", "eval/accuracy_client_std",
    "eval/accuracy_client_min", "eval/accuracy_averaged_model", "eval/loss_client_mean",
    "eval/loss_averaged_model", "time/eval_seconds",
}  # fmt: skip


def of_event(event) -> dict[str, float]:
    return {k: one.value(event) for k, one in FIGURES.items() if isinstance(event, one.kinds)}


def test_layers_are_put_together_by_definition():
    layers = [LayerState("a", 1.0, 2.0, 3.0, 0, 0, 0), LayerState("b", 0.5, 0.25, 4.0, 0, 0, 0)]
    found = of_event(dataclasses.replace(ROUND, after=layers))
    assert found["cross_term"] == 5
    assert (found["consensus_A"], found["consensus_B"], found["apart"]) == (1.5, 2.25, 3.75)


def test_a_peer_that_sees_itself_alone_knows_no_distances():
    found = of_event(dataclasses.replace(ROUND, after=[]))
    unknown = {name for name, value in found.items() if math.isnan(value)}
    assert unknown == {"cross_term", "consensus_A", "consensus_B", "apart"}
    assert FIGURES["cross_term"].shown(math.nan) == ""


def test_losses_of_those_that_rest_count_for_nothing():
    for losses, mean in (([math.nan, 1.0, 3.0], 2.0), ([math.nan], math.nan)):
        found = of_event(dataclasses.replace(ROUND, train_losses=losses))
        assert found["train_loss_client_mean"] == pytest.approx(mean, nan_ok=True)
        assert found["train_loss_client_max"] == pytest.approx(
            max(losses[1:] or losses), nan_ok=True
        )


def test_a_summary_takes_the_last_of_states_and_the_sum_of_costs():
    found = taken(SAID)
    assert found["accuracy_client_mean"] == np.mean(EVALUATION.scores)
    assert found["accuracy_client_std"] == np.std(EVALUATION.scores)
    assert found["sent_bytes"] == 3 * ROUND.sent_bytes
    assert found["train_seconds"] == 3 * ROUND.train_seconds
    # Preparing takes 1 s, a round 2 s, an evaluation half of one.
    assert found["wall_seconds"] == 1 + 3 * 2 + 4 * 0.5


def test_what_nothing_was_said_of_is_left_out():
    assert set(taken(SAID[:1])) == {"majority", "rho"}
    assert taken(SAID[:2])["accuracy_client_min"] == pytest.approx(0.4)


def test_a_language_model_has_perplexity_and_a_base():
    said = [dataclasses.replace(SAID[0], objective="language"), *SAID[1:]]
    found = taken(said)
    more = {"perplexity_client_mean", "accuracy_base", "perplexity_base"}
    assert set(found) - set(taken(SAID)) == more
    assert found["perplexity_client_mean"] == pytest.approx(math.exp(found["loss_client_mean"]))
    assert found["accuracy_base"] == SAID[1].averaged_score
    late = taken([said[0], *said[2:]])  # of a peer that joined later
    assert math.isnan(late["accuracy_base"])


def test_the_names_of_the_summary_and_of_loggers_stay():
    assert list(summarize(CONFIG, SAID)) == KEYS
    assert {name for event in SAID for name in numbers(event)[1]} == LOGGED


def test_classes_have_scores_and_shares_of_their_rows():
    done = dataclasses.replace(EVALUATION, confusion=[[3, 1], [0, 4]])
    assert class_table([*SAID[:-1], done]) == [
        ["class", "precision", "recall", "F1", "no", "yes"],
        ["no", "1.000", "0.750", "0.857", "75", "25"],
        ["yes", "0.800", "1.000", "0.889", "0", "100"],
        ["macro F1", "", "", "0.873", "", ""],
    ]
    assert class_table(SAID) == []
    assert taken([done])["macro_f1_clients"] == pytest.approx((6 / 7 + 8 / 9) / 2)
    # A class that never comes, and that nobody is called, doesn't count.
    assert macro_f1([[3, 1, 0], [0, 4, 0], [0, 0, 0]]) == taken([done])["macro_f1_clients"]


def test_clients_have_scores_on_rows_of_their_own():
    own = dataclasses.replace(EVALUATION, own_scores=[0.5, 1, 0, 0.5], own_rows=[4, 4, 4, 8])
    head, *lines = client_table([*SAID[:-1], own])
    assert head == ["client", "own rows", "score on them", "on all 100"]
    assert lines[3] == ["3", "8", "0.500", "0.900"]
    assert client_table(SAID) == []
    found = taken([own])
    assert (found["accuracy_own_mean"], found["accuracy_own_min"]) == (0.5, 0)


def test_every_figure_is_of_an_event_and_has_a_use():
    for name, one in FIGURES.items():
        assert one.title, name
        assert set(one.kinds) <= {Started, RoundDone, Evaluated}
        assert one.take or one.logged or one.unit, name
        assert one.take in ("", *TAKES)


def test_a_cell_has_the_unit_of_its_column():
    assert FIGURES["sent_bytes"].shown(12_345_678) == "12.3"
    assert FIGURES["cross_term"].shown(0.01234) == "0.012"
    assert FIGURES["wall_seconds"].shown(61.4) == "61"


@pytest.mark.parametrize("name", ["cross_term", "consensus_A", "consensus_B"])
def test_nobody_else_puts_layers_together(name):
    root = Path(plait.__file__).parent
    using = {
        path.name for path in root.rglob("*.py") if re.search(rf"\w\.{name}\b", path.read_text())
    }
    assert using == {"figures.py"}
