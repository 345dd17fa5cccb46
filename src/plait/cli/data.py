"""The command `plait data`: rows as the model sees them, their lengths, and who gets which."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from plait.cli.arguments import Start, defaults, parse
from plait.cli.lists import print_table
from plait.data.sources import check_files

if TYPE_CHECKING:
    from plait.data.tasks import Task
    from plait.data.tokens import Tokens

MOST_CLIENTS, MOST_LABELS = 40, 6
"""More clients aren't listed, and the labels of each are not where there are more."""

WHOLE = 1 << 20
"""Tokens of a row that is not cut."""


@dataclass(frozen=True, kw_only=True)
class DataCommand(Start):
    """Show rows as the model sees them, their lengths, and what each client gets.

    What is learned is plain on a terminal, and what is only read dim.
    """

    show: int = 3
    """Rows that are shown, each of another client."""


def data(args: list[str]) -> None:
    """`plait data`."""
    given = parse(DataCommand, "data", args, DataCommand(**defaults(args)))
    check_files(given.settings)
    from plait.data.rendering import tokens_of
    from plait.data.token_cache import stored_tokens
    from plait.engines.job import asked_shares, dealt
    from plait.methods import settled
    from plait.model.loading import load_tokenizer

    config = settled(given.settings)
    task, shares = dealt(config)
    tokenizer = load_tokenizer(config)
    uncut = dataclasses.replace(config, max_length=WHOLE)
    whole, tokens = (
        tokens_of(task.objective, task.train, tokenizer, one, stored_tokens)
        for one in (uncut, config)
    )
    shares = asked_shares(shares, tokens)
    console = Console()
    for client, share in list(enumerate(shares))[: given.show]:
        _show_row(console, task, tokens, int(share[0]), client, tokenizer)
    _print_sizes(task, whole.lengths, config.most_tokens)
    _print_clients(task, tokens, shares)


def _show_row(
    console: Console, task: Task, tokens: Tokens, row: int, client: int, tokenizer: Any
) -> None:
    console.print(Text(_title(task, row, client, int(tokens.lengths[row])), style="bold"))
    span = slice(tokens.offsets[row], tokens.offsets[row + 1])
    ids = tokens.ids[span]
    asked = np.ones(len(ids), bool) if tokens.asked is None else tokens.asked[span]
    learned = asked if tokens.asked is None else np.append(False, asked[:-1])
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1), len(ids)]
    text = Text()
    for begin, end in pairwise(edges):
        # Decoded from the beginning on: a piece alone can lose the space before it.
        before, there = (tokenizer.decode(ids[:edge].tolist()) for edge in (begin, end))
        text.append(there[len(before) :], style="" if learned[begin] else "dim")
    console.print(text, "", sep="\n", soft_wrap=True, highlight=False)


def _title(task: Task, row: int, client: int, length: int) -> str:
    label = task.train.labels[row]
    name = task.label_names[label] if task.label_names else f"{label:g}"
    labelled = task.label_names or task.objective.problem_type != "causal_lm"
    return f"client {client}, row {row}, {length} tokens" + f", label {name}" * bool(labelled)


def _print_sizes(task: Task, lengths: np.ndarray, most: int) -> None:
    print(
        f"{task.name}: {len(task.train)} training rows, {len(task.validation)} for validation, "
        f"{len(task.test)} to report on.\n"
        f"Tokens of a training row: median {np.median(lengths):.0f}, longest {lengths.max()}. "
        f"{(lengths > most).sum()} rows are cut to {most} (--max-length).\n"
    )


def _print_clients(task: Task, tokens: Tokens, shares: Sequence[np.ndarray]) -> None:
    """Rows, tokens and labels of each client, and of all together."""
    asked = None if tokens.asked is None else np.diff(tokens.asked_offsets)
    names = task.label_names if len(task.label_names) <= MOST_LABELS else ()
    head = ["client", "rows", "tokens", *(["learned"] if asked is not None else []), *names]

    def line(name: str, rows: np.ndarray) -> list[str]:
        counts = [len(rows), tokens.lengths[rows].sum()]
        counts += [] if asked is None else [asked[rows].sum()]
        counts += [(task.train.labels[rows] == i).sum() for i in range(len(names))]
        return [name, *map(str, counts)]

    lines = [line(str(client), share) for client, share in enumerate(shares[:MOST_CLIENTS])]
    print_table(head, [*lines, line("all", np.concatenate(shares))])
    if len(shares) > MOST_CLIENTS:
        print(f"{len(shares) - MOST_CLIENTS} more clients are not shown.")
    if len(task.label_names) > MOST_LABELS:
        labels = task.train.labels[np.concatenate(shares)]
        print()
        print_table(
            ("label", "rows"),
            [(name, str((labels == i).sum())) for i, name in enumerate(task.label_names)],
        )
