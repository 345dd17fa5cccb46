"""The experiments and the benchmark as files: each is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.config import Config
from plait.data.partition import PARTITIONS
from plait.data.tasks import TASKS
from plait.experiments import benchmark, claims
from plait.experiments.sweep import Sweep, load_sweep

ROOT = Path(__file__).parent.parent / "experiments"
FILES = sorted(ROOT.glob("*.toml"))
SUITES = sorted(claims.SUITES.glob("*/*.toml"))
EMBEDDED = ("trec", "movies", "sentiment")


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


@pytest.mark.parametrize("size", benchmark.SIZES)
def test_the_docs_say_how_many_runs_a_size_of_the_benchmark_has(size, tmp_path):
    number = sum(len(runs(part)) for part in benchmark.parts_of(size, tmp_path).values())
    assert f"| {size} | {number:,} |" in (ROOT.parent / "docs/howto/benchmark.md").read_text()


def test_the_smallest_size_needs_only_what_is_installed(tmp_path):
    for file in SUITES:
        if file.parent.name == "S":
            for config in runs(load_sweep(file, tmp_path)):
                assert config.backbone == "minilm"
                assert config.task in EMBEDDED
                assert config.dtype == "float32"  # CPUs without bfloat16 refuse it
