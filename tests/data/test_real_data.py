"""The embedded model and texts, and GLUE where it is at hand: does it really learn?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import plait
from plait.config import Config
from plait.engines.job import prepare
from plait.engines.simulate import simulate
from plait.events import Evaluated, Started

GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"


def result(config):
    """The first event and the last evaluation of a run."""
    events = list(plait.Run(config))
    started = next(event for event in events if isinstance(event, Started))
    return started, next(event for event in reversed(events) if isinstance(event, Evaluated))


def test_minilm_learns_questions_in_a_few_steps():
    started, last = result(
        Config(
            task="trec", label_skew="iid", topology="complete", clients=3, rounds=3, local_steps=6,
            batch_size=8, top_layers=1, lr=5e-3, eval_every=3, eval_rows=1,
        )
    )  # fmt: skip
    assert min(last.scores) > started.majority + 0.2


@pytest.mark.slow
@pytest.mark.skipif(not GLUE.is_dir(), reason="no GLUE folder beside the repository")
@pytest.mark.parametrize("task", ["sst2", "sick"])
def test_minilm_learns_glue(task):
    started, last = result(
        Config(
            task=task, glue_dir=str(GLUE), label_skew="paper", topology="ring", rounds=8,
            local_steps=8, eval_every=8, eval_rows=1, lr=2e-3,
        )
    )  # fmt: skip
    assert sum(last.scores) / len(last.scores) > started.majority + 0.05


@pytest.mark.slow
def test_bfloat16_changes_the_loss_by_less_than_seeds_do():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        for seed in (0, 1):
            config = Config(task="trec", topology="ring", label_skew="dirichlet:0.5", rounds=4,
                            eval_every=4, eval_rows=1, dtype=dtype, seed=seed)  # fmt: skip
            _, last = result(config)
            losses[dtype, seed] = sum(last.losses) / len(last.losses)
    between_types = abs(losses["float32", 0] - losses["bfloat16", 0])
    between_seeds = abs(losses["float32", 0] - losses["float32", 1])
    assert between_types < between_seeds / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"method": "adf", "switch_every": 1}, {"method": "rolora"}),
        ({"method": "adf", "switch_every": 100_000}, {"method": "ffa"}),
    ],
)
def test_methods_that_coincide_do_so_on_real_text(one, other):
    common = {
        "topology": "complete", "rounds": 3, "label_skew": "dirichlet:0.5", "local_steps": 2,
        "eval_every": 3, "eval_rows": 1,
    }  # fmt: skip
    stacks = []
    for settings in (one, other):
        job = prepare(Config(**common, **settings))
        stack = job.initial_stack()
        events = list(simulate(job, stack))
        assert isinstance(events[-1], Evaluated)
        stacks.append((stack, events[-1]))
    (first, one_last), (second, other_last) = stacks
    for factor in first.factors:
        torch.testing.assert_close(first.factors[factor], second.factors[factor], rtol=0, atol=1e-6)
    assert one_last.losses == pytest.approx(other_last.losses, abs=1e-6)
