"""For people with their own model and data sets: a run whose materials are objects, not names.

    trainer = Trainer(model=model, tokenizer=tokenizer, train_dataset=[ward_a, ward_b, ward_c],
                      eval_dataset=held_out, config=Config(rounds=20))
    for event in trainer:
        ...
    trainer.model("mean")

It makes a `Job` of what it is given instead of what the config names; all else is `Run`'s.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel

from plait.config import THIS_MACHINE, Config, Machine, Pooling, default_length
from plait.data.objectives import CLASSIFICATION, LANGUAGE, REGRESSION, Objective
from plait.data.sources import chat_rows
from plait.data.tables import Row as TableRow
from plait.data.tables import Table
from plait.data.tasks import Rows, Task, judged_by
from plait.data.tokens import Tokens, tokenize
from plait.engines.fingerprints import of_arrays
from plait.engines.job import Job, Materials, Rules, asked_shares, assemble, materials_of
from plait.engines.simulate import Simulation
from plait.model.backbone import Backbone
from plait.model.heads import MeanPooledClassifier
from plait.model.loading import Loaded
from plait.runs.run import Run

Row = Mapping[str, Any]
Texts = list[tuple[str, ...]]


class Dataset(Protocol):
    """Rows by number, as lists, PyTorch's map-style data sets and Hugging Face's have them.

    A row is a mapping with a label, under `config.label_column` or `labels`, and with texts under
    `config.text_columns` or, tokenised already, with `input_ids`. Padding goes by the
    `attention_mask`, where there is one. For a language model it has what a row of `--task chat`
    has, such as `messages`, or `prompt` and `completion`.
    """

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """A row."""
        ...


class Trainer(Run):
    """A run with one's own model, and data sets that the clients have.

    Attributes:
        config: The settings, with what follows from the objects: clients, task and backbone.
        job: The prepared run.

    Example:
        >>> trainer = Trainer(model=model, tokenizer=tokenizer, train_dataset=[a, b, c],
        ...                   eval_dataset=held_out, config=Config())  # doctest: +SKIP
        >>> for event in trainer:  # doctest: +SKIP
        ...     print(event)
        >>> trainer.save("runs/mine")  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        train_dataset: Sequence[Dataset],
        eval_dataset: Dataset,
        config: Config,
        metric: str | None = None,
        out: Path | str | None = None,
        resume: bool = False,
        machine: Machine = THIS_MACHINE,
    ) -> None:
        """Tokenise the rows and freeze a copy of the model.

        Args:
            model: A sequence classification or causal language model of transformers. It is
                copied: yours stays as it is, to load the adapters onto.
            tokenizer: Its tokenizer; None if all rows are tokenised already.
            train_dataset: One data set for each client.
            eval_dataset: The rows that every client's model is judged on.
            config: The settings. Those that name data, its partition or the model don't apply.
            metric: A key of `METRICS`; the config's `metric`, or accuracy, or Pearson's correlation
                where labels are scores, if not given.
            out: A run folder, for `plait report` and the like; nothing is written without one.
            resume: Go on from the folder's checkpoint, with the same objects.
            machine: Where and how fast.

        Raises:
            ValueError: Rows without text or label, labels that the model has no output for, a
                model that is none of transformers', settings that can't run, or a folder in use.
        """
        if not isinstance(model, PreTrainedModel | MeanPooledClassifier):
            raise ValueError(
                f"The model is a {type(model).__name__}; give a sequence classification or causal "
                "language model of transformers, such as AutoModelForSequenceClassification loads."
            )
        if not len(train_dataset):
            raise ValueError("train_dataset is empty; give a list with a data set for each client.")
        name = getattr(model, "name_or_path", "") or type(model).__name__
        pooling: Pooling = "mean" if isinstance(model, MeanPooledClassifier) else "model"
        usual = default_length("chat") if _objective(model) is LANGUAGE else None
        config = dataclasses.replace(
            config, clients=len(train_dataset), task="own", backbone=name, pooling=pooling,
            metric=metric or config.metric, generate_rows=0, max_length=config.max_length or usual,
        )  # fmt: skip
        super().__init__(config, out, resume=resume, machine=machine)
        self.job = _job(model, tokenizer, train_dataset, eval_dataset, config, machine)
        # Yours may be trained on, or get adapters, which change it in place.
        self._model, self._tokenizer = copy.deepcopy(model), tokenizer
        self._open = lambda *_: nullcontext(Simulation(self.job, self.job.initial_stack()))

    def fingerprints(self) -> dict[str, str]:
        """What it was given -> a hash of it: tokens and labels, and the model's shapes and head."""
        job, parts = self.job, {"training rows": self.job.train, "test rows": self.job.held_out}
        weights = (w.detach().flatten()[:1024] for w in self._model.state_dict().values())
        return {
            **{name: of_arrays(_arrays(tokens)) for name, tokens in parts.items()},
            "clients' shares": of_arrays(job.shares),
            "backbone": of_arrays(w.float().cpu().numpy() for w in weights),
        }

    def base(self) -> Any:
        """A copy of the model that was given."""
        return copy.deepcopy(self._model).eval()

    def tokenizer(self) -> Any:
        """The tokenizer that was given."""
        return self._tokenizer


def _job(
    model: Any,
    tokenizer: Any,
    train_dataset: Sequence[Dataset],
    eval_dataset: Dataset,
    config: Config,
    machine: Machine,
) -> Job:
    begin = time.perf_counter()
    rules = Rules.of(config)
    config, objective = rules.config, _objective(model)
    read = _Reader(tokenizer, config, objective, int(model.config.num_labels))

    def load() -> Loaded:
        return Loaded(copy.deepcopy(model), tokenizer, ())

    if objective is LANGUAGE:
        texts = [read.learned(one, f"client {i}") for i, one in enumerate(train_dataset)]
        task = _language_task(texts, read.learned(eval_dataset, "eval_dataset"), config)
        materials, sizes = materials_of(task, tokenizer, load, config, machine), [*map(len, texts)]
    else:
        hands = [read.all(one, f"client {i}") for i, one in enumerate(train_dataset)]
        held_out = read.all(eval_dataset, "eval_dataset")
        backbone = Backbone(load(), config, machine, objective)
        train, held_out = map(backbone.with_hidden, (_join(hands), held_out))
        task = _task(model, train, held_out, config.metric)
        materials, sizes = Materials(task, backbone, train, held_out), [*map(len, hands)]
    shares = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return assemble(rules, materials, asked_shares(shares, materials.train), begin)


def _language_task(hands: Sequence[Texts], held_out: Texts, config: Config) -> Task:
    """The task of a language model: what is learned of the rows of all clients."""
    texts = ([text for hand in hands for text in hand], held_out)
    train, test = (Rows(tuple(x), np.zeros(len(x), LANGUAGE.target_type)) for x in texts)
    metric = "option-accuracy" if config.options else LANGUAGE.metric
    return judged_by(Task("own", train, test, test, (), metric, LANGUAGE), config.metric)


def _task(model: Any, train: Tokens, held_out: Tokens, metric: str | None) -> Task:
    """The task as a run needs it: labels, their names and the metric, and no texts any more."""
    objective = _objective(model)
    classes = range(model.config.num_labels if objective.has_classes else 0)
    label_names = tuple(str(model.config.id2label[c]) for c in classes)
    rows, test = (Rows((("",),) * len(one), one.labels) for one in (train, held_out))
    task = Task("own", rows, test, test, label_names, objective.metric, objective)
    return judged_by(task, metric)


def _objective(model: Any) -> Objective:
    """What a model learns: transformers itself takes one with a single output for a regression."""
    causal = isinstance(model, PreTrainedModel) and model.can_generate()
    if causal and not model.config.is_encoder_decoder:
        return LANGUAGE
    return REGRESSION if model.config.num_labels == 1 else CLASSIFICATION


# -- from data sets to tokens


@dataclasses.dataclass(frozen=True)
class _Reader:
    """From a data set to tokens."""

    tokenizer: Any
    config: Config
    objective: Objective
    num_labels: int

    def all(self, dataset: Dataset, place: str) -> Tokens:
        """All rows; `place` says whose they are where something is wrong with them."""
        rows = _rows_of(dataset, place)
        labels = self._labels(rows, place)
        if "input_ids" in rows[0]:
            return _tokens(rows, labels)
        columns = [column.strip() for column in self.config.text_columns.split(",")]
        _need(columns, rows[0], place)
        if self.tokenizer is None:
            raise ValueError(f"The rows of {place} are texts; give the model's tokenizer.")
        texts = [tuple(row[column] for column in columns) for row in rows]
        if strange := [text for pair in texts for text in pair if not isinstance(text, str)]:
            raise ValueError(
                f"The rows of {place} have {type(strange[0]).__name__} as text, where strings are "
                "expected."
            )
        return tokenize(texts, labels, self.tokenizer, self.config.most_tokens)

    def learned(self, dataset: Dataset, place: str) -> Texts:
        """What a language model learns of all rows."""
        rows = _rows_of(dataset, place)
        if self.tokenizer is None:
            raise ValueError(f"The rows of {place} are texts; give the model's tokenizer.")
        table = Table(Path(place), list(rows[0]), [*map(TableRow, count(1), rows)], "row")
        return [example.texts for example in chat_rows(table, self.config)]

    def _labels(self, rows: Sequence[Row], place: str) -> np.ndarray:
        column = "labels" if "labels" in rows[0] else self.config.label_column
        _need([column], rows[0], place)
        cells = [np.asarray(row[column]) for row in rows]
        if several := [cell for cell in cells if cell.size != 1]:
            raise ValueError(
                f"The rows of {place} have {several[0].size} labels each, such as "
                f"{several[0].tolist()}; models of several labels aren't trained here."
            )
        labels = [cell.item() for cell in cells]
        classes = self.objective.has_classes
        if strange := [x for x in labels if not classes and not _is_score(x)]:
            raise ValueError(f"The labels of {place} must be numbers; there is {strange[0]!r}.")
        if strange := [x for x in labels if classes and x not in range(self.num_labels)]:
            raise ValueError(
                f"The labels of {place} must be whole numbers from 0 to {self.num_labels - 1}, as "
                f"the model has {self.num_labels} outputs; there is {strange[0]!r}. Number the "
                "labels, or load the model with another num_labels."
            )
        return np.array(labels, dtype=self.objective.target_type)


def _rows_of(dataset: Dataset, place: str) -> list[Row]:
    rows = [] if isinstance(dataset, Mapping) else [dataset[i] for i in range(len(dataset))]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            f"The data set of {place} has no rows that are mappings with text and label. "
            "train_dataset takes a list: one data set, of one row or more, for each client."
        )
    return rows


def _is_score(label: object) -> bool:
    return isinstance(label, int | float) and math.isfinite(label)


def _need(columns: Sequence[str], row: Row, place: str) -> None:
    if missing := [column for column in columns if column not in row]:
        raise ValueError(
            f"The rows of {place} have no {missing[0]!r}, only {', '.join(row)}. Name the columns "
            "with text_columns and label_column in the config."
        )


def _tokens(rows: Sequence[Row], labels: np.ndarray) -> Tokens:
    """Rows that are tokenised already, without their padding."""
    masks = [np.asarray(row.get("attention_mask", np.ones(len(row["input_ids"])))) for row in rows]
    ids = [np.asarray(row["input_ids"])[m > 0] for row, m in zip(rows, masks, strict=True)]
    types = [
        np.asarray(row.get("token_type_ids", np.zeros(len(m))))[m > 0]
        for row, m in zip(rows, masks, strict=True)
    ]
    return _flat(ids, types, labels)


def _flat(ids: Sequence[np.ndarray], types: Sequence[np.ndarray], labels: np.ndarray) -> Tokens:
    return Tokens(
        ids=np.concatenate(ids).astype(np.int32),
        types=np.concatenate(types).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(text) for text in ids])]).astype(np.int64),
        labels=labels,
    )


def _arrays(tokens: Tokens) -> Iterator[np.ndarray]:
    yield from (tokens.ids, tokens.offsets, tokens.labels)
    if tokens.asked is not None:
        yield tokens.asked


def _join(parts: Sequence[Tokens]) -> Tokens:
    """Several splits as one, one after another."""
    ids = [text for part in parts for text in np.split(part.ids, part.offsets[1:-1])]
    types = [text for part in parts for text in np.split(part.types, part.offsets[1:-1])]
    return _flat(ids, types, np.concatenate([part.labels for part in parts]))
