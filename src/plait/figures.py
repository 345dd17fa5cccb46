"""The figures of a run, each defined once: how an event has it, and how it is summed up and shown.

`summary.json`, loggers, tables, charts and docs all loop over `FIGURES`. Those over layers are of
all adapted layers together; `accuracy_...` is in the task's own metric, whatever that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.config import Config
from plait.events import KINDS, Evaluated, Event, RoundDone, Started, releases
from plait.metrics import LayerState
from plait.privacy import spent

Value = Callable[[Any], float]
"""A figure of one event."""
Take = Callable[[Value, Sequence[Sequence[Event]]], float]
"""A figure of a run, from the events that have it, kind by kind."""


def first(value: Value, events: Sequence[Sequence[Event]]) -> float:
    """As the first event has it."""
    return value(events[0][0])


def last(value: Value, events: Sequence[Sequence[Event]]) -> float:
    """As the last event has it."""
    return value(events[-1][-1])


def summed(value: Value, events: Sequence[Sequence[Event]]) -> float:
    """The sum over all events."""
    return sum(sum(map(value, kind)) for kind in events)


@dataclass(frozen=True)
class Figure:
    """A row of `FIGURES`.

    Attributes:
        title: Its name for people.
        kinds: The events that have it.
        value: It, of one of them; NaN of a peer, which sees itself alone and not all clients.
        take: How the summary takes it; None where the summary has it not.
        logged: Its name for loggers, `{}` standing for its own; empty where it isn't logged.
        head: Its column in tables; `{metric}` stands for the task's metric.
        form: How tables write it.
        scale: What one unit of `head` is.
        unit: Its axis in charts; `{metric}` stands for the task's metric.
        log: Whether it spans orders of magnitude.
    """

    title: str
    kinds: tuple[type[Event], ...]
    value: Value
    take: Take | None = None
    logged: str = ""
    head: str = ""
    form: str = ".3f"
    scale: float = 1
    unit: str = ""
    log: bool = False

    def shown(self, value: float) -> str:
        """A number of it as a cell of a table; nothing for NaN."""
        return "" if math.isnan(value) else f"{value / self.scale:{self.form}}"


def seconds(event: Event) -> float:
    """What an event took, in seconds."""
    match event:
        case RoundDone():
            return event.train_seconds + event.mix_seconds
        case Started() | Evaluated():
            return event.seconds
    return 0.0


def _over_layers(value: Callable[[LayerState], float]) -> Callable[[RoundDone], float]:
    return lambda event: sum(map(value, event.after)) if event.after else math.nan


_cross_term_squared = _over_layers(lambda layer: layer.cross_term**2)

FIGURES: dict[str, Figure] = {
    "majority": Figure("Always giving the same answer", (Started,), lambda e: e.majority, first),
    "accuracy_client_mean": Figure(
        "Clients' own models", (Evaluated,), lambda e: float(np.mean(e.scores)), last, "eval/{}",
        head="{metric}", unit="{metric}, client mean",
    ),
    "accuracy_client_std": Figure(
        "Standard deviation over clients", (Evaluated,), lambda e: float(np.std(e.scores)), last,
        "eval/{}",
    ),
    "accuracy_client_min": Figure(
        "Worst client", (Evaluated,), lambda e: min(e.scores), last, "eval/{}",
        head="worst", unit="{metric}, worst client",
    ),
    "accuracy_averaged_model": Figure(
        "Averaged model", (Evaluated,), lambda e: e.averaged_score, last, "eval/{}",
        head="averaged", unit="{metric}, of the mean factors",
    ),
    "loss_client_mean": Figure(
        "Loss", (Evaluated,), lambda e: float(np.mean(e.losses)), last, "eval/{}",
        head="loss", unit="held-out loss, client mean",
    ),
    "loss_averaged_model": Figure(
        "Loss of the averaged model", (Evaluated,), lambda e: e.averaged_loss, last, "eval/{}"
    ),
    "train_loss_client_mean": Figure(
        "Training loss", (RoundDone,), lambda e: float(np.mean(e.train_losses)),
        logged="train/loss_client_mean",
    ),
    "train_loss_client_max": Figure(
        "Highest training loss of a client", (RoundDone,), lambda e: max(e.train_losses),
        logged="train/loss_client_max",
    ),
    "cross_term": Figure(
        "Cross term after mixing", (RoundDone,), lambda e: math.sqrt(_cross_term_squared(e)), last,
        "round/{}", head="cross term", form=".2g", unit="‖C‖<sub>F</sub>, all layers", log=True,
    ),
    "consensus_A": Figure(
        "Ξ of A", (RoundDone,), _over_layers(lambda layer: layer.consensus_A), last, "round/{}",
        head="Ξ of A", form=".2g", unit="Ξ, all layers", log=True,
    ),
    "consensus_B": Figure(
        "Ξ of B", (RoundDone,), _over_layers(lambda layer: layer.consensus_B), last, "round/{}",
        head="Ξ of B", form=".2g", unit="Ξ, all layers", log=True,
    ),
    "apart": Figure(
        "Disagreement after mixing", (RoundDone,),
        _over_layers(lambda layer: layer.consensus_A + layer.consensus_B),
        unit="Ξ<sub>A</sub> + Ξ<sub>B</sub>, all layers", log=True,
    ),
    "rho": Figure("Disagreement that survives a round", (Started,), lambda e: e.rho, first),
    "rho_of_round": Figure(
        "Disagreement that the round's W leaves", (RoundDone,), lambda e: e.rho, logged="round/rho"
    ),
    "sent_bytes": Figure(
        "Sent by all clients", (RoundDone,), lambda e: e.sent_bytes, summed, "round/{}",
        head="MB sent", form=".1f", scale=1e6, unit="bytes",
    ),
    "worker_bytes": Figure(
        "What a cluster's workers handed each other", (RoundDone,), lambda e: e.worker_bytes, summed
    ),
    "train_seconds": Figure(
        "Local training", (RoundDone,), lambda e: e.train_seconds, summed, "time/{}"
    ),
    "mix_seconds": Figure("Mixing", (RoundDone,), lambda e: e.mix_seconds, summed, "time/{}"),
    "eval_seconds": Figure("Evaluation", (Evaluated,), lambda e: e.seconds, summed, "time/{}"),
    "wall_seconds": Figure(
        "All of it, preparing included", (Started, RoundDone, Evaluated), seconds, summed,
        head="seconds", form=".0f",
    ),
}  # fmt: skip
"""Name -> figure, in the order of `summary.json`."""


def of_event(event: Event) -> dict[str, float]:
    """Name -> figure of one event, all that it has."""
    return {k: one.value(event) for k, one in FIGURES.items() if isinstance(event, one.kinds)}


def taken(events: Sequence[Event]) -> dict[str, float]:
    """Name -> figure of a run as the summary takes it; without those whose events are missing."""
    there: dict[type[Event], list[Event]] = {
        kind: [event for event in events if isinstance(event, kind)] for kind in KINDS.values()
    }
    return {
        name: one.take(one.value, [there[kind] for kind in one.kinds])
        for name, one in FIGURES.items()
        if one.take and all(there[kind] for kind in one.kinds)
    }


def summarize(config: Config, events: Iterable[Event]) -> dict[str, Any]:
    """What `summary.json` holds of a finished run: settings, figures, and spent privacy."""
    events = list(events)
    started = next(event for event in events if isinstance(event, Started))
    rounds = [event for event in events if isinstance(event, RoundDone)]
    settings = ("method", "task", "seed", "rounds", "clients", "topology")
    return {
        **{name: getattr(config, name) for name in settings},
        "metric": started.metric,
        **taken(events),
        "config_digest": config.digest(),
        **spent(config, releases(rounds)),
    }
