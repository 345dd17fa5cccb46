"""`plait members`: from a proposal to a list that counts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from plait.cli.main import main
from plait.config import Config
from plait.peers.certificates import init_federation
from plait.peers.federation import load_peer
from plait.peers.membership import load_members

PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()


@pytest.fixture
def fed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(task="file", topology="complete", rounds=60)
    return init_federation(tmp_path / "fed", ("ada", "ben", "cai"), config)


def said(command: str) -> list[str]:
    """The words of a command as the page has it."""
    text = re.search(rf"^plait {command}.*?[^\\]$", PAGE, re.DOTALL | re.MULTILINE)
    return shlex.split(text[0].replace("\\\n", " "))[1:]


def test_the_pages_commands_make_a_list_that_counts(fed, capsys):
    assert main(said("members propose")) == 0
    assert main(said("members sign")) == 0
    assert (
        "Not yet: version 2 of the list needs the signatures of 2 members"
        in capsys.readouterr().out
    )
    assert main(["ben" if word == "ada" else word for word in said("members sign")]) == 0
    out = capsys.readouterr().out
    assert "signed by ada, ben" in out
    assert "It counts: fed/members-2.toml" in out
    newest = load_members(fed, load_peer(fed, "cai")).newest
    assert [(one.name, one.joins, one.leaves) for one in newest.peers] == [
        ("ada", 0, None), ("ben", 0, None), ("cai", 0, 20), ("dan", 20, None)
    ]  # fmt: skip
    assert main(["members", "show", "--config=fed/federation.toml", "--name=ada"]) == 0
    assert "dan: dan.example.org:7600, from round 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["propose", "--leave=cai"], "needs --from-round"),
        (["propose", "--from-round=3"], "--join or --leave"),
        (["propose", "--from-round=3", "--leave=,"], "--join or --leave"),
        (["propose", "--from-round=0", "--join=dan=d.org:1"], "holds from round 0"),
        (["propose", "--from-round=60", "--leave=cai"], "the run has 60"),
        (["propose", "--from-round=3", "--leave=ada,ben"], "nobody would be left to meet cai"),
        (["propose", "--from-round=3", "--leave=eve"], "There is no peer 'eve'"),
        (["propose", "--from-round=3", "--join=dan=nowhere"], "host:port"),
        (["propose", "--from-round=3", "--join=ada=a.org:1"], "ada"),
        (["sign"], "needs a file"),
        (["show", "fed/federation.toml"], "no list of members"),
    ],
)
def test_what_can_t_be_is_one_line(fed, capsys, words, why):
    assert main(["members", *words, "--config=fed/federation.toml", "--name=ada"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


@pytest.mark.parametrize(
    ("settings", "change", "why"),
    [
        ({"method": "tad", "topology": "ring"}, "--join=dan=d.org:1,eve=e.org:1,fay=f.org:1",
         "tad would train or send other factors"),
        ({"frozen_every": 0}, "--leave=cai", "frozen_every is 0"),
    ],
)  # fmt: skip
def test_what_the_others_would_not_know_is_refused(tmp_path, capsys, settings, change, why):
    config = Config(task="file", rounds=60, **{"topology": "complete"} | settings)
    init_federation(tmp_path / "fed", ("ada", "ben", "cai"), config)
    file = f"--config={tmp_path / 'fed' / 'federation.toml'}"
    assert main(["members", "propose", file, "--name=ada", "--from-round=20", change]) == 1
    assert why in capsys.readouterr().err
