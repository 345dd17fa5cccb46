"""What is kept of a config is made anew when a file that it names has changed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from plait.config import Config
from plait.engines.job import dealt
from plait.machine.file_cache import NAMES, kept
from plait.methods import build_method


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inside", ["", "model.safetensors"])
def test_a_result_is_kept_while_the_files_are_the_same(tmp_path, name, inside):
    calls: list[str] = []

    @kept(1)
    def made(config: Config, more: str) -> int:
        calls.append(more)
        return len(calls)

    place = tmp_path / "place"
    file = place / inside
    file.parent.mkdir(exist_ok=True)
    file.write_text("one")
    config = Config(**{name: str(place)})
    assert [made(config, "a"), made(config, "a")] == [1, 1]
    file.write_text("other")
    assert [made(config, "a"), made(config, "a")] == [2, 2]
    assert made(config, "b") == 3
    file.unlink()
    assert made(config, "b") == 4


def write_rows(file: Path, count: int) -> None:
    lines = [f"{file.stem} {i},{'yes' if i % 2 else 'no'}" for i in range(count)]
    file.write_text("\n".join(["text,label", *lines]))


def test_rows_that_have_changed_are_read_anew(tmp_path):
    train, dev = tmp_path / "train.csv", tmp_path / "dev.csv"
    config = Config(task="file", train_file=str(train), dev_file=str(dev), clients=2,
                    label_skew="iid")  # fmt: skip
    write_rows(dev, 20)
    read = []
    for count in (20, 40):
        write_rows(train, count)
        read.append(len(dealt(config)[0].train))
    assert read == [18, 36]  # a tenth is for validation


def test_a_graph_that_has_changed_is_read_anew(tmp_path):
    edges = tmp_path / "edges.txt"
    config = Config(method="tad", topology="file", edges_file=str(edges), clients=12, rounds=40)
    ring = [(i, (i + 1) % 12) for i in range(12)]
    plans = []
    for pairs in (ring, itertools.combinations(range(12), 2)):
        edges.write_text("\n".join(f"{i} {j}" for i, j in pairs))
        plans.append([build_method(config).plan(t, 12) for t in range(40)])
    assert plans[0] != plans[1]
    assert plans[1] == [build_method(replace(config, topology="complete")).plan(t, 12)
                        for t in range(40)]  # fmt: skip
