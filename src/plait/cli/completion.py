"""`plait completion SHELL`: a script that completes commands, options and the names in tables.

What there is to complete is read off the options' types and the tables when the script is printed,
so completing costs no start of Python.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from plait.lookup import lookup

Values = tuple[str, ...] | None
"""What can follow an option: some names, anything where there are none, or nothing (None)."""
Options = Mapping[str, Values]


@dataclass(frozen=True)
class Words:
    """What a command line can hold.

    Attributes:
        summaries: Command -> what it does in one line.
        options: Command -> its options.
    """

    summaries: Mapping[str, str]
    options: Mapping[str, Options]


def options_of(kind: type | None) -> Options:
    """The options of a command, from the dataclass that it takes; a dataclass in it is flattened.

    Example:
        >>> from plait.config import Config
        >>> options_of(Config)["--head"]
        ('frozen', 'mixed', 'local', 'None')
    """
    if kind is None:
        return {}
    found: dict[str, Values] = {"--help": None}
    named = _named()
    bare, marked = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(bare[field.name]):
            found |= options_of(bare[field.name])
        elif _POSITIONAL not in getattr(marked[field.name], "__metadata__", ()):
            option = "--" + field.name.replace("_", "-")
            flag = bare[field.name] is bool
            found[option] = None if flag else named.get(option) or _choices(bare[field.name])
    return found


_POSITIONAL = get_args(tyro.conf.Positional[int])[1]


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a `Literal`, and None where that will do, too; nothing for other types."""
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        choices = [choice for one in get_args(hint) for choice in _choices(one)]
        return (*choices, "None") if choices else ()
    return ()


def _named() -> dict[str, tuple[str, ...]]:
    """The options whose values are the names of a table."""
    from plait.data.partition import PARTITIONS
    from plait.data.tasks import TASKS
    from plait.methods import METHODS
    from plait.presets import PRESETS
    from plait.runs.loggers import LOGGERS
    from plait.topology import TOPOLOGIES

    skews = (f"{name}:{row.example}" if row.example else name for name, row in PARTITIONS.items())
    return {
        "--label-skew": tuple(skews),
        "--log": tuple(LOGGERS),
        "--method": tuple(METHODS),
        "--methods": tuple(METHODS),
        "--preset": tuple(PRESETS),
        "--task": tuple(TASKS),
        "--topology": tuple(TOPOLOGIES),
    }


# -- scripts


def _bash(words: Words) -> str:
    return f"""_plait() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" choices=""
    # In `--head=frozen` the sign is a word of its own.
    [ "$previous" = "=" ] && previous="${{COMP_WORDS[COMP_CWORD-2]}}"
    [ "$current" = "=" ] && current=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        choices="{" ".join(words.summaries)}"
    else
        case "${{COMP_WORDS[1]}} $previous" in
{_cases(words, '            {match}) choices="{values}" ;;')}
        esac
    fi
    # Without choices bash completes file names.
    [ -z "$choices" ] || mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$current")
}}
complete -o default -F _plait plait
"""


def _zsh(words: Words) -> str:
    commands = "\n".join(f"        '{name}:{text}'" for name, text in _quoted(words))
    return f"""#compdef plait
_plait() {{
    local -a commands=(
{commands}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    local choices=""
    case "${{words[2]}} ${{words[CURRENT-1]}}" in
{_cases(words, '        {match}) choices="{values}" ;;')}
    esac
    if [[ -n $choices ]]; then compadd -- ${{=choices}}; else _files; fi
}}
compdef _plait plait
"""


def _cases(words: Words, line: str) -> str:
    """Lines of a shell's `case` over "command previous-word": values first, then options."""
    return "\n".join(
        line.format(match=match, values=" ".join(values))
        for command, options in words.options.items()
        for match, values in [
            *((f'"{command} {option}"', v) for option, v in options.items() if v is not None),
            (f'"{command} "*', tuple(options)),
        ]
    )


def _fish(words: Words) -> str:
    lines = ["complete -c plait -f"]
    for name, text in _quoted(words):
        lines.append(f"complete -c plait -n __fish_use_subcommand -a {name} -d '{text}'")
    for command, options in words.options.items():
        seen = f"complete -c plait -n '__fish_seen_subcommand_from {command}'"
        for option, values in options.items():
            takes = "" if values is None else f" -x -a '{' '.join(values)}'" if values else " -r -F"
            lines.append(f"{seen} -l {option.removeprefix('--')}{takes}")
    return "\n".join(lines) + "\n"


def _quoted(words: Words) -> list[tuple[str, str]]:
    """Commands with their summaries as text between single quotes can have them."""
    return [
        (name, text.replace("'", "").replace(":", ",")) for name, text in words.summaries.items()
    ]


SHELLS: dict[str, Callable[[Words], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def completion(args: list[str], words: Words) -> None:
    """Print the script for a shell.

    Raises:
        ValueError: No shell or another one; the message says how to use the script.
    """
    if len(args) != 1 or args[0].startswith("-"):
        raise ValueError(
            "Name the shell: `plait completion bash`, zsh or fish. For bash, add this line to "
            '~/.bashrc: eval "$(plait completion bash)"'
        )
    print(lookup(SHELLS, args[0], "shell")(words), end="")
