"""A task is data: three splits of labelled texts, the label names and a metric.

Every task has a `test` split, which is reported, and a `validation` split for choosing settings,
which shares no text with the other two. Splits are drawn from a fixed seed, never from the run's:
two runs with different seeds are judged on the same rows. sources.py reads; this file decides.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np

from plait.config import Config
from plait.data.objectives import CLASSIFICATION, LANGUAGE, OBJECTIVES, REGRESSION, Objective
from plait.data.sources import (
    GLUE,
    Example,
    glue,
    own_file,
    read_chat,
    read_file,
    say,
    snippets,
    trec_questions,
)
from plait.data.tables import is_number
from plait.lookup import lookup
from plait.rng import stream

Array = np.ndarray[Any, np.dtype[Any]]

SPLIT_SEED = 0
"""Splits belong to the data, not to the run: this never changes."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled texts.

    `texts` has one string for each row, or two for pairs; in language models one, of JSON
    (conversations.py). `labels` has shape (n,): int64 classes or groups, or float32 scores. `keys`
    names each row's natural client, where the data has one.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: Array
    keys: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, eq=False)
class Task:
    """Three splits that share no rows, and how to judge scores on them.

    `label_names` names the classes, or in language models the groups, if there are any. `metric` is
    a key of `METRICS`.
    """

    name: str
    train: Rows
    validation: Rows
    test: Rows
    label_names: tuple[str, ...]
    metric: str
    objective: Objective = CLASSIFICATION

    @property
    def num_outputs(self) -> int:
        """C, the outputs of the model's head."""
        return self.objective.num_outputs(self.label_names)

    def held_out(self, split: str) -> Rows:
        """The rows that are evaluated: those of `validation` or `test`.

        Raises:
            ValueError: There are none.
        """
        rows = self.validation if split == "validation" else self.test
        if not len(rows):
            raise ValueError(f"Task {self.name} has no {split} rows: take the other --eval-split.")
        return rows


# -- metrics: (labels (n,), answers (n,)) -> number; answers are classes, or floats for regression.
# scikit-learn and SciPy take two seconds to import, so each does it when it is first called.


def accuracy(labels: Array, scores: Array) -> float:
    """Share of labels and answers, classes or tokens, both (n,), in which the two are equal."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, scores))


def f1(labels: Array, scores: Array) -> float:
    """F1 of class 1, labels and predicted classes both (n,); 0 if nothing is or was called 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, scores, zero_division=0.0))


def macro_f1(labels: Array, scores: Array) -> float:
    """Mean of each class's F1, labels and predicted classes both (n,); of classes that come up."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, scores, average="macro", zero_division=0.0))


def auroc(labels: Array, outputs: Array) -> float:
    """Mean area under the ROC curve of each class against the others; labels (n,), outputs (n, C).

    The softmax of the outputs ranks the rows. Classes without rows are left out; .5 if all rows are
    of one class.
    """
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score

    ranked = softmax(outputs.astype(np.float64), axis=1)
    there = np.unique(labels)
    if len(there) < 2:
        return 0.5
    return float(np.mean([roc_auc_score(labels == c, ranked[:, c]) for c in there]))


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


@dataclass(frozen=True)
class MetricRow:
    """A line of `METRICS`.

    Attributes:
        score: (labels (n,), answers (n,)) -> number, higher is better.
        objective: What it judges, a key of `OBJECTIVES`.
        of_outputs: It takes the outputs (n, C) in the place of answers.
        binary: It is for two classes.
        span: What it can be, from the least to the most.
    """

    score: Callable[[Array, Array], float]
    objective: str = "classification"
    of_outputs: bool = False
    binary: bool = False
    span: tuple[float, float] = (0.0, 1.0)

    def judges(self, task: Task) -> bool:
        """Whether a task's answers can be judged by it."""
        return self.objective == task.objective.name and (not self.binary or task.num_outputs == 2)


METRICS: dict[str, MetricRow] = {
    "accuracy": MetricRow(accuracy),
    "f1": MetricRow(f1, binary=True),
    "macro-f1": MetricRow(macro_f1),
    "matthews": MetricRow(matthews, span=(-1.0, 1.0)),
    "auroc": MetricRow(auroc, of_outputs=True),
    "pearson": MetricRow(pearson, objective="regression", span=(-1.0, 1.0)),
    "token-accuracy": MetricRow(accuracy, objective="language"),
    "option-accuracy": MetricRow(accuracy, objective="language"),
}


def span_of(metric: str) -> tuple[float, float]:
    """What a metric can be; a plugin's that isn't loaded here can be anything."""
    return METRICS[metric].span if metric in METRICS else (-math.inf, math.inf)


def judged_by(task: Task, metric: str | None) -> Task:
    """A task with another metric; its own for None.

    Raises:
        ValueError: There is no such metric, or it can't judge the task's answers.
    """
    if metric is None:
        return task
    if not lookup(METRICS, metric, "metric").judges(task):
        can = " or ".join(name for name, row in METRICS.items() if row.judges(task))
        kind = f"{len(task.label_names)} classes" if task.label_names else "a regression"
        raise ValueError(f"--metric {metric} can't judge {kind}: take {can}.")
    return replace(task, metric=metric)


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


def _rows(examples: Sequence[Example], label_names: tuple[str, ...], objective: Objective) -> Rows:
    """Stack examples; labels are looked up in `label_names` unless they are numbers already."""
    names = {name: i for i, name in enumerate(label_names)}
    labels = [names[x.label] if isinstance(x.label, str) else x.label for x in examples]
    keys = tuple(example.key for example in examples if example.key is not None)
    return Rows(
        tuple(x.texts for x in examples), np.array(labels, objective.target_type), keys or None
    )


def _task(
    name: str,
    splits: Sequence[Sequence[Example]],
    label_names: tuple[str, ...],
    metric: str | None = None,
    objective: Objective = CLASSIFICATION,
) -> Task:
    """A task of the train, validation and test examples."""
    train, validation, test = (_rows(examples, label_names, objective) for examples in splits)
    return Task(name, train, validation, test, label_names, metric or objective.metric, objective)


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
    return _task("trec", (train, validation, test), names)


_TREC_WORDS = {
    "ABBR": "abbreviation", "DESC": "description", "ENTY": "entity",
    "HUM": "human", "LOC": "location", "NUM": "number",
}  # fmt: skip


def _trec_chat(_config: Config) -> Task:
    """TREC's rows with the name of the class as the answer; groups are the classes."""
    words = list(_TREC_WORDS.values())
    asked = f"What does this question ask for: {', '.join(words)}? Answer with one word.\n\n"

    def example(one: Example) -> Example:
        row = {
            "prompt": [{"role": "user", "content": asked + one.texts[0]}],
            "completion": [{"role": "assistant", "content": _TREC_WORDS[str(one.label)]}],
            "options": words,
        }
        return one._replace(texts=(json.dumps(row),))

    test, validation, train = _cut(_unique(trec_questions()), 500, 500)
    # Six options are six texts to read, so these are the first fifth of TREC's held-out rows.
    splits = [[example(one) for one in some] for some in (train, validation[:100], test[:100])]
    return _task("trec-chat", splits, tuple(_TREC_WORDS), "option-accuracy", LANGUAGE)


def _signs(name: str, domains: dict[str, str], *, keyed: bool) -> Task:
    """Is the human score above zero? Rows that people scored exactly 0 are left out."""
    signed = [
        Example(x.texts, int(float(x.label) > 0), x.key if keyed else None)
        for x in snippets(domains)
        if x.label != 0
    ]
    test, validation, train = _cut(_unique(signed), 1000, 500)
    return _task(name, (train, validation, test), ("negative", "positive"))


def _snippets(_config: Config) -> Task:
    """Texts of four domains, of which all is learned; keys are the domains."""
    texts = [
        x._replace(texts=(json.dumps({"text": x.texts[0]}, ensure_ascii=False),), label=0)
        for x in snippets(_DOMAINS)
    ]
    test, validation, train = _cut(_unique(texts), 48, 48)
    return _task("snippets", (train, validation, test), (), objective=LANGUAGE)


def _movies(_config: Config) -> Task:
    return _signs("movies", {"movies": _DOMAINS["movies"]}, keyed=False)


def _sentiment(_config: Config) -> Task:
    return _signs("sentiment", _DOMAINS, keyed=True)


def _glue(name: str, config: Config) -> Task:
    train, dev = glue(name, config.glue_dir)
    splits = (*_carve(train, dev), dev)
    row = GLUE[name]
    return _task(name, splits, row.label_names, row.metric, OBJECTIVES[row.objective])


def _file(config: Config, labels: Sequence[str] | None = None) -> Task:
    train, dev = _own_rows(config, "train_file"), _own_rows(config, "dev_file")
    written = [str(example.label) for example in train]
    if labels:
        _check_labels(train, labels, "train_file")
        _check_labels(dev, labels, "dev_file")
        label_names = tuple(labels)
    else:
        label_names = () if _is_regression(written, config.objective) else _label_names(written)
    train, dev = (_relabel(examples, label_names) for examples in (train, dev))
    objective = CLASSIFICATION if label_names else REGRESSION
    return _task("file", (*_carve(train, dev), dev), label_names, objective=objective)


def _chat(config: Config) -> Task:
    """Rows that a language model learns from; their labels are groups, if a column names any."""
    train = read_chat(config, "train_file")
    groups = {x.label for x in train if isinstance(x.label, str)}
    names = _label_names([*groups]) if len(groups) > 1 else ()
    if not names:
        train = [x._replace(label=0) for x in train]
    if config.dev_file is None:
        train, test = _carve(train, [])
        say(f"without --dev-file the result is reported on {len(test)} of the training rows.")
    else:
        test = read_chat(config, "dev_file")
    metric = "option-accuracy" if config.options else None
    return _task("chat", (*_carve(train, test), test), names, metric, LANGUAGE)


def _own_rows(config: Config, setting: str) -> list[Example]:
    return read_file(**own_file(config, setting), skip_bad_rows=config.skip_bad_rows)


MOST_CLASSES = 20
"""Fractions are taken for scores when there are more different ones, or one for every two rows."""


def _is_regression(labels: Sequence[str], objective: str) -> bool:
    """Whether labels are scores: as asked, or fractions too many to be names of classes."""
    names = set(labels)
    if objective != "auto":
        return objective == "regression"
    if not all(map(is_number, names)) or all(float(name).is_integer() for name in names):
        return False
    # 007.5 is no score, and where 1.1 stands beside 1.10 neither are they.
    codes = any(_CODE.match(name) for name in names)
    twice = len({float(name) for name in names}) < len(set(map(_whole, names)))
    scores = not codes and not twice and len(names) > min(MOST_CLASSES, len(labels) // 2)
    say(
        f"the {len(labels)} labels of train_file are numbers, {len(names)} different ones, some "
        "with fractions; they are taken for "
        + (
            "scores, a regression. For classes pass --objective classification."
            if scores
            else "classes, as they are written. For scores pass --objective regression."
        )
    )
    return scores


_CODE = re.compile(r"[-+]?0\d")


NOTHING = {"nan", "none", "null", "na", "n/a", "<na>", "nil", "#n/a"}
"""What programs write where there is nothing."""


def _label_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The classes in order: numbers by size, then words."""
    names = sorted(set(labels), key=_rank)
    if len(names) == 1:
        raise ValueError(f"Every row of train_file has the label {names[0]!r}: give two or more.")
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[" ".join(_whole(unicodedata.normalize("NFKC", name)).casefold().split())].append(name)
    for same in alike.values():
        if len(same) > 1:
            say(
                f"{' and '.join(map(repr, same))} are different classes, as they are written in "
                "train_file. If they are one, write it one way."
            )
    if nothing := [name for name in names if name.casefold() in NOTHING]:
        say(f"{_listed(nothing)} of train_file is a class, as it is written. If it stands for "
            "nothing, leave its cells empty.")  # fmt: skip
    several = [name for name in names if len(parts := re.split(r"\s*[|;,+&]\s*", name)) > 1
               and {*parts} <= {*names}]  # fmt: skip
    if several:
        say(
            f"{_listed(several)} of train_file are classes of their own, beside those that they "
            "name: a row has one label, and models of several labels aren't trained here."
        )
    return tuple(names)


def _rank(name: str) -> tuple[bool, Decimal, str]:
    """The place of a class: no two names have the same."""
    return (False, Decimal(name), name) if is_number(name) else (True, Decimal(0), name)


def _whole(name: str) -> str:
    """A number without the `.0` that some programs write behind a whole one."""
    return re.sub(r"(?<=\d)\.0+$", "", name) if is_number(name) else name


def _check_labels(examples: list[Example], labels: Sequence[str], setting: str) -> None:
    """Not every peer has every class, and none has others than the federation names."""
    whole = set(map(_whole, labels))
    names = {str(example.label) for example in examples}
    unknown = sorted((name for name in names if _whole(name) not in whole), key=_rank)
    if unknown:
        raise ValueError(
            f"{setting} has the labels {', '.join(unknown)}; federation.toml names "
            f"{', '.join(labels)}."
        )


def _relabel(examples: list[Example], label_names: tuple[str, ...]) -> list[Example]:
    """Labels as names of `label_names`, or as floats for regression."""
    if not label_names:
        return [example._replace(label=_number(str(example.label))) for example in examples]
    # Classes 0.0 and 1.0 of one file may be 0 and 1 in another, unless that has a class, too.
    whole = {_whole(name): name for name in label_names}
    names = {str(example.label) for example in examples}
    known = {x: x if x in label_names else whole.get(_whole(x), "") for x in names}
    unknown = sorted((name for name in names if not known[name]), key=_rank)
    if unknown:
        numbers = all(map(is_number, (*unknown, *label_names)))
        raise ValueError(
            f"dev_file has labels that train_file has not: {_listed(unknown)}. The training "
            f"labels are {_listed(label_names)}."
            + " If they are scores, pass --objective regression."
            * numbers
        )
    return [example._replace(label=known[str(example.label)]) for example in examples]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:20])) + ", ..." * (len(names) > 20)


def _number(label: str) -> float:
    if not is_number(label.strip()):
        raise ValueError(
            f"The label {label!r} is not a number, and this is a regression. Use numbers "
            "throughout, such as 4.83, or pass --objective classification."
        )
    return float(label)


@dataclass(frozen=True)
class TaskRow:
    """A line of `TASKS`: how to load the task, and what it is in one line."""

    load: Callable[[Config], Task]
    summary: str


TASKS: dict[str, TaskRow] = {
    "demo": TaskRow(_trec, "The same as trec"),
    "trec": TaskRow(_trec, "TREC questions, six classes, from an installed package"),
    "trec-chat": TaskRow(_trec_chat, "TREC questions for a language model: the class as a word"),
    "movies": TaskRow(_movies, "Film review snippets, SST-2-like, from an installed package"),
    "sentiment": TaskRow(_sentiment, "Films, products, news and tweets: four natural clients"),
    "snippets": TaskRow(_snippets, "The same texts for a language model: four natural clients"),
    **{name: TaskRow(partial(_glue, name), row.summary) for name, row in GLUE.items()},
    "file": TaskRow(_file, "Your own rows: --train-file, --dev-file, CSV, TSV, JSONL or Parquet"),
    "chat": TaskRow(_chat, "Your own conversations or texts for a language model: --train-file"),
}


def load_task(config: Config, labels: Sequence[str] | None = None) -> Task:
    """The task that `config.task` names.

    Args:
        config: Its `task` and `metric`, and for some tasks `glue_dir`, or the settings of
            `--task file`.
        labels: Of one's own rows: the classes in their order, whichever of them the rows have.

    Raises:
        ValueError: An unknown task or metric, or data that is not there or makes no sense.

    Example:
        >>> load_task(Config(task="movies")).label_names
        ('negative', 'positive')
    """
    row = lookup(TASKS, config.task, "task")
    task = row.load(config) if labels is None else _file(config, labels)
    return judged_by(task, config.metric)


def without_rows(config: Config, labels: Sequence[str] = ()) -> Task:
    """The task of a peer whose rows only its own training loop knows: all but the rows.

    Args:
        config: Its `task`, `file` or `chat`, and `metric`.
        labels: The classes in their order.
    """
    objective = LANGUAGE if config.task == "chat" else CLASSIFICATION
    none = Rows((), np.zeros(0, objective.target_type))
    task = Task(config.task, none, none, none, tuple(labels), objective.metric, objective)
    return judged_by(task, config.metric)
