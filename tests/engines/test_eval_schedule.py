"""When a run evaluates: what is asked for, or what costs less than a quarter of its operations."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from conftest import tiny_job
from plait.config import Config
from plait.engines.eval_schedule import EVERY, SHARE, EvalSchedule, eval_schedule
from plait.engines.simulate import simulate
from plait.events import Evaluated


def configs(count: int):
    """Configs of many sizes, each with the rows of its evaluated split."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        sizes = {
            name: int(np.exp(rng.uniform(0, np.log(most))))
            for name, most in (
                ("rounds", 2000), ("clients", 1000), ("local_steps", 50), ("batch_size", 64),
                ("eval_rows", 3000), ("held_out", 10_000),
            )
        }  # fmt: skip
        num_rows = sizes.pop("held_out")
        if rng.random() < 0.5:
            sizes.pop("eval_rows")
        yield Config(**sizes), num_rows


def operations(config: Config, schedule: EvalSchedule, num_rows: int) -> tuple[int, int]:
    """Texts that go forward: in training, where each goes back too, and in evaluation, by hand."""
    trained = evaluated = 0
    evaluated += num_rows  # before the first round, where one model is everybody's
    for round_ in range(config.rounds):
        trained += 2 * config.clients * config.local_steps * config.batch_size
        if schedule.after(round_):
            rows = schedule.rows_after(round_)
            evaluated += (config.clients + 1) * (num_rows if rows is None else min(rows, num_rows))
    return trained, evaluated


def test_it_takes_less_than_a_quarter_unless_only_first_and_last_are_evaluated():
    seen = set()
    for config, num_rows in configs(3000):
        schedule = eval_schedule(config, num_rows)
        seen.add(schedule.every)
        evaluated = [round_ for round_ in range(config.rounds) if schedule.after(round_)]
        assert evaluated[-1] == config.rounds - 1
        assert schedule.rows_after(config.rounds - 1) is None
        if schedule.every is None:
            assert evaluated == [config.rounds - 1]
            continue
        trained, cost = operations(config, schedule, num_rows)
        assert cost <= SHARE * (trained + cost)
        assert SHARE == 0.25
        assert schedule.rows is None or 0 < schedule.rows < num_rows
        if config.eval_rows:
            assert (schedule.rows or num_rows) <= config.eval_rows
    assert len(seen) > 8
    assert seen - {None} <= set(EVERY)


def test_it_is_as_often_as_can_be():
    for config, num_rows in configs(500):
        schedule = eval_schedule(config, num_rows)
        before = [every for every in EVERY if schedule.every and every < schedule.every][-1:]
        for every in before:
            more = dataclasses.replace(schedule, every=every)
            trained, cost = operations(config, more, num_rows)
            # An evaluation that falls on the last round is paid for already.
            last = config.rounds % every == 0
            assert cost > SHARE * (trained + cost) or last


def test_a_longer_training_is_never_evaluated_less_often():
    for config, num_rows in configs(300):
        configs_ = [dataclasses.replace(config, local_steps=steps) for steps in (1, 2, 4, 8, 16)]
        found = [eval_schedule(one, num_rows).every or np.inf for one in configs_]
        of_rows = [eval_schedule(one, num_rows).rows or num_rows for one in configs_]
        for (a, b), (few, more) in zip(pairwise(found), pairwise(of_rows), strict=True):
            assert few <= more or a == np.inf
            assert b <= a or few < more


def test_it_is_a_function_of_config_and_rows_alone():
    for config, num_rows in configs(100):
        assert eval_schedule(config, num_rows) == eval_schedule(
            Config(**config.to_json()), num_rows
        )
        other = dataclasses.replace(config, seed=1, method="ffa", lr=0.5)
        assert eval_schedule(other, num_rows) == eval_schedule(config, num_rows)


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (9, [4])])
def test_what_is_asked_for_is_done(every, expected):
    for rows in (None, 7):
        config = Config(rounds=5, eval_every=every, eval_rows=rows)
        schedule = eval_schedule(config, 1000)
        assert schedule == EvalSchedule(5, every, rows)
        assert [round_ for round_ in range(5) if schedule.after(round_)] == expected
        assert [schedule.rows_after(round_) for round_ in (-1, 0, 4)] == [rows, rows, None]


def test_a_run_follows_it():
    config = Config(clients=3, rounds=6, local_steps=4, batch_size=6, rank=2, topology="ring")
    job = tiny_job(config)
    assert job.evaluations == EvalSchedule(6, 2, None)
    found = [e for e in simulate(job, job.initial_stack()) if isinstance(e, Evaluated)]
    assert [event.round for event in found] == [-1, 1, 3, 5]
    assert (job.started.eval_every, job.started.eval_rows) == (2, 20)


def test_options_are_texts_to_be_read_as_well():
    config = Config(local_steps=5, rounds=50)
    plain, with_six = (eval_schedule(config, 300, texts) for texts in (1, 7))
    assert plain.every is not None
    assert with_six.every is None or with_six.every > plain.every
