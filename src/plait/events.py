"""What a run says. An engine is a generator of these; whatever looks at a run loops over them.

`events.jsonl` has one line for each; figures.py has what is computed from them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from plait.factors import factors_name, factors_named
from plait.metrics import LayerState, Pair


@dataclass(frozen=True, kw_only=True)
class Started:
    """The run is prepared.

    Attributes:
        task: The task's name.
        metric: What the scores measure, such as `accuracy`.
        objective: What is learned, a key of `OBJECTIVES`.
        label_names: The classes; empty where the objective has none.
        label_counts: (N, C) rows of each class at each client; (N, 1) without classes.
            A peer with rows of its own doesn't know the others' and has 0 there.
        majority: Score of always answering the most frequent class of the evaluated split; 0
            for metrics other than accuracy.
        parameters: Factor name -> parameters of one client.
        rho: Of the topology: how much of the disagreement survives a round, in [0, 1].
        eval_every: Rounds between evaluations; 0 for none but before the first and after the last.
        eval_rows: On how many rows, between those two.
        client_names: Of peers, which have names; empty where clients are numbers.
        peer: Of one peer's part of a run, the number of its client: it sees itself alone.
        held_out_rows: Rows of the evaluated split, all of which are judged after the last round; 0
            in runs of an older plait.
        device: Where it computes.
        seconds: Time to prepare.
    """

    task: str
    metric: str
    objective: str = "classification"
    label_names: tuple[str, ...]
    label_counts: list[list[int]]
    majority: float
    parameters: dict[str, int]
    rho: float
    eval_every: int = 1
    eval_rows: int = 0
    held_out_rows: int = 0
    client_names: tuple[str, ...] = ()
    peer: int | None = None
    device: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RoundDone:
    """Local training and mixing of a round.

    Attributes:
        round: From 0.
        active: The factors that trained, such as `B`, `A` or `AB`, each at some client.
        shared: The factors that travelled.
        train_losses: (N,) each client's mean training loss over its local steps; NaN where it took
            none, or nobody said.
        edges: (i, j, w_ij) of this round, i != j: client i heard j and gave it the weight.
        rho: ||W - J||_2 of this round.
        sent_bytes: What all clients sent in this round.
        before: Every layer after local training.
        after: Every layer after mixing.
        apart: (N,) each client's squared distance from the mean of all clients after mixing, over
            all adapted layers; its mean is Xi_A + Xi_B. Empty where nobody sees all clients.
        pairs_apart: (i, j, squared distance) of clients i < j as they met, before mixing, over all
            adapted layers; to four digits. Of the first hundred clients; of a peer itself and those
            that it heard both factors from; empty on a cluster.
        train_seconds: Time of the local phase.
        mix_seconds: Time of mixing.
        worker_bytes: What the workers of a cluster handed each other, which no client ever sends.
    """

    round: int
    active: str
    shared: str
    train_losses: list[float]
    edges: list[tuple[int, int, float]]
    rho: float
    sent_bytes: int
    before: list[LayerState]
    after: list[LayerState]
    train_seconds: float
    mix_seconds: float
    apart: list[float] = dataclasses.field(default_factory=list)
    pairs_apart: list[Pair] = dataclasses.field(default_factory=list)
    worker_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The clients' own models and the averaged model on held-out rows.

    Attributes:
        round: The round that was just done, from 0; -1 is before the first.
        rows: How many rows.
        scores: (N,) the task's metric of each client's own model.
        losses: (N,).
        averaged_score: Of the model with the mean factors.
        averaged_loss: Of the model with the mean factors.
        seconds: Time it took.
        confusion: (C, C) how many rows of each class the clients' own models called each class, all
            clients together. After the last round of a classification, with `--stop-after` after
            each that is evaluated; else empty.
        averaged_confusion: The same of the model with the mean factors; empty between peers.
        hits: (rows,) how many of the clients' own models were right on each row; of a language
            model that doesn't choose between options, on how many tokens, all clients together.
            After the rounds that `confusion` is of, and not of scores.
        asked: (rows,) how many tokens of each row such a language model was asked for; else empty.
        own_scores: (N,) each client's own model on held-out rows of its own. With `--test-split
            client`, and where all rows are evaluated; else empty.
        own_rows: (N,) how many these are.
    """

    round: int
    rows: int
    scores: list[float]
    losses: list[float]
    averaged_score: float
    averaged_loss: float
    seconds: float
    confusion: list[list[int]] = dataclasses.field(default_factory=list)
    averaged_confusion: list[list[int]] = dataclasses.field(default_factory=list)
    hits: list[int] = dataclasses.field(default_factory=list)
    asked: list[int] = dataclasses.field(default_factory=list)
    own_scores: list[float] = dataclasses.field(default_factory=list)
    own_rows: list[int] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something between peers did not go as in a simulation; the round goes on.

    Attributes:
        round: The round that the peer was in.
        kind: `refused` here, `rejected` there, `missing`, `absent` or `back` (a neighbour),
            `skipped` or `joined` (this peer).
        peer: The neighbour concerned, or this peer.
        reason: The name of the reason, where something was refused.
        detail: In words.
    """

    round: int
    kind: str
    peer: str
    reason: str
    detail: str


Event = Started | RoundDone | Evaluated | Incident
KINDS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Started, RoundDone, Evaluated, Incident)
}


def to_line(event: Event) -> str:
    """One line of JSON, the event's kind first."""
    return json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)})


def from_line(line: str) -> Event:
    """The event of `to_line`; fields that a later plait has added are passed over.

    Raises:
        ValueError, TypeError, KeyError: It is none.
    """
    values = json.loads(line)
    kind = KINDS[values.pop("event")]
    if kind is RoundDone:
        for moment in ("before", "after"):
            values[moment] = [_made(LayerState, layer) for layer in values[moment]]
        for triples in ("edges", "pairs_apart"):
            values[triples] = [tuple(triple) for triple in values.get(triples, [])]
    if kind is Started:
        for names in ("label_names", "client_names"):
            values[names] = tuple(values.get(names, ()))
        # Runs of plait before 0.2 didn't say; there only scores had no names.
        values.setdefault("objective", "classification" if values["label_names"] else "regression")
    event: Event = _made(kind, values)
    return event


def _made(kind: type[Any], values: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def all_active(said: Sequence[RoundDone]) -> str:
    """What took local steps in a round, by what some say who each have a part of the clients."""
    return factors_name(reduce(or_, (factors_named(one.active) for one in said)))


def together(parts: Sequence[Evaluated]) -> Evaluated:
    """One evaluation of those of some clients each; the first of them has the averaged model's."""
    tables = [one.confusion for one in parts]
    hits = [one.hits for one in parts]
    same = len(set(map(len, hits))) == 1  # peers may have held-out rows of their own
    names = ("scores", "losses", "own_scores", "own_rows")
    joined: dict[str, Any] = {
        name: [x for one in parts for x in getattr(one, name)] for name in names
    }
    return dataclasses.replace(
        parts[0],
        **joined,
        seconds=max(one.seconds for one in parts),
        hits=[sum(row) for row in zip(*hits, strict=True)] if same else [],
        asked=parts[0].asked if same else [],
        confusion=[
            [sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)
        ],
    )


def releases(rounds: Sequence[RoundDone]) -> int:
    """How many changes differential privacy has to account for.

    Where anything travels every round counts, so a change that stays at home is one too many.
    """
    return len(rounds) if any(event.shared != "-" for event in rounds) else 0
