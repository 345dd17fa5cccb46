"""Each logger in its offline mode: its own files are read back and hold the run's final figures."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from plait import loggers
from plait.comparison import Cell
from plait.config import Config
from plait.events import Started, summarize
from plait.loggers import LOGGERS, logged, logged_cells, numbers, require
from said import events

CONFIG = Config(clients=4, rounds=3)


def final_figures() -> dict[str, float]:
    summary = summarize(CONFIG, events(CONFIG, 0.8))
    return {f"summary/{name}": x for name, x in summary.items() if isinstance(x, int | float)}


def log(name: str, folder: Path) -> None:
    assert list(logged(events(CONFIG, 0.8), [name], CONFIG, folder)) == list(events(CONFIG, 0.8))


# -- what the files hold: (folder) -> name -> the last number logged under it


def read_tensorboard(folder: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = EventAccumulator(str(folder / "one" / "tensorboard"), {"scalars": 0})
    files.Reload()
    return {tag: files.Scalars(tag)[-1].value for tag in files.Tags()["scalars"]}


def read_wandb(folder: Path) -> dict[str, float]:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (folder / "one" / "wandb").glob("offline-run-*/*.wandb")
    return {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for data in leveldb_records(file.read_bytes())
        for item in Record.FromString(data).history.item
    }


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: 32 KiB blocks of crc, length, kind and data."""
    place, record = 7, b""  # the first block begins with `:W&B`, a magic number and a version
    while place + 7 <= len(log):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<4xHB", log, place)
        record += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


def read_mlflow(folder: Path) -> dict[str, float]:
    with sqlite3.connect(folder / "mlflow.db") as database:
        return dict(database.execute("SELECT key, value FROM latest_metrics").fetchall())


def read_trackio(folder: Path) -> dict[str, float]:
    with sqlite3.connect(folder / "trackio" / "plait.db") as database:
        rows = database.execute("SELECT metrics FROM metrics ORDER BY id").fetchall()
    return {name: x for (text,) in rows for name, x in json.loads(text).items()}


READERS = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


@pytest.mark.parametrize(
    "name",
    [name if name == "tensorboard" else pytest.param(name, marks=pytest.mark.slow)
     for name in LOGGERS],
)  # fmt: skip
def test_a_loggers_own_files_hold_the_final_figures(name, tmp_path):
    if importlib.util.find_spec(LOGGERS[name].package) is None:
        pytest.skip(f"{name} is not installed: pip install {LOGGERS[name].package}")
    # A process of its own: these packages leave threads, and warnings that are theirs.
    code = "from test_loggers import *; log(sys.argv[1], Path('one'))"
    offline = {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "PYTHONPATH": str(Path(__file__).parent),
        "HOME": str(tmp_path),
    }
    (tmp_path / "one").mkdir()
    subprocess.run(
        [sys.executable, "-c", code, name], cwd=tmp_path, env=os.environ | offline, check=True
    )
    found = READERS[name](tmp_path)
    expected = final_figures()
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    last = {key: value for event in events(CONFIG, 0.8) for key, value in numbers(event)[1].items()}
    assert {key: found[key] for key in last} == pytest.approx(last)


# -- the numbers


def test_the_last_evaluation_has_the_summarys_numbers():
    summary = final_figures()
    last = numbers(list(events(CONFIG, 0.8))[-1])
    assert last[0] == CONFIG.rounds
    for name, number in last[1].items():
        if name.startswith("eval/"):
            assert number == summary[name.replace("eval/", "summary/")]


class Kept:
    """A logger that keeps what it is told."""

    def __init__(self, monkeypatch) -> None:
        self.runs: list[tuple[str, list]] = []
        self.closed = 0
        row = loggers.LoggerRow(self.open, "json", "for this test")
        monkeypatch.setitem(LOGGERS, "kept", row)

    def open(self, config, name, folder):
        told = []
        self.runs.append((name, told))
        return Context(self, told)


class Context:
    def __init__(self, kept, told) -> None:
        self.kept, self.told = kept, told

    def __enter__(self):
        return lambda step, named: self.told.append((step, dict(named)))

    def __exit__(self, *_exception) -> None:
        self.kept.closed += 1


def test_steps_count_the_rounds_done(monkeypatch, tmp_path):
    kept = Kept(monkeypatch)
    list(logged(events(CONFIG, 0.8), ["kept"], CONFIG, tmp_path))
    ((_, told),) = kept.runs
    assert [step for step, _ in told] == [0, 1, 1, 2, 2, 3, 3, 3]
    assert told[-1][1] == final_figures()


def test_each_run_of_a_comparison_is_a_run_of_the_logger(monkeypatch, tmp_path):
    kept = Kept(monkeypatch)
    cells = [Cell(name, CONFIG, tmp_path / name) for name in ("adf-seed0", "ffa-seed0")]
    said = [(cell, event) for cell in cells for event in events(CONFIG, 0.8)]
    assert list(logged_cells(iter(said), ["kept"])) == said
    assert [name for name, _ in kept.runs] == ["adf-seed0", "ffa-seed0"]
    assert kept.runs[1][1][-1][1] == final_figures()
    assert kept.closed == 2


def test_a_run_that_stops_is_closed_without_final_figures(monkeypatch, tmp_path):
    kept = Kept(monkeypatch)

    def failing():
        yield next(event for event in events(CONFIG, 0.8) if isinstance(event, Started))
        raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        list(logged(failing(), ["kept"], CONFIG, tmp_path))
    assert (kept.closed, kept.runs[0][1]) == (1, [])


def test_what_cannot_be_logged_is_said_before_the_run(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="Unknown logger 'tensorbord'"):
        require(["tensorbord"])
    missing = loggers.LoggerRow(LOGGERS["wandb"].open, "no_such_package", "")
    monkeypatch.setitem(LOGGERS, "missing", missing)
    begun = []
    said = (begun.append(event) or event for event in events(CONFIG, 0.8))
    with pytest.raises(ValueError, match="pip install no_such_package"):
        list(logged(said, ["missing"], CONFIG, tmp_path))
    assert not begun
