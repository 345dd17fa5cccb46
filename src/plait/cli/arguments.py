"""From what was typed to settings: what several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from plait.config import (
    Config,
    DataSettings,
    EvaluationSettings,
    FileSettings,
    Machine,
    MethodSettings,
    ModelSettings,
    PrivacySettings,
    TopologySettings,
    TrainingSettings,
    names_of,
)
from plait.data.sources import check_files, check_packages
from plait.machine.extras import need
from plait.plugins import load_plugins
from plait.presets import start_from


def _flowing(helptext: str) -> str:
    """A docstring with a line for each of its paragraphs."""
    return "\n\n".join(" ".join(part.split()) for part in helptext.split("\n\n")).rstrip()


# tyro's own keeps line breaks before indented lines, as are all but the first of a field's.
tyro._strings.remove_single_line_breaks = _flowing

Command = TypeVar("Command")
Settings = TypeVar("Settings")
Flag = tyro.conf.FlagCreatePairsOff[bool]
Names = tyro.conf.UseAppendAction[tuple[str, ...]]
Topic = Annotated[
    Settings,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.FlagCreatePairsOff,
]
"""A class of settings as a group of the help; its options have no prefix."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the settings of a command come from."""

    preset: str | None = None
    """Start from a named experiment; `plait presets` lists them. Other flags change it."""
    config: Path | None = None
    """Start from a TOML file, or from a run's config.json. Other flags change it."""
    method: Topic[MethodSettings]
    data: Topic[DataSettings]
    files: Topic[FileSettings]
    model: Topic[ModelSettings]
    training: Topic[TrainingSettings]
    privacy: Topic[PrivacySettings]
    topology: Topic[TopologySettings]
    evaluation: Topic[EvaluationSettings]
    machine: Topic[Machine]

    def __post_init__(self) -> None:
        """Refuse settings that can't be, as wrong options."""
        _ = self.settings

    @property
    def settings(self) -> Config:
        """The settings of all topics."""
        parts = [vars(getattr(self, name)) for name in TOPICS]
        return Config(**{name: value for part in parts for name, value in part.items()})


TOPICS: dict[str, type] = {
    "method": MethodSettings,
    "data": DataSettings,
    "files": FileSettings,
    "model": ModelSettings,
    "training": TrainingSettings,
    "privacy": PrivacySettings,
    "topology": TopologySettings,
    "evaluation": EvaluationSettings,
}
"""The fields of `Start` that make up a `Config`, each a group of the help."""


def defaults(args: Sequence[str]) -> dict[str, Any]:
    """The fields of `Start` that a command line starts from: its preset, then its file.

    Example:
        >>> defaults(["--preset", "paper"])["method"].rounds
        150
    """
    given = start_of(args)
    config, machine = start_from(given.preset, given.config)
    return fields_of(config, machine)


def fields_of(config: Config, machine: Machine) -> dict[str, Any]:
    """The fields of `Start` that make up these settings, whose plugins are loaded."""
    load_plugins(config.plugin)
    topics = {
        name: kind(**{one: getattr(config, one) for one in names_of(kind)})
        for name, kind in TOPICS.items()
    }
    return {**topics, "machine": machine}


def start_of(args: Sequence[str]) -> argparse.Namespace:
    """`--preset` and `--config` of a command line, before anything else is read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", type=Path)
    given, _ = parser.parse_known_args(args)
    return given


def with_plugins(args: Sequence[str]) -> list[str]:
    """A command line whose plugins are loaded, and all given by one option at its end.

    Example:
        >>> with_plugins(["--rounds", "3"])
        ['--rounds', '3']
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", action="append", default=[])
    given, others = parser.parse_known_args(args)
    plugins = ",".join(given.plugin)
    load_plugins(plugins)
    return [*others, "--plugin", plugins] if plugins else list(args)


def parse(
    kind: type[Command], name: str, args: Sequence[str], default: Command | None = None
) -> Command:
    """The options of a command from its words; tyro ends the process where they are wrong."""
    start = tyro.MISSING_NONPROP if default is None else default
    return tyro.cli(kind, prog=f"plait {name}", args=args, default=start)


def default_out(name: str, resume: bool = False) -> Path:
    """`runs/<name>`, or `runs/<name>-2` and so on where that is taken; to resume, the last of them.

    Example:
        >>> default_out("no-such-run").name
        'no-such-run'
    """
    places = [Path("runs", name)]
    while places[-1].exists():
        places.append(Path("runs", f"{name}-{len(places) + 1}"))
    return places[-2] if resume and len(places) > 1 else places[-1]


def say_preparing(out: Path, config: Config) -> None:
    """The first word on the screen: importing what computes and loading a model take a while."""
    about = f"{config.task}, {config.clients} clients, {config.backbone}"
    print(f"preparing {out}: {about} ...", flush=True)


def check_rules(config: Config) -> None:
    """Refuse a method, mix, topology or ranks that can't be; it takes no model to see that.

    Raises:
        ValueError: Which, and what to take.
    """
    from plait.methods import build_method, settled
    from plait.plugins import load_plugins

    load_plugins(config.plugin)
    build_method(config).meets(settled(config))


def check_first(config: Config, machine: Machine, log: Sequence[str] = ()) -> None:
    """Refuse columns and packages that aren't there; it takes no torch to see that.

    Raises:
        ValueError: What is missing, and how to get it.
    """
    check_files(config)
    check_packages(config)
    if log:
        from plait.runs.loggers import require

        require(log)
    if config.dp_clip is not None:
        need("dp_accounting", "dp", "Differential privacy")
    if machine.engine == "ray":
        need("ray", "ray", "--engine ray")


def check_file(out: Path, *read: Path) -> None:
    """Refuse to write over a file that is read, or that a run left.

    Raises:
        ValueError: `out` is one of these.
    """
    if out.exists() and (out.suffix in OF_RUNS or any(out.samefile(file) for file in read)):
        raise ValueError(f"{out} is there already, and it would be lost; take another --out.")


OF_RUNS = (".json", ".jsonl", ".safetensors")


def parts(given: Iterable[str]) -> list[str]:
    """The parts of an option that may be given again, each time a list with commas."""
    return [part for text in given for part in split(text)]


def split(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]
