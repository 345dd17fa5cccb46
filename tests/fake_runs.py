"""Runs that never ran: events with chosen scores, and run folders that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from plait.config import THIS_MACHINE, Config, Machine
from plait.events import Evaluated, Event, RoundDone, Started, to_line
from plait.figures import summarize
from plait.metrics import LayerState

Score = Callable[[Config], float]


def events(config: Config, score: float) -> Iterator[Event]:
    """A run whose clients end at `score`, half of them .1 above and half .1 below."""
    yield Started(
        task=config.task,
        metric="accuracy",
        label_names=("no", "yes"),
        label_counts=[[3, 4]] * config.clients,
        majority=0.5,
        parameters={"A": 8, "B": 8},
        rho=0.8,
        device="cpu",
        seconds=1.0,
    )
    yield evaluated(config, -1, 0.5)
    for round_ in range(config.rounds):
        other = 1 + round_ % (config.clients - 1)
        layer = LayerState("layer", 0.25, 0.5, 0.0 if config.method == "ffa" else 0.1, 0, 1, 1)
        yield RoundDone(
            round=round_,
            active="B" if round_ % 2 == 0 else "A",
            shared="A|B",
            train_losses=[0.7] * config.clients,
            edges=[(0, other, 0.5), (other, 0, 0.5)],
            rho=0.9,
            sent_bytes=1_000_000,
            before=[layer],
            after=[layer],
            train_seconds=1.5,
            mix_seconds=0.5,
            apart=[0.5, 1.0] * (config.clients // 2),
            pairs_apart=pairs_apart(config, round_),
        )
        yield evaluated(config, round_, 0.5 + (score - 0.5) * (round_ + 1) / config.rounds)


def pairs_apart(config: Config, round_: int) -> list[tuple[int, int, float]]:
    """Farther for clients whose numbers are farther from each other, and less in each round."""
    n = min(config.clients, 100)
    return [(i, j, (j - i) ** 2 / 4**round_) for i in range(n) for j in range(i + 1, n)]


def evaluated(config: Config, round_: int, score: float) -> Evaluated:
    return Evaluated(
        round=round_,
        rows=100,
        scores=[score + (0.1 if client % 2 else -0.1) for client in range(config.clients)],
        losses=[1 - score] * config.clients,
        averaged_score=score + 0.02,
        averaged_loss=0.9 - score,
        seconds=0.5,
    )


class FakeRuns:
    """Stands in for `plait.Run`: writes the folder of a run with the score it is told."""

    def __init__(self, score: Score) -> None:
        self.score = score
        self.started: list[Config] = []

    def __call__(
        self,
        config: Config,
        out: Path,
        resume: bool = False,
        machine: Machine = THIS_MACHINE,
        engine: None = None,
    ) -> Iterator[Event]:
        said = list(events(config, self.score(config)))
        if not (resume and (out / "summary.json").exists()):
            self.started.append(config)
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(json.dumps(config.to_json()))
            (out / "events.jsonl").write_text("".join(to_line(event) + "\n" for event in said))
            (out / "summary.json").write_text(json.dumps(summarize(config, said)))
        yield from said
