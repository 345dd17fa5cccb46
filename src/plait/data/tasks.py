"""A task is data: three splits of labelled texts, the label names and a metric.

Every task has a `test` split, which is reported, and a `validation` split for choosing settings,
which shares no text with the other two. Splits are drawn from a fixed seed, never from the run's:
two runs with different seeds are judged on the same rows. sources.py reads; this file decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from plait.config import Config
from plait.data.sources import GLUE, Example, Label, glue, read_file, snippets, trec_questions
from plait.lookup import lookup
from plait.rng import stream

Array = np.ndarray[Any, np.dtype[Any]]

SPLIT_SEED = 0
"""Splits belong to the data, not to the run: this never changes."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled texts.

    `texts` has one string for each row, or two for pairs. `labels` has shape (n,): int64 classes,
    or float32 for regression. `keys` names each row's natural client, where the data has one.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: Array
    keys: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, eq=False)
class Task:
    """Three splits that share no rows, and how to judge scores on them.

    `label_names` is empty for regression. `metric` is a key of `METRICS`.
    """

    name: str
    train: Rows
    validation: Rows
    test: Rows
    label_names: tuple[str, ...]
    metric: str

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier: the number of classes, or 1 for regression."""
        return len(self.label_names) or 1


# -- metrics: (labels (n,), scores (n,)) -> number; scores are classes, or floats for regression.
# scikit-learn and SciPy take two seconds to import, so each does it when it is first called.

Metric = Callable[[Array, Array], float]


def accuracy(labels: Array, scores: Array) -> float:
    """Share of rows, labels and predicted classes both (n,), in which the two are equal."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, scores))


def f1(labels: Array, scores: Array) -> float:
    """F1 of class 1, labels and predicted classes both (n,); 0 if nothing is or was called 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, scores, zero_division=0.0))


def matthews(labels: Array, scores: Array) -> float:
    """Matthews correlation of labels and predicted classes, both (n,); 0 if either is constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, scores))


def pearson(labels: Array, scores: Array) -> float:
    """Pearson correlation of labels and scores, both (n,); 0 if either is constant."""
    from scipy.stats import pearsonr

    if np.ptp(labels) == 0 or np.ptp(scores) == 0:
        return 0.0
    return float(pearsonr(labels, scores).statistic)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
}


# -- splits


def _unique(examples: Iterable[Example]) -> list[Example]:
    """The first example of each text, so that no text can be on both sides of a split."""
    return list({example.texts: example for example in reversed(list(examples))}.values())[::-1]


def _cut(examples: Sequence[Example], *sizes: int) -> list[list[Example]]:
    """Random pieces of the given sizes, then what is left."""
    order = stream(SPLIT_SEED, "split").permutation(len(examples))
    pieces = np.split(order, np.cumsum(sizes))
    return [[examples[i] for i in piece] for piece in pieces]


def _carve(train: list[Example], dev: list[Example]) -> tuple[list[Example], list[Example]]:
    """Training rows without and with a tenth (at most 1000) that becomes validation.

    Rows whose text comes again, in `train` or in `dev`, are never taken: validation would share it.
    """
    times = Counter(example.texts for example in (*train, *dev))
    alone = [i for i, example in enumerate(train) if times[example.texts] == 1]
    size = min(1000, max(1, len(train) // 10))
    if len(train) < 2 or len(alone) < size:
        raise ValueError(
            f"Validation needs {size} training rows whose text comes only once, beside others to "
            f"train on; of {len(train)} training rows there are {len(alone)}. Remove duplicates, "
            "or give more rows."
        )
    taken = set(stream(SPLIT_SEED, "split").permutation(alone)[:size].tolist())
    return (
        [example for i, example in enumerate(train) if i not in taken],
        [train[i] for i in sorted(taken)],
    )


def _rows(examples: Sequence[Example], label_names: tuple[str, ...] | None) -> Rows:
    """Stack examples; labels are looked up in `label_names` unless they are numbers already."""
    names = {name: i for i, name in enumerate(label_names or ())}
    labels = [names[x.label] if isinstance(x.label, str) else x.label for x in examples]
    dtype = np.int64 if label_names else np.float32
    keys = tuple(example.key for example in examples if example.key is not None)
    return Rows(tuple(x.texts for x in examples), np.array(labels, dtype), keys or None)


def _task(
    name: str, splits: Sequence[Sequence[Example]], label_names: tuple[str, ...], metric: str
) -> Task:
    """A task of the train, validation and test examples."""
    train, validation, test = (_rows(examples, label_names) for examples in splits)
    return Task(name, train, validation, test, label_names, metric)


# -- the tasks

_DOMAINS = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}


def _trec(_config: Config) -> Task:
    examples = _unique(trec_questions())
    test, validation, train = _cut(examples, 500, 500)
    names = tuple(sorted({str(example.label) for example in examples}))
    return _task("trec", (train, validation, test), names, "accuracy")


def _signs(name: str, domains: dict[str, str], *, keyed: bool) -> Task:
    """Is the human score above zero? Rows that people scored exactly 0 are left out."""
    signed = [
        Example(x.texts, int(float(x.label) > 0), x.key if keyed else None)
        for x in snippets(domains)
        if x.label != 0
    ]
    test, validation, train = _cut(_unique(signed), 1000, 500)
    return _task(name, (train, validation, test), ("negative", "positive"), "accuracy")


def _movies(_config: Config) -> Task:
    return _signs("movies", {"movies": _DOMAINS["movies"]}, keyed=False)


def _sentiment(_config: Config) -> Task:
    return _signs("sentiment", _DOMAINS, keyed=True)


def _glue(name: str, config: Config) -> Task:
    train, dev = glue(name, config.glue_dir)
    splits = (*_carve(train, dev), dev)
    return _task(name, splits, GLUE[name].label_names, GLUE[name].metric)


def _file(config: Config, labels: Sequence[str] | None = None) -> Task:
    train, dev = _own_rows(config, "train_file"), _own_rows(config, "dev_file")
    label_names = tuple(labels) if labels else _label_names([example.label for example in train])
    if labels:
        _check_labels(train, label_names, "train_file")
        _check_labels(dev, label_names, "dev_file")
    train, dev = (_relabel(examples, label_names) for examples in (train, dev))
    metric = "accuracy" if label_names else "pearson"
    return _task("file", (*_carve(train, dev), dev), label_names, metric)


def _own_rows(config: Config, setting: str) -> list[Example]:
    file = getattr(config, setting)
    if file is None:
        raise ValueError(
            "--task file needs --train-file and --dev-file, the rows on which the result is "
            f"reported; --{setting.replace('_', '-')} is missing."
        )
    columns = [column.strip() for column in config.text_columns.split(",")]
    if len(columns) > 2:
        raise ValueError(f"text_columns names {len(columns)} columns; give one, or two for pairs.")
    return read_file(file, columns, config.label_column, config.key_column)


def _label_names(labels: Sequence[Label]) -> tuple[str, ...]:
    """The classes in order, numbers by size; none if some label is a fraction: regression."""
    if any(isinstance(label, float) and not label.is_integer() for label in labels):
        return ()
    names = {_name(label) for label in labels}
    if len(names) == 1:
        raise ValueError(
            f"Every row of train_file has the label {names.pop()!r}: give two or more."
        )
    try:
        return tuple(sorted(names, key=int))
    except ValueError:
        return tuple(sorted(names))


def _name(label: Label) -> str:
    # A column with 0.0 and 1.0 in one file is a column with 0 and 1 in another.
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _check_labels(examples: list[Example], labels: tuple[str, ...], setting: str) -> None:
    """Not every peer has every class, and none has others than the federation names."""
    unknown = sorted({_name(example.label) for example in examples} - set(labels))
    if unknown:
        raise ValueError(
            f"{setting} has the labels {', '.join(unknown)}; federation.toml names "
            f"{', '.join(labels)}."
        )


def _relabel(examples: list[Example], label_names: tuple[str, ...]) -> list[Example]:
    """Labels as names of `label_names`, or as floats for regression."""
    if not label_names:
        return [example._replace(label=_number(example.label)) for example in examples]
    named = [example._replace(label=_name(example.label)) for example in examples]
    unknown = sorted({str(example.label) for example in named} - set(label_names))
    if unknown:
        raise ValueError(
            f"dev_file has labels that train_file has not: {', '.join(unknown)}. The training "
            f"labels are {', '.join(label_names)}."
        )
    return named


def _number(label: Label) -> float:
    try:
        return float(label)
    except ValueError:
        raise ValueError(
            f"The label {label!r} is not a number, and other labels of train_file are fractions, "
            "which makes this a regression. Use numbers throughout, or class names throughout."
        ) from None


@dataclass(frozen=True)
class TaskRow:
    """A line of `TASKS`: how to load the task, and what it is in one line."""

    load: Callable[[Config], Task]
    summary: str


TASKS: dict[str, TaskRow] = {
    "demo": TaskRow(_trec, "The same as trec"),
    "trec": TaskRow(_trec, "TREC questions, six classes, from an installed package"),
    "movies": TaskRow(_movies, "Film review snippets, SST-2-like, from an installed package"),
    "sentiment": TaskRow(_sentiment, "Films, products, news and tweets: four natural clients"),
    **{name: TaskRow(partial(_glue, name), row.summary) for name, row in GLUE.items()},
    "file": TaskRow(_file, "Your own rows: --train-file, --dev-file, CSV, TSV, JSONL or Parquet"),
}


def load_task(config: Config, labels: Sequence[str] | None = None) -> Task:
    """The task that `config.task` names.

    Args:
        config: Its `task`, and for some tasks `glue_dir`, `train_file`, `dev_file`,
            `text_columns`, `label_column` and `key_column`.
        labels: Of one's own rows: the classes in their order, whichever of them the rows have.

    Raises:
        ValueError: An unknown task, or data that is not there or makes no sense.

    Example:
        >>> load_task(Config(task="movies")).label_names
        ('negative', 'positive')
    """
    row = lookup(TASKS, config.task, "task")
    return row.load(config) if labels is None else _file(config, labels)
