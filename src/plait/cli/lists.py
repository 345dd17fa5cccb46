"""The commands that list what there is: a table of the package, printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plait.cli.arguments import Topic, parse
from plait.config import Config, TopologySettings
from plait.lookup import lookup
from plait.presets import PRESETS

if TYPE_CHECKING:
    from plait.topology import TopologyRow

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Topologies:
    """List who can meet whom; with --clients, what it costs and how fast they agree."""

    clients: int | None = None
    """Measure the topologies with so many clients."""
    topology: Topic[TopologySettings]
    """This one alone; --p, --degree and the other settings of topologies may be given, too."""


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


def topologies(args: list[str]) -> None:
    """Print the topologies, and what holds for their matrices or what was measured."""
    start = Topologies(topology=TopologySettings(topology=ALL))
    given = parse(Topologies, "topologies", args, start)
    from plait.topology import MOST_ROUNDS, TOPOLOGIES

    name = given.topology.topology
    rows = TOPOLOGIES if name == ALL else {name: lookup(TOPOLOGIES, name, "topology")}
    if given.clients is None:
        listed = [(name, _flags(row), row.summary) for name, row in rows.items()]
        print_table(("topology", "W is", "summary"), listed)
        return
    config = Config(clients=given.clients, **vars(given.topology))
    print_table(
        ("topology", "rho", "messages", "at most", "rounds to consensus"),
        [(name, *_measured(replace(config, topology=name))) for name in rows],
    )
    print(
        "\nrho: what a round leaves of the disagreement. messages: sent by a client in a round; at "
        "most: heard.\nconsensus: less than 1/1000 is left of any disagreement, after at most "
        f"{MOST_ROUNDS} rounds."
    )


def _flags(row: TopologyRow) -> str:
    holds = [mark for mark in ("static", "symmetric") if getattr(row, mark)]
    return ", ".join(holds + ([] if row.doubly_stochastic else ["moves the mean"]))


def _measured(config: Config) -> tuple[str, str, str, str]:
    """A line of the table, or why the topology can't be had."""
    from plait.topology import measure

    try:
        one = measure(config)
    except ValueError as error:
        return "", "", "", str(error)
    rounds = f"{one.rounds or 'never'}{', exact' if one.exact else ''}"
    return f"{one.rho:.3f}", f"{one.degree:.2g}", str(one.max_degree), rounds


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
