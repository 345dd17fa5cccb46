"""The figures of a run, each defined once: how an event has it, and how it is summed up and shown.

`summary.json`, loggers, tables, charts and docs all loop over `FIGURES`. Those over layers are of
all adapted layers together; `accuracy_...` is in the task's own metric, whatever that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from plait.config import Config
from plait.events import KINDS, Evaluated, Event, Incident, RoundDone, Started, releases
from plait.metrics import LayerState
from plait.privacy import spent

Value = Callable[[Any], float]
"""A figure of one event."""
Floats = np.ndarray[Any, np.dtype[np.float64]]
TAKES: dict[str, Callable[[Value, Sequence[Sequence[Event]]], float]] = {
    "first": lambda value, events: value(events[0][0]),
    "last": lambda value, events: value(events[-1][-1]),
    "sum": lambda value, events: sum(sum(map(value, kind)) for kind in events),
}
"""How the summary takes a figure from the events that have it, kind by kind."""


@dataclass(frozen=True)
class Figure:
    """A row of `FIGURES`; in `head` and `unit`, `{metric}` stands for the task's metric.

    Attributes:
        title: Its name for people.
        value: It, of one event; NaN of a peer, which sees itself alone and not all clients.
        kinds: The events that have it.
        take: One of `TAKES`; empty where the summary has it not.
        logged: Its name for loggers, `{}` standing for its own; empty where it isn't logged.
        head: Its column in tables.
        form: How tables write it.
        scale: What one unit of `head` is.
        unit: Its axis in a chart of its own.
        log: Whether it spans orders of magnitude.
        sometimes: Whether only some runs have it, and others NaN, which their summaries leave out.
        only: The objective that it is of; empty for all.
    """

    title: str
    value: Value
    kinds: tuple[type[Event], ...] = (RoundDone,)
    take: str = ""
    logged: str = ""
    head: str = ""
    form: str = ".3f"
    scale: float = 1
    unit: str = ""
    log: bool = False
    sometimes: bool = False
    only: str = ""

    def is_of(self, objective: str) -> bool:
        """Whether runs with this objective have it."""
        return self.only in ("", objective)

    def shown(self, value: float) -> str:
        """A number of it as a cell of a table; nothing for NaN."""
        return "" if math.isnan(value) else f"{value / self.scale:{self.form}}"


def seconds(event: Event) -> float:
    """What an event took, in seconds."""
    if isinstance(event, RoundDone):
        return event.train_seconds + event.mix_seconds
    return 0.0 if isinstance(event, Incident) else event.seconds


def _before(value: Value) -> Value:
    """A figure before the first round; NaN where that was not evaluated."""
    return lambda event: value(event) if event.round < 0 else math.nan


def _of_known(value: Callable[[Sequence[float]], float], losses: Sequence[float]) -> float:
    """A figure of the losses that are known; NaN where none is."""
    known = [loss for loss in losses if not math.isnan(loss)]
    return value(known) if known else math.nan


def _perplexity(losses: Sequence[float]) -> float:
    """Of held-out losses, which are means over tokens of a client's model each."""
    return float(np.exp(np.mean(losses)))


def _over_layers(value: Callable[[LayerState], float]) -> Value:
    return lambda event: sum(map(value, event.after)) if event.after else math.nan


def class_scores(confusion: Sequence[Sequence[int]]) -> Floats:
    """Precision, recall and F1 of each class, (C, 3), by a confusion matrix; 0 where undefined."""
    counts = np.array(confusion)
    right, there, called = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    parts = (right, right, 2 * right), (called, there, there + called)
    top, bottom = (np.stack(part, axis=1) for part in parts)
    return np.asarray(top / np.maximum(bottom, 1), dtype=np.float64)


def macro_f1(confusion: Sequence[Sequence[int]]) -> float:
    """The mean of the classes' F1, of those that are or were called; NaN without a matrix."""
    if not confusion:
        return math.nan
    counts = np.array(confusion)
    return float(class_scores(confusion)[:, 2][counts.sum(axis=0) + counts.sum(axis=1) > 0].mean())


def best_evaluation(events: Iterable[Event]) -> Evaluated | None:
    """The evaluation after a round with the clients' highest mean score, the first of equals."""
    after = [event for event in events if isinstance(event, Evaluated) and event.round >= 0]
    return max(after, key=lambda event: float(np.mean(event.scores)), default=None)


def has_stopped(config: Config, events: Iterable[Event]) -> bool:
    """Whether a run stops here, after `stop_after` evaluations without gain."""
    events = list(events)
    best = best_evaluation(events)
    if config.stop_after is None or best is None:
        return False
    since = [e for e in events if isinstance(e, Evaluated) and e.round > best.round]
    return len(since) >= config.stop_after


def client_table(events: Iterable[Event]) -> list[list[str]]:
    """A head, and each client's last score on rows of its own and on those that all are judged on.

    Nothing without `--test-split client`.
    """
    found = [event for event in events if isinstance(event, Evaluated) and event.own_scores]
    if not found:
        return []
    last = found[-1]
    lines = zip(last.own_rows, last.own_scores, last.scores, strict=True)
    return [
        ["client", "own rows", "score on them", f"on all {last.rows}"],
        *([str(k), str(n), f"{own:.3f}", f"{all_:.3f}"] for k, (n, own, all_) in enumerate(lines)),
    ]


def class_table(events: Iterable[Event]) -> list[list[str]]:
    """How the clients' own models, all together, did with each class at the end of a run.

    A head, for each class its scores and how many % of its rows were called what, and the macro F1;
    nothing of a regression, or before the end.
    """
    names: Sequence[str] = ()
    confusion: Sequence[Sequence[int]] = ()
    for event in events:
        if isinstance(event, Started):
            names = event.label_names
        elif isinstance(event, Evaluated):
            confusion = event.confusion
    if not confusion:
        return []
    counts = np.array(confusion)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    lines = zip(names, class_scores(confusion), shares, strict=True)
    return [
        ["class", "precision", "recall", "F1", *names],
        *([name, *(f"{x:.3f}" for x in scores), *(f"{x:.0f}" for x in share)]
          for name, scores, share in lines),
        ["macro F1", "", "", f"{macro_f1(confusion):.3f}", *("" for _ in names)],
    ]  # fmt: skip


_squared_cross_terms = _over_layers(lambda layer: layer.cross_term**2)
_setting = partial(Figure, kinds=(Started,), take="first")
_evaluated = partial(Figure, kinds=(Evaluated,), take="last", logged="eval/{}")
_sometimes = partial(Figure, kinds=(Evaluated,), take="last", sometimes=True)
_base = partial(Figure, kinds=(Evaluated,), take="first", only="language")
_distance = partial(Figure, take="last", logged="round/{}", form=".2g", log=True)
_time = partial(Figure, take="sum", logged="time/{}")

FIGURES: dict[str, Figure] = {
    "majority": _setting("Always giving the same answer", lambda e: e.majority),
    "accuracy_client_mean": _evaluated(
        "Clients' own models", lambda e: float(np.mean(e.scores)),
        head="{metric}", unit="{metric}, client mean",
    ),
    "accuracy_client_std": _evaluated(
        "Standard deviation over clients", lambda e: float(np.std(e.scores))
    ),
    "accuracy_client_min": _evaluated(
        "Worst client", lambda e: min(e.scores), head="worst", unit="{metric}, worst client"
    ),
    "accuracy_averaged_model": _evaluated(
        "Averaged model", lambda e: e.averaged_score,
        head="averaged", unit="{metric}, of the mean factors",
    ),
    "loss_client_mean": _evaluated(
        "Loss", lambda e: float(np.mean(e.losses)), head="loss", unit="held-out loss, client mean"
    ),
    "loss_averaged_model": _evaluated("Loss of the averaged model", lambda e: e.averaged_loss),
    "accuracy_own_mean": _sometimes(
        "Clients' own models on rows of their own",
        lambda e: float(np.mean(e.own_scores)) if e.own_scores else math.nan,
        head="{metric}, own rows",
    ),
    "accuracy_own_min": _sometimes(
        "Worst client on rows of its own", lambda e: min(e.own_scores, default=math.nan)
    ),
    "macro_f1_clients": _sometimes(
        "Macro F1 of all clients' answers together", lambda e: macro_f1(e.confusion)
    ),
    "macro_f1_averaged_model": _sometimes(
        "Macro F1 of the averaged model", lambda e: macro_f1(e.averaged_confusion)
    ),
    "perplexity_client_mean": _evaluated(
        "Perplexity, e to the clients' mean loss", lambda e: _perplexity(e.losses),
        head="perplexity", form=".4g", logged="", only="language",
    ),
    "accuracy_base": _base(
        "The base without adapter", _before(lambda e: e.averaged_score), head="base"
    ),
    "perplexity_base": _base(
        "Perplexity of the base", _before(lambda e: _perplexity([e.averaged_loss])),
        head="base perplexity", form=".4g",
    ),
    "train_loss_client_mean": Figure(
        "Training loss", lambda e: _of_known(lambda known: float(np.mean(known)), e.train_losses),
        logged="train/loss_client_mean",
    ),
    "train_loss_client_max": Figure(
        "Highest training loss", lambda e: _of_known(max, e.train_losses),
        logged="train/loss_client_max",
    ),
    "cross_term": _distance(
        "Cross term after mixing", lambda e: math.sqrt(_squared_cross_terms(e)),
        head="cross term", unit="‖C‖<sub>F</sub>, all layers",
    ),
    "consensus_A": _distance(
        "Ξ of A", _over_layers(lambda layer: layer.consensus_A), head="Ξ of A"
    ),
    "consensus_B": _distance(
        "Ξ of B", _over_layers(lambda layer: layer.consensus_B), head="Ξ of B"
    ),
    "apart": Figure(
        "Disagreement after mixing",
        _over_layers(lambda layer: layer.consensus_A + layer.consensus_B),
        unit="Ξ<sub>A</sub> + Ξ<sub>B</sub>, all layers", log=True,
    ),
    "rho": _setting("Disagreement that a round leaves, at worst", lambda e: e.rho),
    "rho_of_round": Figure("The same of this round", lambda e: e.rho, logged="round/rho"),
    "sent_bytes": Figure(
        "Sent by all clients", lambda e: e.sent_bytes, take="sum", logged="round/{}",
        head="MB sent", form=".1f", scale=1e6,
    ),
    "worker_bytes": Figure(
        "What a cluster's workers handed each other", lambda e: e.worker_bytes, take="sum"
    ),
    "train_seconds": _time("Local training", lambda e: e.train_seconds),
    "mix_seconds": _time("Mixing", lambda e: e.mix_seconds),
    "eval_seconds": _time("Evaluation", seconds, (Evaluated,)),
    "wall_seconds": _time(
        "All of it, preparing included", seconds, (Started, RoundDone, Evaluated),
        logged="", head="seconds", form=".0f",
    ),
}  # fmt: skip
"""Name -> figure, in the order of `summary.json`."""


def taken(events: Sequence[Event]) -> dict[str, float]:
    """Name -> figure of a run as the summary takes it; without those that the run hasn't got."""
    there: dict[type[Event], list[Event]] = {
        kind: [event for event in events if isinstance(event, kind)] for kind in KINDS.values()
    }
    objective = next((event.objective for event in events if isinstance(event, Started)), "")
    found = {
        name: TAKES[one.take](one.value, [there[kind] for kind in one.kinds])
        for name, one in FIGURES.items()
        if one.take and one.is_of(objective) and all(there[kind] for kind in one.kinds)
    }
    return {k: x for k, x in found.items() if not (FIGURES[k].sometimes and math.isnan(x))}


def remarks(events: Iterable[Event]) -> list[str]:
    """What is to be said of a run beside its figures, a sentence each."""
    rounds = [event for event in events if isinstance(event, RoundDone)]
    if rounds and not any(event.edges for event in rounds):
        return ["Nobody met anybody in any round, so each client trained alone."]
    return []


def summarize(config: Config, events: Iterable[Event]) -> dict[str, Any]:
    """What `summary.json` holds of a finished run: settings, figures, and spent privacy."""
    events = list(events)
    rounds = [event for event in events if isinstance(event, RoundDone)]
    settings = ("method", "task", "seed", "rounds", "clients", "topology")
    return {
        **{name: getattr(config, name) for name in settings},
        "metric": next(e.metric for e in events if isinstance(e, Started)),
        **taken(events),
        **_best(config, events),
        "config_digest": config.digest(),
        **spent(config, releases(rounds)),
    }


def _best(config: Config, events: Sequence[Event]) -> dict[str, float]:
    """Where a run that may stop early had its best round, and how far it came."""
    best = best_evaluation(events)
    if config.stop_after is None or best is None:
        return {}
    return {
        "rounds_done": sum(isinstance(event, RoundDone) for event in events),
        "best_round": best.round,
        "best_accuracy_client_mean": float(np.mean(best.scores)),
    }
