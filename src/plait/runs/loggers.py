"""What a run says, passed on to TensorBoard, Weights & Biases, MLflow or Trackio.

A logger opens a run of its own and takes numbers by step; which numbers an event holds is decided
once, in figures.py. Step t is the state after t rounds, and the figures of a finished run come
last, under `summary/`. Servers, projects and offline modes are what each package makes of its own
environment variables.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plait.config import Config
from plait.events import Evaluated, Event, RoundDone, Started
from plait.figures import FIGURES, summarize
from plait.lookup import lookup
from plait.markdown import markdown_table

Numbers = Mapping[str, float]
LogWrite = Callable[[int, Numbers], None]
"""(step, name -> number): puts them into the logger's run."""
Open = Callable[[Config, str, Path], AbstractContextManager[LogWrite]]
"""(the run's config, its name, its folder) -> a logger's run, closed when the context is left."""


# -- what there is to log


def numbers(event: Event) -> tuple[int, dict[str, float]]:
    """The step that an event belongs to, and its numbers by name; none for an event without any.

    Example:
        >>> from plait.events import Evaluated
        >>> event = Evaluated(round=3, rows=9, scores=[0.5, 0.7], losses=[1.0, 1.0],
        ...                   averaged_score=0.8, averaged_loss=0.9, seconds=0.1)
        >>> step, named = numbers(event)
        >>> step, named["eval/accuracy_client_min"]
        (4, 0.5)
    """
    step = event.round + 1 if isinstance(event, RoundDone | Evaluated) else 0
    there = {k: one for k, one in FIGURES.items() if one.logged and isinstance(event, one.kinds)}
    return step, {one.logged.format(k): one.value(event) for k, one in there.items()}


def logged(
    events: Iterable[Event], loggers: Sequence[str], config: Config, folder: Path | str
) -> Iterator[Event]:
    """Pass a run's events on, and write their numbers to loggers.

    A run that is resumed yields what was recorded before, too, so it is logged again from its
    first round.

    Args:
        events: What the run says, as `plait.run` yields it.
        loggers: Keys of `LOGGERS`.
        config: The run's settings, logged with it.
        folder: The run folder: its name is the run's name.

    Raises:
        ValueError: An unknown logger, or one whose package isn't installed.

    Example:
        >>> config, out = Config(rounds=2), "runs/mine"
        >>> for event in logged(run(config, out), ["tensorboard"], config, out):  # doctest: +SKIP
        ...     print(event)
    """
    rows, folder = require(loggers), Path(folder)
    said: list[Event] = []
    writes: list[LogWrite] = []
    with ExitStack() as stack:
        for event in events:
            if isinstance(event, Started):  # not before: a config that can't run logs nothing
                runs = [row.open(config, folder.name, folder) for row in rows]
                writes = [stack.enter_context(run) for run in runs]
            said.append(event)
            _write(writes, *numbers(event))
            yield event
        _write(writes, config.rounds, _final(summarize(config, said)) if writes else {})


def _write(writes: Iterable[LogWrite], step: int, named: Numbers) -> None:
    if named:
        for write in writes:
            write(step, named)


def _final(summary: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"summary/{name}": value
        for name, value in summary.items()
        if isinstance(value, int | float)
    }


# -- the loggers; their packages are imported when they are opened


@contextmanager
def _tensorboard(config: Config, _name: str, folder: Path) -> Iterator[LogWrite]:
    from torch.utils.tensorboard import SummaryWriter

    # From step 0 on, what an interrupted run left here gives way to what is said now.
    with SummaryWriter(str(folder / "tensorboard"), purge_step=0) as writer:
        rows = [[key, str(value)] for key, value in config.to_json().items()]
        writer.add_text("config", markdown_table(["setting", "value"], rows))

        def write(step: int, named: Numbers) -> None:
            for tag, number in named.items():
                writer.add_scalar(tag, number, step)
            writer.flush()

        yield write


@contextmanager
def _wandb(config: Config, name: str, folder: Path) -> Iterator[LogWrite]:
    wandb = importlib.import_module("wandb")
    project = os.environ.get("WANDB_PROJECT", "plait")
    settings = {"project": project, "name": name, "dir": folder, "config": config.to_json()}
    # Others of this process may be going on: in one stack, or a user's own.
    with wandb.init(**settings, reinit="create_new") as run:
        # Evaluations belong to the step of their round, whose numbers have been logged already.
        run.define_metric("*", step_metric="rounds_done")
        yield lambda step, named: run.log({**named, "rounds_done": step})


@contextmanager
def _mlflow(config: Config, name: str, _folder: Path) -> Iterator[LogWrite]:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "plait"))
    with mlflow.start_run(run_name=name):
        mlflow.log_params(config.to_json())
        yield lambda step, named: mlflow.log_metrics(dict(named), step=step)


@contextmanager
def _trackio(config: Config, name: str, _folder: Path) -> Iterator[LogWrite]:
    trackio = importlib.import_module("trackio")
    project = os.environ.get("TRACKIO_PROJECT", "plait")
    trackio.init(project=project, name=name, config=config.to_json())
    try:
        yield lambda step, named: trackio.log(dict(named), step=step)
    finally:
        trackio.finish()


@dataclass(frozen=True)
class LoggerRow:
    """A line of `LOGGERS`: how to open its run, the package it needs, and where its files are."""

    open: Open
    package: str
    summary: str


LOGGERS: dict[str, LoggerRow] = {
    "tensorboard": LoggerRow(
        _tensorboard, "tensorboard", "TensorBoard: event files in the run folder's tensorboard/"
    ),
    "wandb": LoggerRow(
        _wandb, "wandb", "Weights & Biases: files in the run folder's wandb/; WANDB_MODE=offline"
    ),
    "mlflow": LoggerRow(
        _mlflow, "mlflow", "MLflow: the server, folder or database of MLFLOW_TRACKING_URI"
    ),
    "trackio": LoggerRow(_trackio, "trackio", "Trackio: a local database, in TRACKIO_DIR if set"),
}


def require(loggers: Sequence[str]) -> list[LoggerRow]:
    """The rows of these loggers.

    Raises:
        ValueError: There is no such logger, or its package isn't installed.

    Example:
        >>> require(["tensorbord"])
        Traceback (most recent call last):
        ValueError: Unknown logger 'tensorbord'. Did you mean tensorboard?
    """
    rows = [lookup(LOGGERS, name, "logger") for name in dict.fromkeys(loggers)]
    for row in rows:
        if find_spec(row.package) is None:
            raise ValueError(f"--log {row.package} needs a package: pip install {row.package}")
    return rows
