"""From a row of a file to what a language model learns of it, told by the names of its columns.

What is learned is one string of JSON, so that rows are told apart, hashed and stored as texts are:
`{"text": ...}`, `{"messages": [...]}`, or `{"prompt": ..., "completion": ...}` with two strings or
two lists. The lists hold `{"role": ..., "content": ...}`. rendering.py makes tokens of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plait.data.tables import RowError, Table, value

Cells = Mapping[str, object]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Shape:
    """A kind of row.

    Attributes:
        columns: Those that it is told by.
        read: Cells -> what is learned, to be written as JSON.
        learned: What of it is learned, in words.
        more: Columns that it may have.
    """

    columns: tuple[str, ...]
    read: Callable[[Cells], dict[str, Any]]
    learned: str
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its columns, in words."""
        return " and ".join(self.columns)

    def fits(self, cells: Cells) -> bool:
        """Whether a row has its columns."""
        return all(cells.get(column) is not None for column in self.columns)


def _text(column: str, cells: Cells) -> dict[str, Any]:
    return {"text": value(cells, column)}


def _messages(cells: Cells) -> dict[str, Any]:
    return {"messages": _turns(cells, "messages", answered=True)}


def _completion(cells: Cells) -> dict[str, Any]:
    if isinstance(cells["prompt"], list) and isinstance(cells["completion"], list):
        prompt = _turns(cells, "prompt", answered=False)
        return {"prompt": prompt, "completion": _turns(cells, "completion", answered=True)}
    return {column: value(cells, column) for column in ("prompt", "completion")}


def _turns(cells: Cells, column: str, *, answered: bool) -> list[dict[str, str]]:
    """The turns of a conversation; one that is `answered` has a turn of the assistant."""
    turns = cells[column]
    if cells.get("tools") not in (None, "", "[]", []):
        raise RowError("have 'tools', which a prompt here doesn't show")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"have no list of objects with role and content as {column!r}")
    read = [_turn(turn) for turn in turns]
    if column != "completion" and (not read or read[0]["role"] == "assistant"):
        raise RowError(f"begin with the assistant in {column!r}, where something must come before")
    if answered and all(turn["role"] != "assistant" for turn in read):
        raise RowError(f"have no turn of the assistant in {column!r}")
    return read


def _turn(turn: Cells) -> dict[str, str]:
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise RowError(f"have the role {role!r}, where there are {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise RowError("have 'tool_calls', which can't be learned")
    if content == "" and role != "assistant":
        return {"role": str(role), "content": ""}
    return {"role": str(role), "content": value(turn, "content")}


def _dialogue(question: str, answer: str, cells: Cells) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": value(cells, question)}],
        "completion": [{"role": "assistant", "content": value(cells, answer)}],
    }


_PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n"
)


def _alpaca(cells: Cells) -> dict[str, Any]:
    return {"prompt": _alpaca_prompt(cells), "completion": value(cells, "output")}


def _alpaca_prompt(cells: Cells) -> str:
    """Stanford Alpaca's prompt, which FlowerTune and OpenFedLLM have, too."""
    instruction = value(cells, "instruction")
    if cells.get("input") in (None, ""):
        return f"{_PREAMBLE.format('')}{instruction}\n\n### Response:\n"
    preamble = _PREAMBLE.format(", paired with an input that provides further context")
    more = value(cells, "input")
    return f"{preamble}{instruction}\n\n### Input:\n{more}\n\n### Response:\n"


SHAPES = (
    Shape(("messages",), _messages, "what the assistant says"),
    Shape(("prompt", "completion"), _completion, "the completion"),
    Shape(("instruction", "output"), _alpaca, "the output", ("input",)),
    Shape(("text",), lambda cells: _text("text", cells), "all of it"),
)
"""The first that fits counts: a file of conversations may have them as finished text, too."""

COLUMNS = (*(column for shape in SHAPES for column in (*shape.columns, *shape.more)), "tools")
"""What a file can have; conversations with tools are refused."""


def shapes_named(columns: Sequence[str]) -> Sequence[Shape]:
    """What rows may be if `--text-columns` names these: all shapes for the default, `text`.

    Two columns of other names are what the user says and what the assistant answers.

    Raises:
        ValueError: More than two columns that are no shape's.

    Example:
        >>> shapes_named(["question", "answer"])[0].learned
        "the 'answer'"
    """
    if list(columns) == ["text"]:
        return SHAPES
    if known := [one for one in SHAPES if set(one.columns) <= set(columns) <= {*COLUMNS}]:
        return known[:1]
    match columns:
        case [text]:
            return [Shape((text,), lambda cells: _text(text, cells), "all of it")]
        case [asked, answer]:
            read = lambda cells: _dialogue(asked, answer, cells)  # noqa: E731
            return [Shape((asked, answer), read, f"the {answer!r}")]
    raise ValueError(
        f"text_columns names {len(columns)} columns; give one for texts, or two for what the user "
        "says and what the assistant answers."
    )


def asked(cells: Cells, column: str) -> dict[str, Any]:
    """What a row asks, as the prompt of a row: `messages`, `prompt`, `instruction`, or a text.

    Args:
        cells: The row.
        column: What the user says, where none of the others is there.

    Raises:
        RowError: There is nothing.
    """
    if cells.get("messages") is not None:
        return {"prompt": _turns(cells, "messages", answered=False)}
    if isinstance(cells.get("prompt"), list):
        return {"prompt": _turns(cells, "prompt", answered=False)}
    if cells.get("prompt") is not None:
        return {"prompt": value(cells, "prompt")}
    if cells.get("instruction") is not None:
        return {"prompt": _alpaca_prompt(cells)}
    return {"prompt": [{"role": "user", "content": value(cells, column)}]}


def shape_of(table: Table, shapes: Sequence[Shape]) -> Shape:
    """The shape that most rows of a file have.

    Raises:
        ValueError: No row has one.
    """
    found = (next((one for one in shapes if one.fits(row.cells)), None) for row in table.rows)
    counts = Counter(one for one in found if one is not None)
    if counts:
        return counts.most_common(1)[0][0]
    known = "; ".join(", ".join((*one.columns, *one.more)) for one in SHAPES)
    raise ValueError(
        f"{table.path} has no row that a language model can learn from. Its columns are "
        f"{', '.join(map(repr, table.columns))}; known are {known}. Or name one or two with "
        "--text-columns, such as question,answer."
    )


def learned(cells: Cells, shape: Shape, shapes: Sequence[Shape], options: str | None = None) -> str:
    """What is learned of a row, as JSON, with the options that it has by `config.options`.

    Raises:
        RowError: The row isn't of this shape, something is missing in it, or its answer is not
            among the options.
    """
    if not shape.fits(cells):
        if other := next((one for one in shapes if one.fits(cells)), None):
            raise RowError(f"have {other.name}, where others have {shape.name}")
        missing = next(column for column in shape.columns if cells.get(column) is None)
        raise RowError(f"have no {missing!r}")
    row = shape.read(cells)
    if options is not None:
        row["options"] = _options(cells, options, answer_of(row))
    return json.dumps(row, ensure_ascii=False)


def answer_of(row: Mapping[str, Any]) -> str | None:
    """The answer of what is learned, without space around it; a plain text has none.

    Example:
        >>> answer_of({"prompt": "1 + 1 =", "completion": " 2"})
        '2'
    """
    said = row.get("completion", row.get("messages"))
    if isinstance(said, list):
        return str(said[-1]["content"]).strip() if said[-1]["role"] == "assistant" else None
    return None if said is None else str(said).strip()


def names_a_column(options: str | None) -> bool:
    """Whether `config.options` is the name of a column, and not the options themselves."""
    return options is not None and "," not in options


def _options(cells: Cells, options: str, answer: str | None) -> list[str]:
    """A row's options."""
    there = cells.get(options) if names_a_column(options) else options
    found = there.split(",") if isinstance(there, str) else there
    if not isinstance(found, list) or len(found) < 2:
        raise RowError(f"have no two options or more in {options!r}")
    named = [str(one).strip() for one in found]
    if answer not in named:
        raise RowError(f"have an answer that is not among the options {', '.join(named[:10])}")
    return named
