"""The command `plait`: a thin layer over `plait.run`, `plait.compare` and `plait.load`.

Torch takes a second and a half to import, so commands import what computes when they run.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from plait.cli import audit as cli_audit
from plait.cli import benchmark as cli_benchmark
from plait.cli import cert as cli_cert
from plait.cli import data as cli_data
from plait.cli import doctor as cli_doctor
from plait.cli import lists as cli_lists
from plait.cli import members as cli_members
from plait.cli import peers as cli_peers
from plait.cli import report as cli_report
from plait.cli import runs as cli_runs
from plait.cli import sweep as cli_sweep
from plait.cli import trained as cli_trained
from plait.cli.arguments import (
    Flag,
    Names,
    Start,
    check_first,
    check_rules,
    default_out,
    defaults,
    fields_of,
    parse,
    parts,
    say_preparing,
    split,
    start_of,
    with_plugins,
)
from plait.config import Config
from plait.lookup import lookup
from plait.machine.extras import installed
from plait.machine.files import check_new
from plait.machine.process_settings import configure_process
from plait.presets import PRESETS, PresetRow, start_from

if TYPE_CHECKING:
    from plait.experiments.plan import Plan

Number = TypeVar("Number")

GREETING = """plait: many clients fine-tune one language model with LoRA, and no server.

Three things to try:
  plait run --preset smoke           does it work here? (seconds)
  plait compare --preset demo        ADF-LoRA against its rivals (minutes)
  plait run --help                   every setting

`plait --help` has all commands; `plait doctor` says what is missing here."""

FEW_LINES, FEW_COLUMNS = 12, 10
"""Tables up to this size are printed at the end of a run; larger ones are in the report."""


# -- what each command takes


@dataclass(frozen=True, kw_only=True)
class Run(Start):
    """Run one experiment and write its folder."""

    out: Path | None = None
    """The run folder; `runs/<task>-<method>-<seed>` if not given, with a number where it is taken.
    --resume takes the last of these."""
    resume: Flag = False
    """Go on with the run in the folder, with its own settings; only --rounds may be larger, where
    the learning rate doesn't go by them."""
    name: str = ""
    """What you call it: `plait runs` shows it."""
    tag: Names = ()
    """A word to find it by: `plait runs --filter tag=...`; several with commas."""
    log: Names = ()
    """Write to a logger too: tensorboard, wandb, mlflow or trackio; several with commas."""


@dataclass(frozen=True, kw_only=True)
class Compare(Start):
    """Compare methods on paired seeds, each at a learning rate of its own."""

    methods: str = PresetRow.methods
    """The methods, comma-separated; the first is compared with each of the others."""
    seeds: str = "0,1,2"
    """The seeds, comma-separated: one run of each method for each."""
    until: float | None = None
    """Add seeds until the interval of the first method's difference to each other one reaches no
    further than this to either side, such as 0.01; five --seeds are a good start."""
    at_most: int = 20
    """But no more seeds than these."""
    lrs: str = PresetRow.lrs
    """Learning rates by method, such as `adf=2e-3,ffa=1e-2`; --lr for the others."""
    lr_grid: str = ""
    """Search these rates for each method without one in --lrs, on the validation split with two
    seeds that aren't reported; and rates beyond, while the best is the lowest or the highest."""
    no_matched_control: Flag = False
    """Leave out the controls of methods, such as Dec-LoRA at half of ADF's learning rate."""
    out: Path | None = None
    """The folder of the comparison; `runs/<task>-compare` if not given, with a number where that is
    taken. --resume takes the last of these."""
    resume: Flag = False
    """Reuse the finished runs in the folder, and go on with the others."""
    log: Names = ()
    """Write each run to a logger too: tensorboard, wandb, mlflow or trackio."""
    jobs: int = 0
    """Runs at a time, each in a process of its own, on a graphics card all in one stack; 1 for one
    by one in this process, 0 for as many as there are cores, or sixteen on a card."""


# -- the commands


def _run(args: list[str]) -> None:
    given = parse(Run, "run", args, Run(**defaults(args)))
    config = given.settings
    out = given.out or default_out(f"{config.task}-{config.method}-{config.seed}", given.resume)
    if given.resume and not (given.preset or given.config) and (out / "config.json").is_file():
        there, _ = start_from(None, out / "config.json")
        given = parse(Run, "run", args, Run(**fields_of(there, given.machine)))
    config = given.settings
    check_rules(config)
    say_preparing(out, config)
    if not given.resume:
        check_new(out)
    check_first(config, given.machine, parts(given.log))
    from plait.cli.progress import watch
    from plait.figures import class_table, client_table, remarks
    from plait.methods import build_method
    from plait.runs.loggers import logged
    from plait.runs.run import Run as Going

    going = Going(
        config, out, resume=given.resume, machine=given.machine, name=given.name,
        tags=parts(given.tag),
    )  # fmt: skip
    print(build_method(config).summary, flush=True)
    told = logged(going, parts(given.log), config, out)
    watch(((config.method, event) for event in told), config.rounds, {config.method: 1}, Console())
    _print_summary(going.summary, out)
    _print_few(
        class_table(going.events),
        "by class, all clients together; % of its rows that were called this",
    )
    _print_few(client_table(going.events), "by client")
    for remark in remarks(going.events):
        print(remark)


def _compare(args: list[str]) -> None:
    preset = PRESETS.get(start_of(args).preset, PresetRow(Config, ""))
    start = Compare(**defaults(args), methods=preset.methods, lrs=preset.lrs)
    given = parse(Compare, "compare", args, start)
    out = given.out or default_out(f"{given.settings.task}-compare", given.resume)
    for method in split(given.methods):
        check_rules(replace(given.settings, method=method))
    say_preparing(out, given.settings)
    check_first(given.settings, given.machine, parts(given.log))
    console = Console()
    draws = installed("matplotlib")
    if not draws:
        line = "No picture will be drawn: curves.png needs matplotlib, pip install 'plait[report]'."
        console.print(line, highlight=False, markup=False)
    from plait.cli.progress import watch
    from plait.experiments.comparison import compare, conclude
    from plait.experiments.executors import num_jobs
    from plait.report.comparison_report import notes, rich_tables, write_report

    if given.lrs == preset.lrs:  # a preset has rates for all of its methods
        compared = split(given.methods)
        rates = [rate for rate in split(given.lrs) if rate.partition("=")[0] in compared]
        given = replace(given, lrs=",".join(rates))
    plan = _plan(given, start.settings, out)
    jobs = num_jobs(plan.machine.device, given.jobs, sum(plan.planned.values()))
    told = compare(plan, jobs, parts(given.log))
    said = ((cell.label, event) for cell, event in told)
    watch(said, plan.config.rounds, plan.planned, console, jobs)
    conclusion = conclude(plan)
    for table in rich_tables(conclusion):
        console.print("", table)
    console.print()
    for note in notes(conclusion):
        console.print(note, highlight=False)
    write_report(conclusion, draws)
    picture = ", curves.png" if draws else ""
    console.print(f"{plan.out}: summary.json, table.md{picture}", highlight=False)


def _completion(args: list[str]) -> None:
    from plait.cli.completion import Words, completion, options_of

    summaries = {name: row.summary for name, row in COMMANDS.items()}
    completion(args, Words(summaries, {n: options_of(row.takes) for n, row in COMMANDS.items()}))


@dataclass(frozen=True)
class CommandRow:
    """A line of `COMMANDS`: what to call with the arguments, and what it does in one line.

    `call` may return an exit code. `takes` is the dataclass of its options, for shell completion.
    """

    call: Callable[[list[str]], int | None]
    summary: str
    takes: type | None = None


COMMANDS: dict[str, CommandRow] = {
    "run": CommandRow(_run, "run one experiment and write its folder", Run),
    "data": CommandRow(
        cli_data.data, "show rows as the model sees them, and who gets which", cli_data.DataCommand
    ),
    "compare": CommandRow(
        _compare, "compare methods on paired seeds: table, curves, verdict", Compare
    ),
    "sweep": CommandRow(
        cli_sweep.sweep,
        "run a grid of experiments; it goes on where it was",
        cli_sweep.SweepCommand,
    ),
    "table": CommandRow(
        cli_sweep.table, "print a sweep's table, with what is significant", cli_sweep.TableCommand
    ),
    "benchmark": CommandRow(
        cli_benchmark.benchmark,
        "run the benchmark: what of the papers' claims holds",
        cli_benchmark.Benchmark,
    ),
    "runs": CommandRow(cli_runs.runs, "list run folders: settings, rounds, score", cli_runs.Runs),
    "predict": CommandRow(
        cli_trained.predict, "label texts with a trained model", cli_trained.Predict
    ),
    "export": CommandRow(
        cli_trained.export, "write a client's adapter as a PEFT folder", cli_trained.Export
    ),
    "merge": CommandRow(
        cli_trained.merge, "write one plain model of transformers", cli_trained.Merge
    ),
    "report": CommandRow(
        cli_report.report, "write one HTML file about runs; it opens offline", cli_report.Report
    ),
    "figures": CommandRow(
        cli_report.figures, "write figures for paper: PDF, SVG or PNG", cli_report.Figures
    ),
    "dashboard": CommandRow(
        cli_report.dashboard, "follow runs in the browser while they go", cli_report.Dashboard
    ),
    "up": CommandRow(
        cli_peers.up, "try a federation out: real peers on this machine", cli_peers.Up
    ),
    "init-federation": CommandRow(
        cli_peers.init_federation, "write the files of a new federation", cli_peers.InitFederation
    ),
    "cert": CommandRow(
        cli_cert.cert, "ask for, approve or show a peer's certificate", cli_cert.Cert
    ),
    "peer": CommandRow(
        cli_peers.peer, "take part in a federation, as one of its peers", cli_peers.PeerCommand
    ),
    "members": CommandRow(
        cli_members.members,
        "let peers join or leave while a federation runs",
        cli_members.MembersCommand,
    ),
    "relay": CommandRow(
        cli_peers.relay, "pass on what peers say that can't be called", cli_peers.RelayCommand
    ),
    "status": CommandRow(cli_peers.status, "show who is alive in a federation", cli_peers.Status),
    "audit": CommandRow(
        cli_audit.audit, "check peers' audit books, alone and against each other", cli_audit.Audit
    ),
    "methods": CommandRow(cli_lists.methods, "list the methods"),
    "mixes": CommandRow(cli_lists.mixes, "list what a client can make of what it hears"),
    "topologies": CommandRow(
        cli_lists.topologies,
        "list who can meet whom; measure how fast they agree",
        cli_lists.Topologies,
    ),
    "tasks": CommandRow(cli_lists.tasks, "list the data sets"),
    "partitions": CommandRow(cli_lists.partitions, "list the ways to deal rows to clients"),
    "presets": CommandRow(cli_lists.presets, "list the named experiments"),
    "doctor": CommandRow(cli_doctor.doctor, "check what this machine has", cli_doctor.Doctor),
    "completion": CommandRow(_completion, "print a shell's completion: bash, zsh or fish"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for an error, 2 for usage, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    status = 0
    configure_process()
    # peft 0.21 asks transformers 5 for a property that transformers is about to rename.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    try:
        if not args:
            _greet()
        elif args[0] in ("-h", "--help"):
            _help()
        elif args[0] == "--version":
            print(f"plait {version('plait')}")
        elif args[0] not in COMMANDS:
            return _usage(args[0])
        else:
            status = COMMANDS[args[0]].call(with_plugins(args[1:])) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # `plait tasks | head`: nobody listens any more, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _complain(f"{error.strerror or error}{where}", 1)
    except ValueError as error:
        return _complain(str(error), 1)
    except SystemExit as finished:  # tyro has shown the help, or what is wrong with the options
        return int(finished.code or 0)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command goes on, with --resume if it has one.", 130)
    return status


def _usage(name: str) -> int:
    try:
        lookup(COMMANDS, name, "command")
    except ValueError as error:
        return _complain(f"{error} `plait --help` has all.", 2)
    raise AssertionError(name)


def _complain(message: str, code: int) -> int:
    print("plait: " + " ".join(message.split()), file=sys.stderr)
    return code


# -- from what was typed to what is called


def _plan(given: Compare, start: Config, out: Path) -> Plan:
    from plait.experiments.plan import Plan

    config = given.settings
    for field, plural in (("method", "methods"), ("seed", "seeds")):
        if getattr(config, field) != getattr(start, field):
            raise ValueError(f"--{field} is for `plait run`; `plait compare` takes --{plural}.")
    return Plan(
        config=config,
        machine=given.machine,
        methods=tuple(split(given.methods)),
        seeds=tuple(_numbers("--seeds", given.seeds, int)),
        until=given.until,
        at_most=given.at_most,
        lrs=_rates(given.lrs),
        lr_grid=tuple(_numbers("--lr-grid", given.lr_grid, float)),
        matched_control=not given.no_matched_control,
        out=out,
        resume=given.resume,
    )


def _numbers(flag: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in split(text))
    except ValueError as error:
        raise ValueError(f"{flag} is {text!r}; give numbers, separated by commas.") from error


def _rates(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in split(text)]
    try:
        return {name.strip(): float(rate) for name, _, rate in pairs}
    except ValueError as error:
        raise ValueError(f"--lrs is {text!r}; write it like adf=2e-3,ffa=1e-2.") from error


# -- what is printed


def _help() -> None:
    print("usage: plait COMMAND [OPTIONS]\n\nDecentralized federated fine-tuning with LoRA.\n")
    cli_lists.print_table(("command", ""), [(name, row.summary) for name, row in COMMANDS.items()])
    print("\n`plait COMMAND --help` has the options; `plait --version` the version.")


def _greet() -> None:
    print(GREETING)


def _print_few(table: list[list[str]], title: str) -> None:
    if table and len(table) <= FEW_LINES + 1 and len(table[0]) <= FEW_COLUMNS:
        print(f"\n{title}")
        cli_lists.print_table(table[0], table[1:])


def _beside(summary: dict[str, Any]) -> str:
    """What a score is to be seen beside: the commonest class, or what a base says of the texts."""
    if "perplexity_base" not in summary:
        return f" majority class {summary['majority']:.3f}"
    before, after = summary["perplexity_base"], summary["perplexity_client_mean"]
    return f" perplexity {after:.4g} (base {before:.4g})"


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    print(
        f"\n{summary['metric']} {summary['accuracy_client_mean']:.3f}"
        f" (worst client {summary['accuracy_client_min']:.3f}),"
        f" averaged model {summary['accuracy_averaged_model']:.3f},"
        f"{_beside(summary)};"
        f" {summary['sent_bytes'] / 1e6:.1f} MB sent, {summary['wall_seconds']:.0f} s\n"
        f"{out}: summary.json, events.jsonl, adapters/"
    )
    if "best_round" in summary:
        print(
            f"best after round {summary['best_round'] + 1} of {summary['rounds_done']}: "
            f"{summary['best_accuracy_client_mean']:.3f}; {out / 'best'}"
        )
    if "dp_epsilon" in summary:
        print(
            f"epsilon {summary['dp_epsilon']:.3g} at delta {summary['dp_delta']:g} for each client,"
            " were the noise secret; a simulation's comes from the seed"
        )
