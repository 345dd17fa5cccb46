"""Files of rows: CSV, TSV, JSON lines and Parquet, each row with the place where it stands.

Nothing is guessed from what a column holds: a number is the text that stands in the file. A row
that can't be read keeps its place, with what is wrong with it; sources.py decides what to do.
"""

from __future__ import annotations

import ast
import csv
import importlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from plait.lookup import lookup
from plait.machine.text_files import read_text

# A text may be longer than the 128 KiB that Python's csv module allows for a field.
csv.field_size_limit((1 << 31) - 1)

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)
_DELIMITERS = {"tab": "\t", "\\t": "\t"}
"""Names of delimiters that are hard to type."""
_NAMES_DELIMITER = re.compile('"?sep=([,;|\t])"?')
"""A first line that Excel takes for the delimiter."""
_STRAY = 'have a stray quotation mark (in quotes, " is written "")'


def is_number(text: str) -> bool:
    """Whether a text is a finite number as files write it.

    Example:
        >>> [is_number(text) for text in ("-1.50", "1E5", "1_000", "nan", "1e999")]
        [True, True, False, False, False]
    """
    return _NUMBER.fullmatch(text) is not None and abs(float(text)) != float("inf")


class RowError(ValueError):
    """What is wrong with a row, in the words that follow `5 of 70 rows`."""


def value(cells: Mapping[str, object], column: str, *, may_be_bool: bool = False) -> str:
    """The text or the number that a row has in a column, as text.

    Raises:
        RowError: There is none, or something else.
    """
    if problem := _problem(cells.get(column), may_be_bool=may_be_bool):
        raise RowError(problem.format(repr(column)))
    return str(cells[column])


def label_of(cells: Mapping[str, object], column: str) -> str:
    """The label of a row, as it is written.

    Raises:
        RowError: There is none, or several: a list, also one that a program wrote into a text.
    """
    text = value(cells, column, may_be_bool=True)
    if text.strip()[0] in "[({" and _holds_several(text.strip()):
        raise RowError(_SEVERAL.format("a list", repr(column)))
    return text


def _holds_several(text: str) -> bool:
    """Whether a text is a list, tuple, set or object as Python, JSON or NumPy write it."""
    if re.fullmatch(r"\[[-\d.\s]+\]", text):
        return True
    try:
        return isinstance(ast.literal_eval(text), list | tuple | set | dict)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


_SEVERAL = "have {} as {}, where one string or number is expected"


def _problem(cell: object, *, may_be_bool: bool) -> str:
    match cell:
        case None:
            return "have no {}"
        case str():
            halves = not cell.isascii() and any("\ud800" <= letter <= "\udfff" for letter in cell)
            return "have half a character as {}" if halves else "" if cell.strip() else "have no {}"
        case list() | dict() | bytes():
            kind = {list: "a list", dict: "an object", bytes: "bytes"}[type(cell)]
            return _SEVERAL.format(kind, "{}")
        case bool() if not may_be_bool:
            return "have true or false as {}, where a string is expected"
    return ""


class Row(NamedTuple):
    """A row of a file: the line or row where it begins, counted from 1, and its cells by column.

    A row that can't be read has no cells, and in `fault` what rows like it are or have.
    """

    number: int
    cells: Mapping[str, object]
    fault: str = ""


@dataclass(frozen=True)
class Table:
    """The rows of a file; `unit` is what their numbers count."""

    path: Path
    columns: Sequence[str]
    rows: Sequence[Row]
    unit: str = "line"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is looked for in a file, and how it is written where that can't be seen.

    Attributes:
        columns: The columns that must be there.
        label: The one with the label, if there is one.
        more: Columns that are read where they are there.
        encoding: Of a file without a byte order mark; UTF-8 for None.
        delimiter: Between fields; found by the header for None.
    """

    columns: Sequence[str]
    label: str
    more: Sequence[str] = ()
    encoding: str | None = None
    delimiter: str | None = None


def open_table(path: Path, wanted: Wanted) -> Table:
    """The rows of a file, by its suffix.

    In a TSV file quotes are plain characters, as in GLUE; in a CSV file they quote.

    Raises:
        ValueError: No such file, an unknown suffix, a file that cannot be parsed, or a wanted
            column that is not there or is there twice.
    """
    read = lookup(READERS, path.suffix.lower(), "file type")
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty.")
    table = read(path, wanted)
    need_columns(path, wanted.columns, table.columns)
    return table


def need_columns(path: Path, wanted: Iterable[str], columns: Sequence[str]) -> None:
    """Refuse a file in which a wanted column is missing or has a namesake.

    Raises:
        ValueError: The message has the columns that are there.
    """
    for problem, found in (
        ("no column", [column for column in wanted if column not in columns]),
        ("more than one column", [column for column in wanted if columns.count(column) > 1]),
    ):
        if found:
            raise ValueError(
                f"{path} has {problem} {', '.join(map(repr, found))}. There are: "
                f"{', '.join(map(repr, columns))}."
            )


# -- CSV and TSV


def _csv(path: Path, wanted: Wanted) -> Table:
    return _separated(path, wanted, ",;\t|")


def _tsv(path: Path, wanted: Wanted) -> Table:
    # A lone quote in a text would swallow the rows up to the next one, so quotes mean nothing.
    return _separated(path, wanted, "\t,;|", quoting=csv.QUOTE_NONE)


def _separated(path: Path, wanted: Wanted, marks: str, **quoting: Any) -> Table:
    lines = io.StringIO(_text(path, wanted), newline="").readlines()
    first = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    if first < len(lines) and (named := _NAMES_DELIMITER.fullmatch(lines[first].strip("\r\n"))):
        wanted, first = replace(wanted, delimiter=wanted.delimiter or named[1]), first + 1
    if first == len(lines):
        raise ValueError(f"{path} is empty.")
    dialect = {"delimiter": _delimiter(lines[first], wanted, marks, **quoting), **quoting}
    header, *records = _records(lines, first, **dialect)
    columns = header.fields
    need_columns(path, wanted.columns, columns)
    if any(record.num_lines > 1 for record in records):
        mark = dialect["delimiter"]
        swallows = (
            _detector(records, columns, wanted.label, mark)
            if wanted.label in columns
            else _detector_without_labels(records, lines, columns, mark)
        )
        _, *records = _records(lines, first, swallows, **dialect)
    return Table(path, columns, [_row(record, columns) for record in records])


def _delimiter(header: str, wanted: Wanted, marks: str, **quoting: Any) -> str:
    """The delimiter that was asked for, or with which the header names most wanted columns."""
    if wanted.delimiter is None:
        found = {
            mark: {*wanted.columns, *wanted.more}
            & set(next(csv.reader([header], delimiter=mark, **quoting)))
            for mark in marks
        }
        return max(marks, key=lambda mark: len(found[mark]))
    delimiter = _DELIMITERS.get(wanted.delimiter.lower(), wanted.delimiter)
    if len(delimiter) != 1 or delimiter in '"\r\n ':
        raise ValueError(f"The delimiter is {delimiter!r}; give one character, or tab.")
    return delimiter


class _Record(NamedTuple):
    """The line where a record begins, how many it takes, its fields, and what is wrong with it."""

    number: int
    num_lines: int
    fields: list[str]
    fault: str = ""


def _records(
    lines: Sequence[str],
    at: int,
    swallows: Callable[[Sequence[str]], bool] = lambda _: False,
    **dialect: Any,
) -> Iterator[_Record]:
    """The records from line `at` on, blank ones left out.

    A record that is broken, or of which `swallows` says that it is several, is left at its first
    line and the next one is read afresh, so that one stray quote costs one row.
    """
    while at < len(lines):
        start = at
        reader = csv.reader((lines[i] for i in range(start, len(lines))), strict=True, **dialect)
        try:
            for fields in reader:
                end = start + reader.line_num
                if end - at > 1 and swallows(lines[at:end]):
                    raise csv.Error
                if "".join(fields).strip():
                    yield _Record(at + 1, end - at, fields)
                at = end
        except csv.Error:
            yield _Record(at + 1, 1, [], _STRAY)
            at += 1


def _detector(
    records: Sequence[_Record], columns: Sequence[str], label: str, delimiter: str
) -> Callable[[Sequence[str]], bool]:
    """Tells rows between two stray quotes from a text of several lines.

    They all have the fields of a row, and most have a label that other rows or lines have, or a
    number where all labels are numbers.
    """
    at, width = columns.index(label), _width(columns)
    known = {x.fields[at] for x in records if x.num_lines == 1 and len(x.fields) > at}
    numbers = all(map(is_number, known))

    def swallows(lines: Sequence[str]) -> bool:
        rows = [line.rstrip("\r\n").split(delimiter) for line in lines]
        if any(len(row) < width for row in rows):
            return False
        times = Counter(row[at] for row in rows if row[at].strip())
        labels = (x for x in times if x in known or times[x] > 1 or (numbers and is_number(x)))
        return 2 * sum(times[label] for label in labels) > len(rows)

    return swallows


FEW_LINES = 3


def _detector_without_labels(
    records: Sequence[_Record], lines: Sequence[str], columns: Sequence[str], delimiter: str
) -> Callable[[Sequence[str]], bool]:
    """The same for files without labels.

    Whatever has several lines there has just the fields of a row in each, and these are many.
    """
    spans = [lines[x.number - 1 : x.number - 1 + x.num_lines] for x in records if x.num_lines > 1]

    def shaped(some: Sequence[str]) -> bool:
        return all(len(line.split(delimiter)) == len(columns) for line in some)

    suspect = len(columns) > 1 and all(map(shaped, spans))
    return lambda some: suspect and len(some) > FEW_LINES and shaped(some)


def _width(columns: Sequence[str]) -> int:
    """Fields up to the last one that has a name."""
    return max(i for i, column in enumerate(columns, start=1) if column.strip())


def _row(record: _Record, columns: Sequence[str]) -> Row:
    """A row with as many fields as columns; empty ones at the end may be too many."""
    number, _, fields, fault = record
    if [field.strip("\ufeff") for field in fields] == columns:
        fault = "are the header again, as where files were put one behind the other"
    elif not fault and (len(fields) < _width(columns) or any(fields[len(columns) :])):
        count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
        fault = f"have {count} where the header names {_width(columns)} columns"
    return Row(number, {} if fault else dict(zip(columns, fields, strict=False)), fault)


def _text(path: Path, wanted: Wanted) -> str:
    return read_text(path, wanted.encoding, "Save it as UTF-8, or pass --encoding, such as cp1252.")


# -- JSON lines


def _jsonl(path: Path, wanted: Wanted) -> Table:
    # Numbers stay as they are written; NaN is what some programs write for nothing.
    decoder = json.JSONDecoder(
        parse_float=str, parse_int=str, parse_constant=lambda name: None if name == "NaN" else name
    )
    lines = io.StringIO(_text(path, wanted), newline=None)
    rows = [_object(decoder, i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    if rows and all(row.fault for row in rows):
        raise ValueError(
            f"Could not read {path}: {len(rows)} of {len(rows)} rows, from line {rows[0].number} "
            f"on, {rows[0].fault}. Write an object on each line."
        )
    return Table(path, list(dict.fromkeys(key for row in rows for key in row.cells)), rows)


def _object(decoder: json.JSONDecoder, number: int, line: str) -> Row:
    try:
        cells = decoder.decode(line.strip())
    except json.JSONDecodeError as error:
        return Row(number, {}, f"are not JSON ({error.msg} at column {error.colno})")
    except RecursionError:
        return Row(number, {}, "are nested too deeply")
    if not isinstance(cells, dict):
        return Row(number, {}, 'are not JSON objects, such as {"text": "...", "label": "..."}')
    return Row(number, cells)


# -- Parquet


def _parquet(path: Path, wanted: Wanted) -> Table:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError("Reading Parquet needs pyarrow: pip install pyarrow.") from error
    try:
        file = parquet.ParquetFile(path)
        columns = list(file.schema_arrow.names)
        read = [name for name in columns if name in (*wanted.columns, *wanted.more)]
        data = file.read(columns=read)
    except (OSError, ValueError) as error:  # pyarrow's are one of these
        raise ValueError(f"Could not read {path}: {error}") from error
    need_columns(path, wanted.columns, columns)
    cells = [_cells(data[column]) for column in read]
    rows = [
        Row(i, dict(zip(read, row, strict=True)))
        for i, row in enumerate(zip(*cells, strict=True), start=1)
    ]
    return Table(path, columns, rows, "row")


def _cells(column: Any) -> list[object]:
    """The values of a column; fractions as the shortest text that is the same number."""
    if str(column.type) in ("halffloat", "float", "double"):
        return [None if text == "nan" else text for text in column.cast("string").to_pylist()]
    return list(column.to_pylist())


READERS: dict[str, Callable[[Path, Wanted], Table]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}
