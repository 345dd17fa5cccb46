"""Folders of runs and comparisons that never ran (fake_runs.py), for what is shown of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from fake_runs import FakeRuns, events
from plait.config import Config
from plait.events import Evaluated, Event, RoundDone, Started, to_line
from plait.experiments import executors as workers
from plait.experiments.comparison import compare, conclude
from plait.experiments.plan import Plan
from plait.report.comparison_report import write_report

CONFIG = Config(clients=4, rounds=6, lr=1e-3)
NAMES = ("north", "clinic", "lab", "south")
SCORES = {"adf": 0.80, "dec-lora": 0.74, "ffa": 0.70}


def score(config: Config) -> float:
    """A method's score, a little different for every seed, and less so for each method."""
    return SCORES[config.method] + 0.013 * config.seed + 0.004 * (config.seed == len(config.method))


def write_comparison(out: Path, monkeypatch, **settings: object) -> Plan:
    """A finished comparison with everything that `plait compare` writes."""
    base = {"config": CONFIG, "methods": tuple(SCORES), "seeds": (0, 1, 2)}
    plan = Plan(**{**base, "out": out, **settings})
    with monkeypatch.context() as patched:
        patched.setattr(workers, "Run", FakeRuns(score))
        for _ in compare(plan):
            pass
    write_report(conclude(plan))
    return plan


def write_run(out: Path, config: Config = CONFIG) -> Path:
    """A finished run."""
    list(FakeRuns(score)(config, out))
    return out


def write_peer(
    folder, client: int, rounds: int, config: Config = CONFIG, **said_of_itself: object
) -> None:
    """What a peer writes of a run with four clients: itself alone, and no distances."""
    said = []
    for event in events(CONFIG, 0.8):
        if isinstance(event, Evaluated) and event.round < rounds:
            scores, losses = [event.scores[client]], [event.losses[client]]
            said.append(dataclasses.replace(event, scores=scores, losses=losses))
        elif isinstance(event, RoundDone) and event.round < rounds:
            edges = [edge for edge in event.edges if edge[0] == client]
            met = {tuple(sorted(edge[:2])) for edge in edges}
            pairs = [one for one in event.pairs_apart if one[:2] in met]
            alone = {"train_losses": [0.7], "before": [], "after": [], "apart": []}
            said.append(dataclasses.replace(event, edges=edges, pairs_apart=pairs, **alone))
        elif isinstance(event, Started):
            said.append(dataclasses.replace(event, **said_of_itself))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    (folder / "events.jsonl").write_text("".join(to_line(event) + "\n" for event in said))


def begin_run(out: Path, config: Config = CONFIG) -> Callable[[], Event | None]:
    """A run that goes on: each call writes its next event and returns it, None at the end."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config.to_json()))
    said: Iterator[Event] = events(config, score(config))

    def go_on() -> Event | None:
        event = next(said, None)
        if event is not None:
            with (out / "events.jsonl").open("a") as file:
                file.write(to_line(event) + "\n")
        return event

    return go_on
