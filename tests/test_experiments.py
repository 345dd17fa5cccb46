"""The published experiments as files: each is valid, and each has a twin that runs here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from conftest import save_encoder
from plait.cli.main import main
from plait.config import Config, Machine
from plait.data.partition import PARTITIONS
from plait.data.tasks import TASKS
from plait.experiments import grid_file
from plait.experiments.results import load
from plait.experiments.sweep import Sweep, load_sweep

ROOT = Path(__file__).parent.parent / "experiments"
FILES = sorted(ROOT.glob("*.toml"))
PUBLISHED = [file for file in FILES if file.stem not in ("small_paper", "bfloat16")]
EMBEDDED = ("trec", "movies")


def runs(sweep: Sweep) -> list[Config]:
    """The configs of all runs, checked."""
    found = [cell.config for cell in sweep.expected]
    for config in found:
        assert config.task in TASKS
        assert config.label_skew.partition(":")[0] in PARTITIONS
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_makes_runs(file, tmp_path):
    number = len(runs(load_sweep(file, tmp_path)))
    text = file.read_text()
    head = text[: text.index("\n\n")]
    for said in (f"plait sweep experiments/{file.name} --out runs/", "# Needs: ", "# Costs: "):
        assert said in head
    assert f"{number:,}" in head, "the number of its runs"


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_a_twin_needs_only_what_is_installed(file, tmp_path):
    configs = runs(load_sweep(file, tmp_path, small=True))
    assert len(configs) <= 40
    for config in configs:
        assert config.backbone == "minilm"
        assert config.task in EMBEDDED
        assert config.dtype == "float32"  # CPUs without bfloat16 refuse it


def test_the_paper_in_small_is_what_it_says(tmp_path):
    sweep = load_sweep(ROOT / "small_paper.toml", tmp_path)
    assert sweep.axes == {
        "task": EMBEDDED, "p": (0.1, 0.5, 0.02), "switch_every": (5, 1, 10)
    }  # fmt: skip
    assert {len(plan.seeds) for plan in sweep.plans} == {3}
    assert {plan.labels for plan in sweep.plans} == {
        ("adf", "dec-lora", "ffa", "rolora", "dec-lora (matched)")
    }
    for plan in sweep.plans:
        assert plan.config.rounds >= 4 * plan.config.switch_every, "two phases of each factor"


def test_the_smallest_twin_runs(tmp_path, monkeypatch):
    tiny = {
        "backbone": str(save_encoder("mean-pooled", tmp_path / "tiny")), "rounds": 2,
        "local_steps": 1, "clients": 2, "batch_size": 2, "eval_every": 2, "max_length": 8,
    }  # fmt: skip

    def changed(settings: Config | Machine, values: dict[str, Any], origin: str) -> Any:
        smaller = tiny if isinstance(settings, Config) else {}
        return dataclasses.replace(settings, **(values | smaller))

    monkeypatch.setattr(grid_file, "changed", changed)
    smallest = min(PUBLISHED, key=lambda f: len(load_sweep(f, tmp_path, small=True).expected))
    out = tmp_path / "out"
    assert main(["sweep", str(smallest), "--small", "--jobs", "1", "--out", str(out)]) == 0
    assert set(load(out)["state"]) == {"finished"}
    assert main(["table", str(out)]) == 0
