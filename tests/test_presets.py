"""Presets that need the hub and large models, on stand-ins for both."""

from __future__ import annotations

import dataclasses
import math

import pytest

from conftest import save_language_model
from plait.engines.job import dealt
from plait.model.embedded import EMBEDDED
from plait.presets import build_preset
from plait.runs.run import Run

TINY = {
    "clients": 2, "rounds": 1, "local_steps": 1, "batch_size": 2, "rank": 4, "alpha": 8.0,
    "dtype": "float32", "eval_every": 1, "client_size": None,
}  # fmt: skip


class Split(list):
    """A split as `datasets` has it."""

    column_names = ("instruction", "input", "output", "text")


ROWS = [
    {"instruction": f"Is {i} good?", "input": ("", f"{i} rose.")[i % 2],
     "output": ("positive", "negative")[i % 3 == 0], "text": "all of it"}
    for i in range(40)
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "clients", "load_in"),
    [
        ("flowertune-general", "vicgalle/alpaca-gpt4", 20, "4bit"),
        ("flowertune-finance", "FinGPT/fingpt-sentiment-train", 50, "4bit"),
        ("openfedllm", "vicgalle/alpaca-gpt4", 20, "8bit"),
    ],
)
def test_a_protocol_of_others_runs_on_rows_of_its_kind(
    name, data, clients, load_in, tmp_path, monkeypatch
):
    def load(asked, subset, _else):
        assert (asked, subset) == (data, None)
        return {"train": Split(ROWS)}

    monkeypatch.setattr("plait.data.sources._load_dataset", load)
    preset = build_preset(name)
    assert (preset.clients, preset.rounds, preset.local_steps * preset.batch_size) == (
        clients, 200, 160
    )  # fmt: skip
    assert (preset.rank, preset.alpha, preset.max_length) == (32, 64, 512)
    assert preset.load_in == load_in
    run = Run(dataclasses.replace(preset, backbone=str(save_language_model(tmp_path)), **TINY))
    list(run)
    assert run.summary["metric"] == "token-accuracy"
    assert math.isfinite(run.summary["perplexity_client_mean"])


def test_the_demo_has_four_natural_clients(tmp_path, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "smollm2", lambda: tmp_path)
    config = build_preset("lm-demo")
    task, shares = dealt(config)
    assert list(map(len, shares)) == [10552, 5091, 3523, 4189]
    assert [{task.train.keys[i] for i in share} for share in shares] == [
        {"movies"}, {"news"}, {"products"}, {"tweets"}
    ]  # fmt: skip
    assert (len(task.test), task.metric) == (48, "token-accuracy")
