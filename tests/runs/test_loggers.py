"""Each logger in its offline mode: its own files are read back and hold the run's final figures."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from conftest import save_encoder
from fake_runs import events
from plait.config import Config
from plait.events import Started, from_line
from plait.experiments.comparison import Cell
from plait.experiments.executors import CellEnded, here
from plait.figures import summarize
from plait.runs import loggers
from plait.runs.loggers import LOGGERS, logged, numbers, require

CONFIG = Config(clients=4, rounds=3)


def final_figures() -> dict[str, float]:
    return named_figures(summarize(CONFIG, events(CONFIG, 0.8)))


def named_figures(summary: dict) -> dict[str, float]:
    return {f"summary/{name}": x for name, x in summary.items() if isinstance(x, int | float)}


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
    """The records of a log in LevelDB's format: 32 KiB blocks of crc, length, kind and data.

    wandb writes it, and reads it, outside of Python.
    """
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


@pytest.fixture(scope="module")
def outside() -> Iterator[socket.socket]:
    """Stands in for the proxy to the world; it takes no connection, so that each can be counted."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, outside) -> Path:
    """A folder with a tiny run in `one`, logged to all loggers at once, and their files."""
    folder = tmp_path_factory.mktemp("logged")
    save_encoder("mean-pooled", folder / "tiny")
    proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
    offline = {
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HTTP_PROXY": proxy,
        "HTTPS_PROXY": proxy,
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    options = {
        "preset": "smoke", "backbone": "tiny", "task": "movies", "device": "cpu", "clients": 3,
        "rounds": 3, "switch-every": 1, "local-steps": 2, "batch-size": 2, "max-length": 16,
        "eval-rows": 8, "eval-every": 1, "topology": "ring", "log": ",".join(LOGGERS), "out": "one",
    }  # fmt: skip
    # A process of its own: these packages leave threads, and warnings that are theirs.
    command = [sys.executable, "-m", "plait", "run", *(f"--{k}={v}" for k, v in options.items())]
    # MLflow would not report its use from a test, with or without leave.
    outer = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    done = subprocess.run(command, cwd=folder, env=outer | offline, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder


def stored(name: str, numbers: dict[str, float]) -> dict[str, float]:
    """Numbers as a logger keeps them: TensorBoard in float32, the others as they are."""
    if name != "tensorboard":
        return numbers
    return {key: float(np.float32(value)) for key, value in numbers.items()}


@pytest.mark.parametrize("name", LOGGERS)
def test_a_loggers_own_files_hold_the_final_figures(name, run_folder):
    found = READERS[name](run_folder)
    figures = named_figures(json.loads((run_folder / "one" / "summary.json").read_text()))
    assert figures["summary/consensus_B"] > 0
    said = map(from_line, (run_folder / "one" / "events.jsonl").read_text().splitlines())
    last = {key: value for event in said for key, value in numbers(event)[1].items()}
    assert len(last) > 12
    expected = stored(name, figures | last)
    assert {key: found[key] for key in expected} == expected


def test_offline_nobody_asks_for_anything_from_outside(run_folder, outside):
    outside.setblocking(False)
    with pytest.raises(BlockingIOError):
        outside.accept()


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
    monkeypatch.setattr(
        "plait.experiments.executors.Run", lambda *_args, **_kwargs: events(CONFIG, 0.8)
    )
    said = [(cell, one) for cell in cells for one in (*events(CONFIG, 0.8), CellEnded())]
    assert list(here(cells, ["kept"])) == said
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


class Wandb(ModuleType):
    """A stub of wandb: but for "create_new" there is one run in a process at a time."""

    runs: ClassVar[list[SimpleNamespace]] = []

    def init(self, *, name, reinit=None, **_settings):
        if reinit == "create_new" or not self.runs:
            said = []
            self.runs.append(SimpleNamespace(
                name=name, said=said, log=said.append, define_metric=lambda *_, **__: None,
            ))  # fmt: skip
        return nullcontext(self.runs[-1])


def test_runs_of_one_process_each_have_their_own_run_of_wandb(tmp_path, monkeypatch):
    stub = Wandb("wandb")
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(loggers, "require", lambda names: [LOGGERS[name] for name in names])
    configs = [dataclasses.replace(CONFIG, seed=seed) for seed in range(2)]
    runs = [
        logged(events(config, 0.8 - k / 2), ["wandb"], config, tmp_path / f"{k}")
        for k, config in enumerate(configs)
    ]
    for _ in zip(*runs, strict=True):
        pass
    assert [run.name for run in stub.runs] == ["0", "1"]
    last = [run.said[-1]["summary/accuracy_client_mean"] for run in stub.runs]
    assert last == pytest.approx([0.8, 0.3])
