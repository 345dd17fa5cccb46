"""The commands that use what a run has trained: `plait predict`, `export` and `merge`."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from plait.cli.arguments import Flag, Names, check_file, parse
from plait.data.sources import read_prompts, read_texts

if TYPE_CHECKING:
    from plait.runs.trained import Client, Prediction, Trained


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Say what a trained model makes of texts: labels and probabilities, scores, or an answer."""

    path: tyro.conf.Positional[Path]
    """A run folder, or a folder that `plait export` wrote."""
    text: Names = ()
    """A text; again for another one."""
    file: Path | None = None
    """A file of texts: CSV, TSV, JSONL or Parquet, with the text columns of the training."""
    encoding: str | None = None
    """What --file is written in, such as `cp1252`; UTF-8 when not given."""
    delimiter: str | None = None
    """The character between its fields, or `tab`; found by the header when not given."""
    skip_bad_rows: Flag = False
    """Leave out rows that can't be read, and say which, instead of refusing."""
    client: str = "mean"
    """The client's number, or `mean` for the averaged model; of a run."""
    max_new_tokens: int = 128
    """A language model's answer ends after so many tokens, if not before."""
    out: Path | None = None
    """The CSV file to write; the same is printed if not given."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a client's adapter, or the averaged one, as a PEFT folder that is complete."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    client: str = "mean"
    """The client's number, or `mean` for the averaged model."""
    out: Path
    """The PEFT folder to write."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Write one plain model of transformers, the adapter in it."""

    path: tyro.conf.Positional[Path]
    """A run folder, or a folder that `plait export` wrote."""
    client: str = "mean"
    """The client's number, or `mean` for the averaged model; of a run."""
    out: Path
    """The folder to write."""


def predict(args: list[str]) -> None:
    """`plait predict`."""
    given = parse(Predict, "predict", args)
    client = _client(given.client)
    if bool(given.text) == (given.file is not None):
        raise ValueError("Give texts: --text 'Who was it?', or --file rows.csv.")
    if given.file is not None and not given.file.is_file():
        raise ValueError(f"There is no file {given.file}.")
    if given.out is not None:
        check_file(given.out, *filter(None, [given.file]))
    from plait.runs.trained import find

    found = find(given.path, client)
    lines = (_answers if found.card.objective == "language" else _labels)(found, given)
    if given.out is None:
        sys.stdout.write(lines)
    else:
        from plait.machine.files import write_atomically

        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(given.out, lines)
        print(f"{given.out}: {len([*csv.reader(io.StringIO(lines))]) - 1} rows")


def _how(given: Predict) -> dict[str, Any]:
    """How the file of texts is read."""
    return {name: getattr(given, name) for name in ("encoding", "delimiter", "skip_bad_rows")}


def _answers(found: Trained, given: Predict) -> str:
    """What a language model answers, as CSV; to one text without its prompt."""
    from plait.runs.answers import answer
    from plait.runs.samples import shown

    file = given.file
    prompts = (
        read_prompts(str(file), found.card.text_columns[0], **_how(given)) if file else given.text
    )
    answers = answer(*found.load(), prompts, given.max_new_tokens)
    if len(given.text) == 1 and given.out is None:
        return f"{answers[0]}\n"
    lines = io.StringIO(newline="")
    rows = zip((x if isinstance(x, str) else shown(x) for x in prompts), answers, strict=True)
    csv.writer(lines, lineterminator="\n").writerows([("prompt", "answer"), *rows])
    return lines.getvalue()


def _labels(found: Trained, given: Predict) -> str:
    """What a classifier says, as CSV."""
    from plait.runs.trained import predict as ask

    card = found.card
    columns = card.text_columns if given.file else ("text",)
    if given.file:
        texts = read_texts(str(given.file), columns, **_how(given))
    else:
        texts = [(x,) for x in given.text]
    if len(columns) < len(card.text_columns):
        raise ValueError(
            "It was trained on pairs of texts; give a --file with the columns "
            f"{' and '.join(card.text_columns)}."
        )
    model, tokenizer = found.load()
    return _csv(columns, texts, ask(model, tokenizer, texts, card.label_names, card.max_length))


def _csv(
    columns: Sequence[str], texts: Sequence[tuple[str, ...]], answers: Sequence[Prediction]
) -> str:
    """The texts, the label of each and the probabilities of all; or a score of each."""
    lines = io.StringIO(newline="")
    write = csv.writer(lines, lineterminator="\n").writerow
    names = [f"p({name})" for name in answers[0].probabilities] if answers else []
    write([*columns, *(["label", *names] if names else ["score"])])
    for row, one in zip(texts, answers, strict=True):
        shown = [f"{value:.6f}" for value in one.probabilities.values()]
        write([*row, *([one.label, *shown] if names else [f"{one.score:.6g}"])])
    return lines.getvalue()


def export(args: list[str]) -> None:
    """`plait export`."""
    given = parse(Export, "export", args)
    client = _client(given.client)
    from plait.runs.trained import export as write

    write(given.run, None if client == "mean" else client, given.out)
    _say(f"{given.out}: an adapter for plait.load, `plait predict` and PEFT")


def merge(args: list[str]) -> None:
    """`plait merge`."""
    given = parse(Merge, "merge", args)
    client = _client(given.client)
    from plait.runs.trained import merge as write

    write(given.path, client, given.out)
    _say(f"{given.out}: a model for the Auto classes of transformers and its pipeline")


def _client(given: str) -> Client:
    if given == "mean":
        return "mean"
    if not given.isdecimal():
        raise ValueError(f"--client is {given!r}; give a client's number, or mean.")
    return int(given)


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True)
