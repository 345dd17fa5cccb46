"""The run folders below a folder, and how far each is; read without what computes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.config import Config
from plait.machine.files import damaged, read_json

NOT_RUNS = ("adapters", "tensorboard", "wandb")


@dataclass(frozen=True)
class Listed:
    """A run folder, as it is listed.

    Attributes:
        path: The folder.
        config: Its settings.
        rounds_done: Rounds that were recorded.
        state: `finished` or `begun`.
        metric: What its score measures.
        score: The clients' mean, or a peer's own; the latest one, None before the first.
        name: What people call it.
        tags: Words to find it by.
        changed_s: When something was last recorded, in seconds since 1970.
    """

    path: Path
    config: Config
    rounds_done: int
    state: str
    metric: str
    score: float | None
    name: str
    tags: tuple[str, ...]
    changed_s: float


OTHERS: dict[str, Callable[[Listed], str | tuple[str, ...]]] = {
    "state": lambda one: one.state,
    "name": lambda one: one.name,
    "tag": lambda one: one.tags,
}
"""What runs can be chosen by beside their settings."""


def listed(top: Path) -> tuple[list[Listed], list[str]]:
    """The run folders in and below a folder, the latest last; a federation's peers are one run.

    Returns:
        The runs; and of folders whose files can't be read, why not.

    Raises:
        ValueError: There is neither.
    """
    runs: dict[Path, list[Listed]] = {}
    unread = []
    for path in _folders(top):
        try:
            runs.setdefault(_place(path, top), []).append(_read(path))
        except ValueError as error:
            unread.append(str(error))
    found = [_as_one(place, parts) for place, parts in runs.items() if parts]
    if not found and not unread:
        raise ValueError(f"There is no run in {top}; `plait run --out` makes one.")
    return sorted(found, key=lambda one: one.changed_s), unread


def chosen(runs: Iterable[Listed], filters: Sequence[str]) -> list[Listed]:
    """Those with all of these, each `key=value`: a setting, or a key of `OTHERS`.

    Raises:
        ValueError: A filter of another form, or by a key that there isn't.
    """
    pairs = [one.partition("=") for one in filters]
    known = {*Config().to_json(), *OTHERS}
    for key, sign, _ in pairs:
        if not sign or key.replace("-", "_") not in known:
            raise ValueError(
                f"--filter {key}{sign}: give setting=value, such as method=adf or state=finished; "
                "`plait run --help` has the settings."
            )
    wanted = [(key.replace("-", "_"), value) for key, _, value in pairs]
    return [one for one in runs if all(_has(one, key, value) for key, value in wanted)]


def _has(one: Listed, key: str, value: str) -> bool:
    there = OTHERS[key](one) if key in OTHERS else getattr(one.config, key)
    if isinstance(there, tuple):
        return value in there
    if isinstance(there, float) and _is_float(value):
        return there == float(value)
    return str(there) == value


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _folders(top: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(top):
        if {"config.json", "events.jsonl"} <= set(files):
            yield Path(folder)
            inside.clear()
        else:
            inside[:] = sorted(name for name in inside if name not in NOT_RUNS)


def _place(path: Path, top: Path) -> Path:
    """Where a run is: of a peer, the folder of its federation, if that is in or below `top`."""
    federation = path.parent.parent
    if not (federation / "federation.toml").is_file() or not federation.is_relative_to(top):
        return path
    # `plait up` and `plait init-federation` may have the peers in a folder of this name.
    whole = federation.parent if federation.name == "federation" else federation
    return whole if whole.is_relative_to(top) else federation


def _as_one(place: Path, parts: Sequence[Listed]) -> Listed:
    """A run, or several peers: as far as the slowest is, with the mean of their scores."""
    if len(parts) == 1:
        return parts[0]
    scores = [one.score for one in parts if one.score is not None]
    return replace(
        parts[0],
        path=place,
        rounds_done=min(one.rounds_done for one in parts),
        state="finished" if all(one.state == "finished" for one in parts) else "begun",
        score=sum(scores) / len(scores) if scores else None,
        changed_s=max(one.changed_s for one in parts),
    )


def _read(path: Path) -> Listed:
    """A run folder.

    Raises:
        ValueError: Its files are damaged, or of a later plait; the message has the file.
    """
    config, about = Config.load(path / "config.json"), path / "about.json"
    named = read_json(about) if about.is_file() else {}
    finished = (path / "summary.json").is_file()  # asked first: it is written last
    done, metric = 0, ""
    scores: list[float] = []
    try:
        for event in _events(path / "events.jsonl"):
            metric = event.get("metric", metric)
            if event["event"] == "RoundDone":
                done = event["round"] + 1
            elif event["event"] == "Evaluated":
                scores = event["scores"]
        score = sum(scores) / len(scores) if scores else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path / "events.jsonl", f"{type(error).__name__}: {error}") from error
    if finished:
        check_events(path, scores)
    return Listed(
        path=path,
        config=config,
        rounds_done=done,
        state="finished" if finished else "begun",
        metric=metric,
        score=score,
        name=named.get("name", ""),
        tags=tuple(named.get("tags", ())),
        changed_s=(path / "events.jsonl").stat().st_mtime,
    )


def check_events(path: Path, scores: Sequence[float]) -> None:
    """Refuse a finished run whose events don't go to its end.

    Args:
        path: Its folder.
        scores: (clients,) those of the last evaluation that its events have; empty if none.

    Raises:
        ValueError: They end amid a line or with another score than `summary.json`, or that is
            damaged; the message has the file.
    """
    events, summary = path / "events.jsonl", read_json(path / "summary.json")
    if _last_byte(events) != b"\n":
        raise damaged(events, "its last line is cut off")
    own = summary.get("accuracy_client_mean", summary.get("accuracy"))  # a peer's is its own
    if own is not None and not (scores and _same(own, sum(scores) / len(scores))):
        raise damaged(events, "it ends with another score than summary.json")


def _last_byte(file: Path) -> bytes:
    with file.open("rb") as there:
        there.seek(max(0, file.stat().st_size - 1))
        return there.read(1)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9) or (math.isnan(a) and math.isnan(b))


def _events(file: Path) -> Iterator[dict[str, Any]]:
    """The events as plain values; of rounds, whose lines are long, only the number is read."""
    with file.open() as lines:
        for line in lines:
            if line.startswith('{"event": "RoundDone", "round": '):
                number = line[len('{"event": "RoundDone", "round": ') :].partition(",")[0]
                yield {"event": "RoundDone", "round": int(number)}
            elif line.endswith("\n"):
                yield json.loads(line)
