"""Shell completion: it knows every option, and real shells complete with it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from plait.cli.completion import SHELLS, options_of
from plait.cli.main import COMMANDS, main
from plait.methods import METHODS


def script(capsys, shell: str) -> str:
    capsys.readouterr()
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def completed(capsys, shell: str, line: str) -> list[str]:
    """What a shell offers at the end of a command line."""
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    words = line.split(" ")
    asks = {
        "bash": f"COMP_WORDS=({' '.join(w or chr(39) * 2 for w in words)})\n"
        f"COMP_CWORD={len(words) - 1}\n_plait\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n",
        "fish": f"complete -C '{line}'\n",
    }
    said = subprocess.run(
        [shell, "-c", script(capsys, shell) + asks[shell]],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not said.stderr
    return [offer.split("\t")[0] for offer in said.stdout.splitlines() if offer]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_help_is_known(capsys, command):
    assert main([command, "--help"]) in (0, 1)
    said = capsys.readouterr().out
    shown = set(re.findall(r"^\W*(?:-h, )?(--[a-z][a-z-]*)", said, re.MULTILINE))
    assert bool(shown) == bool(COMMANDS[command].takes)
    assert shown <= set(options_of(COMMANDS[command].takes)), "give its row `takes`"


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_shell_completes(capsys, shell):
    assert set(completed(capsys, shell, "plait ")) == set(COMMANDS)
    assert set(completed(capsys, shell, "plait comp")) == {"compare", "completion"}
    assert set(completed(capsys, shell, "plait run --method ")) == set(METHODS)
    assert completed(capsys, shell, "plait run --head fro") == ["frozen"]
    assert completed(capsys, shell, "plait run --rou") == ["--rounds"]
    assert completed(capsys, shell, "plait run --resume --seed") == ["--seed"]


def test_bash_takes_an_equals_sign_for_a_word(capsys):
    assert completed(capsys, "bash", "plait run --head = lo") == ["local"]


def test_zsh_reads_its_script(capsys):
    if shutil.which("zsh") is None:
        pytest.skip("there is no zsh here")
    code = "autoload -Uz compinit && compinit -u -D\n" + script(capsys, "zsh")
    code += "print $_comps[plait]"
    said = subprocess.run(["zsh", "-fc", code], capture_output=True, text=True, check=True)
    assert (said.stdout.strip(), said.stderr) == ("_plait", "")


@pytest.mark.parametrize("args", [[], ["--help"], ["bash", "zsh"]])
def test_without_a_shell_it_says_how(capsys, args):
    assert main(["completion", *args]) == 1
    assert "~/.bashrc" in capsys.readouterr().err


def test_an_unknown_shell(capsys):
    assert main(["completion", "bsh"]) == 1
    assert "Did you mean bash" in capsys.readouterr().err


def test_every_script_names_every_command(capsys):
    for shell in SHELLS:
        said = script(capsys, shell)
        assert all(re.search(rf"\b{name}\b", said) for name in COMMANDS)
