"""The commands that list what there is: a table of the package, printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plait.config import Config
from plait.presets import PRESETS


def methods(_args: list[str]) -> None:
    """Print the methods."""
    from plait.methods import METHODS

    built = {name: build(Config(method=name)) for name, build in METHODS.items()}
    print_table(
        ("method", "conserves the mean", "summary"),
        [(name, "yes" if one.conserves == "factors" else "no", one.summary)
         for name, one in built.items()],
    )  # fmt: skip


def mixes(_args: list[str]) -> None:
    """Print the ways to mix, each with an argument where it takes one."""
    from plait.mixing import MIXES

    print_table(
        ("mix", "conserves the mean", "summary"),
        [(f"{name}:{row.example}" if row.example else name,
          "yes" if row.conserves_mean else "no", row.summary)
         for name, row in MIXES.items()],
    )  # fmt: skip


def topologies(_args: list[str]) -> None:
    """Print the topologies, and what holds for their matrices."""
    from plait.topology import TOPOLOGIES

    rows = []
    for name, row in TOPOLOGIES.items():
        holds = [mark for mark in ("static", "symmetric") if getattr(row, mark)]
        mean = [] if row.doubly_stochastic else ["moves the mean"]
        rows.append((name, ", ".join(holds + mean), row.summary))
    print_table(("topology", "W is", "summary"), rows)


def tasks(_args: list[str]) -> None:
    """Print the data sets."""
    from plait.data.tasks import TASKS

    print_table(("task", "summary"), [(name, row.summary) for name, row in TASKS.items()])


def partitions(_args: list[str]) -> None:
    """Print the ways to deal rows to clients, each with an argument where it takes one."""
    from plait.data.partition import PARTITIONS

    rows = [
        (f"{name}:{row.example}" if row.example else name, row.summary)
        for name, row in PARTITIONS.items()
    ]
    print_table(
        ("label skew", "summary"), [*rows, ("FILE", "a JSON file, a label mixture per client")]
    )


def presets(_args: list[str]) -> None:
    """Print the named experiments."""
    print_table(("preset", "summary"), [(name, row.summary) for name, row in PRESETS.items()])


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a head: the first and the last column flush left, the others centred."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(head):
        first_or_last = index in (0, len(head) - 1)
        table.add_column(name, justify="left" if first_or_last else "center", no_wrap=index == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table, highlight=False)
