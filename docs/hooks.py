"""What MkDocs does beside Markdown: tables out of the package, and formulas as MathML.

`<!-- table: methods -->` on a line of its own becomes the table of that name, read off the package
when the site is built; formulas become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_type_hints

from latex2mathml.converter import convert

from plait.cli import main as cli
from plait.cli.arguments import Start
from plait.config import Config, Machine
from plait.data.partition import PARTITIONS
from plait.data.tasks import METRICS, TASKS
from plait.factors import BASE, NOTE, Factor, factors_name
from plait.figures import FIGURES
from plait.markdown import markdown_table
from plait.methods import METHODS
from plait.mixing import MIXES
from plait.presets import PRESETS
from plait.runs.loggers import LOGGERS
from plait.topology import TOPOLOGIES, WEIGHTS, measure


def on_page_markdown(markdown: str, **_others: Any) -> str:
    """Put the tables in."""
    return re.sub(r"<!-- table: ([\w ]+) -->", lambda found: TABLES[found[1]](), markdown)


def on_page_content(content: str, **_others: Any) -> str:
    """Turn the formulas into MathML."""
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda found: convert(
            html.unescape(found[2]).strip(), display="inline" if found[1] == "span" else "block"
        ),
        content,
        flags=re.DOTALL,
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table and the end of its last line."""
    return markdown_table(head, rows) + "\n"


# -- settings, from the dataclasses of the command line


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a dataclass: its name and what is said of it."""

    name: str
    text: str


def settings_of(kind: type) -> Iterator[Setting]:
    """The fields that a dataclass and those it is made of have, with the strings in its source."""
    for base in reversed(kind.__bases__):
        if dataclasses.is_dataclass(base):
            yield from settings_of(base)
    yield from own_settings_of(kind)


def own_settings_of(kind: type) -> Iterator[Setting]:
    """Those without the fields of other dataclasses that it is made of."""
    source = textwrap.dedent(inspect.getsource(kind))
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for field, said in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(said, ast.Expr):
            text = " ".join(str(ast.literal_eval(said.value)).split())
            yield Setting(ast.unparse(field.target), text)


def settings() -> str:
    """All settings, a section for each class that has some, with their defaults."""
    parts = []
    for kind in (*reversed(Config.__bases__), Machine):
        hints, default = get_type_hints(kind), kind()
        rows = [
            [f"`--{one.name.replace('_', '-')}`", f"`{getattr(default, one.name)}`",
             f"`{_kind(hints[one.name])}`", one.text]
            for one in own_settings_of(kind)
        ]  # fmt: skip
        title = (inspect.getdoc(kind) or "").partition("\n")[0].rstrip(".")
        title = title.partition(":")[0]
        parts.append(f"## {title}\n\n{table(['setting', 'default', 'type', ''], rows)}")
    return "\n".join(parts)


def _kind(hint: Any) -> str:
    if inspect.isclass(hint):
        return hint.__name__
    kind = re.sub(r"typing\.(Literal|Optional)", "", str(hint)).strip("[]").replace("'", "")
    return kind.replace(" | None", " or None")


def options() -> str:
    """The options of each command, beside the settings where it takes them."""
    parts = []
    for name, row in cli.COMMANDS.items():
        found = list(settings_of(row.takes)) if row.takes else []
        if row.takes and found:
            own = table(
                ["option", ""], [[f"`{_option(row.takes, x.name)}`", x.text] for x in found]
            )
            takes_settings = issubclass(row.takes, Start)
            before = "All [settings](settings.md), and\n\n" if takes_settings else ""
            parts.append(f"## plait {name}\n\n{before}{own}")
    return "\n".join(parts)


def _option(kind: type, name: str) -> str:
    positional = "Positional" in str(get_type_hints(kind, include_extras=True)[name])
    return name.upper() if positional else "--" + name.replace("_", "-")


# -- the package's own tables


def methods() -> str:
    """The methods: what trains and what travels in the first rounds, with T = 2."""
    rows = []
    for name, build in METHODS.items():
        method = build(Config(method=name, switch_every=2))
        trains, travels = (
            " ".join(_name(schedule(t)) for t in range(5))
            for schedule in (method.train, method.share)
        )
        rows.append([f"`{name}`", method.summary, f"`{trains} ...`", f"`{travels} ...`"])
    return table(["method", "", "trains, T = 2", "travels"], rows)


def _name(factors: Factor) -> str:
    return factors_name(factors).replace("|", "+").replace("A+B", "AB", 1)


SIZES = {"RoBERTa-large": (48, 1024), "7B": (64, 4096)}
"""Adapted layers, query and value, and their width."""


def which_method() -> str:
    """What a message has, what holds exactly, and where a method comes from."""
    rows = []
    for name, build in METHODS.items():
        method = build(Config(method=name, switch_every=2))
        ranks = [method.base_rank if factor in BASE else 8
                 for t in range(8) for factor in method.share(t) & ~NOTE]  # fmt: skip
        rows_sent = len(method.kinds) * sum(ranks) / 8
        sizes = [4 * rows_sent * layers * width / 1e6 for layers, width in SIZES.values()]
        rows.append([f"`{name}`", *(f"{size:.1f}" for size in sizes), method.exact, method.source])
    return table(["method", *(f"MB, {name}" for name in SIZES), "exact", "source"], rows)


def topologies() -> str:
    """The topologies, with what `plait topologies --clients 10` measures, or eight."""
    rows = []
    for name, row in TOPOLOGIES.items():
        N, p = 8 if name == "hypercube" else 10, 0.5 if name == "erdos_renyi" else 0.1
        measures = [""] * 4
        if name != "file":
            one = measure(Config(topology=name, clients=N, p=p))
            settings = f"N = {N}, p = {p}" if "p" in row.uses else f"N = {N}"
            rounds = f"{one.rounds}, exact" if one.exact else str(one.rounds)
            measures = [
                f"{one.rho:.3f} ({settings})",
                f"{one.degree:.2g}",
                str(one.max_degree),
                rounds,
            ]
        rows.append([f"`{name}`", row.summary, *measures])
    return table(["topology", "", "rho", "messages", "at most", "rounds to consensus"], rows)


def _summaries(head: str, rows: dict[str, Any]) -> str:
    return table([head, ""], [[f"`{name}`", row.summary] for name, row in rows.items()])


def partitions() -> str:
    """The partitions, with an argument where they take one."""
    shown = {f"{n}:{row.example}" if row.example else n: row for n, row in PARTITIONS.items()}
    return _summaries("label skew", shown)


def mixes() -> str:
    """The mixes, with an argument where they take one."""
    rows = [
        [f"`{name}:{row.example}`" if row.example else f"`{name}`",
         "yes" if row.conserves_mean else "no", row.summary]
        for name, row in MIXES.items()
    ]  # fmt: skip
    return table(["mix", "conserves the mean", ""], rows)


def summary_figures() -> str:
    """The figures of `summary.json`, and how they are taken from the events."""
    taken = [[f"`{k}`", one.title, one.take] for k, one in FIGURES.items() if one.take]
    return table(["figure", "", "of all events"], taken)


def logged_figures() -> str:
    """The figures that loggers get, by the event that they are of."""
    rows = [
        [f"`{one.logged.format(k)}`", one.title, f"`{one.kinds[0].__name__}`"]
        for k, one in FIGURES.items() if one.logged
    ]  # fmt: skip
    return table(["logged as", "", "with each"], rows)


def commands() -> str:
    """The commands."""
    return _summaries("command", {f"plait {n}": row for n, row in cli.COMMANDS.items()})


TABLES: dict[str, Callable[[], str]] = {
    "commands": commands,
    "figures": summary_figures,
    "logged": logged_figures,
    "loggers": lambda: _summaries("logger", LOGGERS),
    "methods": methods,
    "which method": which_method,
    "options": options,
    "mixes": mixes,
    "metrics": lambda: table(
        ["metric", ""],
        [
            [f"`{name}`", (inspect.getdoc(row.score) or "").partition("\n")[0]]
            for name, row in METRICS.items()
        ],
    ),
    "partitions": partitions,
    "presets": lambda: _summaries("preset", PRESETS),
    "settings": settings,
    "tasks": lambda: _summaries("task", TASKS),
    "topologies": topologies,
    "weights": lambda: _summaries("weights", WEIGHTS),
}
