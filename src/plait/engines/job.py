"""From a config to everything that a run needs, ready to compute."""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any

import numpy as np
from torch import Tensor, nn

from plait.adaptive_phases import NOTES
from plait.config import (
    LANGUAGE_TASKS,
    THIS_MACHINE,
    Config,
    FileSettings,
    Machine,
    ModelSettings,
    names_of,
)
from plait.data.choices import Choices
from plait.data.objectives import LANGUAGE, Objective
from plait.data.own_rows import own_rows
from plait.data.partition import deal
from plait.data.rendering import Made, tokens_of
from plait.data.tasks import METRICS, Rows, Task, load_task
from plait.data.token_cache import stored_tokens
from plait.data.tokens import Tokens
from plait.engines.eval_schedule import EvalSchedule, eval_schedule
from plait.events import Started
from plait.factors import VALUE, Factor, Slot, public
from plait.lora import Layout, Stack, State, cut, initial_stack, resized
from plait.machine.file_cache import kept
from plait.methods import Method, build_method, settled
from plait.model.backbone import Backbone
from plait.model.loading import Loaded, draws_head, load_for, load_tokenizer
from plait.plugins import load_plugins
from plait.privacy import check_accounting
from plait.topology import rho_of
from plait.wire_types import WireType, wire_type

Edge = tuple[int, int, float]
"""(i, j, w_ij): client i heard j and gave it the weight."""


@dataclass(frozen=True)
class Job:
    """A prepared run.

    Attributes:
        config: With the topology and weights that the method is defined on, where it has any.
        task: The data as text.
        method: What trains and what travels.
        schedule: Round -> W (N, N).
        backbone: The frozen model.
        train: The training split, tokenised.
        held_out: The split that is evaluated, tokenised.
        shares: Client -> its rows of the training split.
        own_rows: Client -> its own rows of the evaluated split; none with `test_split` common.
        started: The first event of the run.
        choices: The options of the evaluated rows, if their answers are chosen among some.
    """

    config: Config
    task: Task
    method: Method
    schedule: Callable[[int], np.ndarray]
    backbone: Backbone
    train: Tokens
    held_out: Tokens
    shares: list[np.ndarray]
    own_rows: list[np.ndarray]
    started: Started
    choices: Choices | None = None

    @cached_property
    def evaluations(self) -> EvalSchedule:
        """When clients are evaluated."""
        return _schedule(self.config, self.held_out, self.choices)

    def initial_stack(self, clients: Sequence[int] | None = None) -> Stack:
        """The common start of all N clients, or of some."""
        backbone = self.backbone
        clients = range(self.config.clients) if clients is None else clients
        stack = initial_stack(
            backbone.layout,
            backbone.head_start,
            len(clients),
            self.config.seed,
            backbone.device,
            (*self.method.optimizer.kinds, *self.method.kept),
        )
        self.cut(stack.state, clients)
        stack.state |= self.made_public(stack.state)
        return stack

    @cached_property
    def wire(self) -> WireType:
        """The type of the values in messages."""
        return wire_type(self.config.wire)

    def sent(self, slot: Slot) -> Slot:
        """The slot that others get of one that travels: itself, or its public copy."""
        kind, factor = slot
        return slot if self.wire.share is None else (public(kind), factor)

    def made_public(self, state: Mapping[Slot, Tensor]) -> State:
        """Public copies (n, P) that have all of what travels, where there are such copies."""
        slots = self.travels if self.wire.share is not None else ()
        return {self.sent(slot): state[slot].clone() for slot in slots}

    def cut(self, state: State, clients: Sequence[int]) -> None:
        """Set to zero what clients of smaller rank don't have, in place; a row for each client."""
        if self.config.ranks:
            cut(self.backbone.layout, state, [self.config.rank_of(k) for k in clients])

    def layout_of(self, client: int) -> Layout:
        """Where everything lies in what a client sends, and in its adapter."""
        return self.backbone.layout.of_rank(self.config.rank_of(client))

    def own(self, rows: Mapping[Slot, Tensor], client: int) -> State:
        """Slot -> (P,) as a client sends it: without the directions that it doesn't have."""
        return self._of_rank(rows, self.config.rank, self.config.rank_of(client))

    def whole(self, rows: Mapping[Slot, Tensor], client: int) -> State:
        """Slot -> (P,) that a client has sent, as a row of the stack."""
        return self._of_rank(rows, self.config.rank_of(client), self.config.rank)

    def _of_rank(self, rows: Mapping[Slot, Tensor], old: int, new: int) -> State:
        flat = {slot: row[None] for slot, row in rows.items()}
        found = resized(self.backbone.layout.of_rank(old), flat, new)
        return {slot: row[0] for slot, row in found.items()}

    def trained(self, round_: int, client: int | None = None) -> Factor:
        """What takes local steps in a round, at a client or at any: the method's, and a head."""
        return reduce(operator.or_, self.turns(round_, client))

    def turns(self, round_: int, client: int | None = None) -> list[Factor]:
        """What takes each of the K local steps of a round, at a client or at any."""
        rests = client is not None and not self.method.at(round_, client)
        head = Factor.HEAD if self.backbone.layout.head and not rests else Factor.NONE
        here, count = self.method.trains(round_, client), self.config.local_steps
        steps = range(round_ * count, (round_ + 1) * count)
        return [here & self.method.turn(step) | head for step in steps]

    def shared(self, round_: int) -> tuple[Slot, ...]:
        """The slots that travel in a round: the method's, and with them a head that is mixed."""
        factors = self.method.share(round_)
        if factors and self.backbone.head_policy == "mixed":
            factors |= Factor.HEAD
        return tuple(
            (kind, factor)
            for kind in self.method.kinds
            for factor in self.backbone.layout.factors
            if factor in factors
        )

    @property
    def base(self) -> tuple[Slot, ...]:
        """The slots of what is added to the frozen weights: mixed whether they travel or not."""
        return tuple((VALUE, f) for f in self.backbone.layout.factors if f in Factor.BASE)

    def travelled(self, rounds: int) -> tuple[Slot, ...]:
        """The slots that are sent in one of so many rounds, each once."""
        sent = {slot for round_ in range(rounds) for slot in self.shared(round_)}
        return tuple(
            sorted(sent, key=lambda slot: (self.method.kinds.index(slot[0]), slot[1].value))
        )

    @cached_property
    def travels(self) -> tuple[Slot, ...]:
        """The slots that are sent in some round of the run."""
        return self.travelled(self.config.rounds)

    def message_bytes(self, round_: int, client: int, changes: bool = False) -> int:
        """The bytes of what a client sends to a neighbour in a round.

        Args:
            round_: The round's number.
            client: Who sends.
            changes: The neighbour has what was shared last: what changed will do, if that is less.
        """
        layout, factors = self.layout_of(client), [factor for _, factor in self.shared(round_)]
        whole = sum(self.wire.num_bytes(layout.sizes(factor)) for factor in factors)
        some = sum(self.wire.change_bytes(layout.size(factor)) for factor in factors)
        return min(whole, some) if changes else whole

    def shared_last(self, round_: int) -> set[int]:
        """The rounds in which the slots that travel in a round did so last, if they ever did.

        None with a wire type that sends all of a slot: then it doesn't matter.
        """
        earlier = range(round_) if self.wire.share is not None else ()
        last = (
            next((t for t in reversed(earlier) if slot in self.shared(t)), None)
            for slot in self.shared(round_)
        )
        return {t for t in last if t is not None}

    def sent_bytes(self, round_: int, edges: Iterable[Edge]) -> int:
        """The bytes of all that was heard in a round; whoever heard the last had it."""
        last = [self.schedule(t) for t in self.shared_last(round_)]
        return sum(
            self.message_bytes(round_, j, changes=all(W[i, j] for W in last)) for i, j, _ in edges
        )

    @cached_property
    def judged(self) -> Objective:
        """The task's objective, with answers as its metric takes them."""
        whole = METRICS[self.task.metric].of_outputs
        objective = self.task.objective
        return dataclasses.replace(objective, answer=lambda x: x) if whole else objective

    def score(self, answers: np.ndarray, targets: np.ndarray) -> float:
        """The task's metric of the answers of `judged` to Q rows against targets (Q,)."""
        return METRICS[self.task.metric].score(targets, answers)


@dataclass(frozen=True)
class Rules:
    """What a config says must happen: `Job`'s attributes that need neither data nor a model."""

    config: Config
    method: Method
    schedule: Callable[[int], np.ndarray]

    @classmethod
    def of(cls, config: Config) -> Rules:
        """The rules of a config, with the topology and weights that its method is defined on."""
        load_plugins(config.plugin)
        check_accounting(config)
        config = settled(config)
        method = build_method(config)
        return cls(config, method, method.meets(config))


@dataclass(frozen=True)
class Materials:
    """What a run computes with: `Job`'s attributes that come from data and model."""

    task: Task
    backbone: Backbone
    train: Tokens
    held_out: Tokens
    choices: Choices | None = None


def prepare(config: Config, machine: Machine = THIS_MACHINE, own: Task | None = None) -> Job:
    """Load the data, deal it to the clients, load the model, build the topology.

    Args:
        config: What to run.
        machine: Where and how fast.
        own: The data of a peer that has its own: nothing is dealt, all rows are its share. It may
            have none, if its training loop isn't the run's; then nothing is evaluated either.

    Raises:
        ValueError: The config asks for something that isn't there or can't be; the message says
            what to change.
    """
    begin = time.perf_counter()
    rules = Rules.of(config)
    config = rules.config
    if own is not None and not len(own.train):
        return _without_rows(rules, own, machine, begin)
    task, shares = dealt(config, own)  # before a model is loaded for nothing
    if (config.options or config.generate_rows) and task.objective is not LANGUAGE:
        raise ValueError(
            "--options and --generate-rows are for language models, as in --task chat."
        )
    task.held_out(config.eval_split)
    own_rows(task, shares, config)
    if own is None:
        share = _shared_validation if config.eval_split == "validation" else _shared_materials
        materials = share(shared_settings(config), machine)
    else:
        materials = _materials(own, config, machine, operator.call)
    return assemble(rules, materials, asked_shares(shares, materials.train), begin)


def _without_rows(rules: Rules, task: Task, machine: Machine, begin: float) -> Job:
    """The job of a peer whose rows only its own training loop knows."""
    config, none = rules.config, np.zeros(0, np.int32)
    backbone = Backbone(
        load_for(config, task.objective, task.label_names), config, machine, task.objective
    )
    tokens = Tokens(none, none, np.zeros(1, np.int64), task.train.labels)
    shares = dealt(config, task)[1]
    return assemble(rules, Materials(task, backbone, tokens, tokens), shares, begin)


def asked_shares(shares: list[np.ndarray], train: Tokens) -> list[np.ndarray]:
    """The shares without rows of which nothing is learned (`rendering.cut`).

    Raises:
        ValueError: A client has no others.
    """
    asked = np.diff(train.asked_offsets) > 0
    kept = [share[asked[share]] for share in shares]
    if empty := [client for client, share in enumerate(kept) if not len(share)]:
        raise ValueError(f"Nothing is left to learn of the rows of client {empty[0]}.")
    return kept


def dealt(config: Config, own: Task | None = None) -> tuple[Task, list[np.ndarray]]:
    """The task, and each client's rows of its training split; as in `prepare`."""
    if own is not None:
        return own, [np.arange(len(own.train))] * config.clients
    task = _shared_task(dataclasses.replace(shared_settings(config), eval_split="test"))
    return task, deal(task, config)


def shared_settings(config: Config) -> Config:
    """The settings that data and model depend on, all others at their defaults."""
    shared = {name: getattr(config, name) for name in MATERIAL}
    shared |= {"alpha": config.lora_alpha, "scale": "lora"}  # the same with any number of clients
    drawn = draws_head(config) and config.task not in LANGUAGE_TASKS  # whose models have no head
    return Config(**shared if drawn else shared | {"seed": 0})


def assemble(rules: Rules, materials: Materials, shares: list[np.ndarray], begin: float) -> Job:
    """The job of its parts; preparing them began at `perf_counter` time `begin`."""
    method, backbone = rules.method, materials.backbone
    if method.base_rank or method.picks:
        notes = NOTES if method.picks else 0
        backbone = backbone.with_layout(base_rank=method.base_rank, notes=notes)
        materials = dataclasses.replace(materials, backbone=backbone)
    started = _first_event(rules.config, materials, shares, begin)
    mine = own_rows(materials.task, shares, rules.config)
    return Job(**vars(rules), **vars(materials), shares=shares, own_rows=mine, started=started)


def _first_event(
    config: Config, materials: Materials, shares: list[np.ndarray], begin: float
) -> Started:
    task, backbone = materials.task, materials.backbone
    schedule = _schedule(config, materials.held_out, materials.choices)
    return Started(
        task=task.name,
        metric=task.metric,
        objective=task.objective.name,
        label_names=task.label_names,
        label_counts=_label_counts(task, shares),
        majority=_majority(task, materials.held_out.labels),
        parameters={str(f.name): backbone.layout.size(f) for f in backbone.layout.factors},
        rho=rho_of(config),
        eval_every=schedule.every or 0,
        eval_rows=schedule.rows or len(materials.held_out),
        held_out_rows=len(materials.held_out),
        device=str(backbone.device),
        seconds=time.perf_counter() - begin,
    )


def _schedule(config: Config, held_out: Tokens, choices: Choices | None) -> EvalSchedule:
    return eval_schedule(config, len(held_out), 1 + (choices.per_row if choices else 0))


MATERIAL = (
    names_of(FileSettings)
    | names_of(ModelSettings)
    | {"task", "objective", "max_length", "eval_split", "test_split", "metric", "options", "seed"}
)
"""The settings that data and model depend on: runs that agree on them share both. The seed is one
of them where a head is drawn from it."""


@kept(1)
def _shared_task(config: Config) -> Task:
    """The task by name; kept for as long as its materials are."""
    return load_task(config)


@kept(1)
def _shared_materials(config: Config, machine: Machine) -> Materials:
    """The materials of a task by name; kept for the next run with the same ones."""
    return _materials(_shared_task(config), config, machine, stored_tokens)


@kept(1)
def _shared_validation(config: Config, machine: Machine) -> Materials:
    """The same with the validation split in the place of the test split."""
    shared = _shared_materials(dataclasses.replace(config, eval_split="test"), machine)
    task, backbone = shared.task, shared.backbone
    held_out, choices = _held_out(task, task.validation, backbone.tokenizer, config, stored_tokens)
    return dataclasses.replace(
        shared, held_out=_known(backbone, held_out), choices=_known_choices(backbone, choices)
    )


def _materials(task: Task, config: Config, machine: Machine, made: Made) -> Materials:
    """Task, model, training and evaluated split."""
    load = partial(load_for, config, task.objective, task.label_names)
    return materials_of(task, load_tokenizer(config), load, config, machine, made)


def materials_of(
    task: Task,
    tokenizer: Any,
    load: Callable[[], Loaded],
    config: Config,
    machine: Machine,
    made: Made = operator.call,
) -> Materials:
    """What a run on some rows computes with.

    Args:
        task: The rows.
        tokenizer: Reads them, before the model is loaded: some can't be read.
        load: Loads the model.
        config: The settings.
        machine: Where and how fast.
        made: May keep what is tokenised.

    Raises:
        ValueError: The model or its tokenizer doesn't take the rows, or nothing is asked of them.
    """
    train = tokens_of(task.objective, task.train, tokenizer, config, made)
    rows = task.held_out(config.eval_split)
    held_out, choices = _held_out(task, rows, tokenizer, config, made)
    loaded = load()
    _check_positions(loaded.model, max(int(one.lengths.max()) for one in (train, held_out)))
    backbone = Backbone(loaded, config, machine, task.objective)
    train, held_out = _known(backbone, train), _known(backbone, held_out)
    return Materials(task, backbone, train, held_out, _known_choices(backbone, choices))


def _check_positions(model: Any, length: int) -> None:
    """Refuse texts that are longer than a table of positions."""
    tables = (
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if name.endswith(("position_embeddings", "wpe")) and isinstance(module, nn.Embedding)
    )
    if (most := min(tables, default=length)) < length:
        raise ValueError(
            f"Texts have up to {length} tokens, and the model has positions for {most}: pass "
            f"--max-length {most}."
        )


def _known(backbone: Backbone, tokens: Tokens) -> Tokens:
    """Tokens that the model takes, with what is computed of them beforehand."""
    backbone.check(tokens)
    return backbone.with_hidden(tokens)


def _known_choices(backbone: Backbone, choices: Choices | None) -> Choices | None:
    return choices and dataclasses.replace(choices, tokens=_known(backbone, choices.tokens))


def _held_out(
    task: Task, rows: Rows, tokenizer: Any, config: Config, made: Made
) -> tuple[Tokens, Choices | None]:
    """The rows that are asked anything, and their options.

    Raises:
        ValueError: There are none.
    """

    def read(some: Rows) -> Tokens:
        return tokens_of(task.objective, some, tokenizer, config, made)

    tokens, choices = read(rows), Choices.of(rows, read) if task.objective is LANGUAGE else None
    asked = np.flatnonzero(np.diff(tokens.asked_offsets))
    if len(asked) == 0:
        raise ValueError(
            "Nothing is asked of the held-out rows: all prompts are too long (--max-length)."
        )
    if len(asked) == len(tokens):
        return tokens, choices
    return tokens.take(asked), choices and choices.take(asked)


def _label_counts(task: Task, shares: list[np.ndarray]) -> list[list[int]]:
    if not task.label_names:
        return [[len(share)] for share in shares]
    size = len(task.label_names)
    return [np.bincount(task.train.labels[share], minlength=size).tolist() for share in shares]


def _majority(task: Task, labels: np.ndarray) -> float:
    if task.metric != "accuracy" or not len(labels):
        return 0.0
    return float(np.bincount(labels).max() / len(labels))
