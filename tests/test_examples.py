"""The scripts in examples/ run as they are, here on a tiny model, and adding a row stays short."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from conftest import save_encoder
from plait.data.partition import PARTITIONS
from plait.data.tasks import TASKS
from plait.methods import METHODS
from plait.presets import PRESETS, PresetRow, build_preset
from plait.topology import TOPOLOGIES

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
TABLES = {
    "own_method": METHODS,
    "own_partition": PARTITIONS,
    "own_task": TASKS,
    "own_topology": TOPOLOGIES,
}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    return save_encoder("mean-pooled", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def small_presets(monkeypatch, tiny_folder):
    """The smoke preset on a tiny model; tables are put back as they were."""
    small = dataclasses.replace(build_preset("smoke"), backbone=str(tiny_folder))
    monkeypatch.setitem(PRESETS, "smoke", PresetRow(lambda: small, "tiny"))
    before = [(table, dict(table)) for table in TABLES.values()]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, small_presets, capsys):
    table = TABLES.get(example.stem, {})
    size = len(table)
    runpy.run_path(str(example))
    assert capsys.readouterr().out
    assert len(table) == size + (example.stem in TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_row_is_added_in_under_ten_lines(name):
    (path,) = (path for path in EXAMPLES if path.stem == name)
    marks = r"# --8<-- \[start:row\]\n(.*)# --8<-- \[end:row\]"
    (added,) = re.findall(marks, path.read_text(), re.DOTALL)
    assert sum(bool(line.strip()) for line in added.splitlines()) < 10


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_on_the_embedded_model(example, capsys):
    before = {name: dict(table) for name, table in TABLES.items()}
    runpy.run_path(str(example))
    for name, table in TABLES.items():
        table.clear()
        table.update(before[name])
    assert capsys.readouterr().out
