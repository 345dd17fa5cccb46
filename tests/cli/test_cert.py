"""`plait cert`: from a request to a peer's files, without its key leaving."""

from __future__ import annotations

import re
import stat

import pytest

from plait.cli.main import main
from plait.peers.credentials import read_credentials
from plait.peers.federation import load_peer
from plait.peers.revocation import read_revoked


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["init-federation", "fed", "--no-keys", "--peers", "ada=a.org:7600,ben=b.org:7600"]
    assert main(words) == 0
    return tmp_path / "fed"


APPROVE = ["cert", "approve", "fed/ada/request.pem", "--ca", "fed/ca.pem", "--ca-key", "fed/ca.key"]


def test_from_a_request_to_a_peers_files(folder, capsys):
    assert not list(folder.glob("*/*.pem"))
    capsys.readouterr()
    assert main(["cert", "request", "--name", "ada", "--out", "fed/ada"]) == 0
    assert stat.S_IMODE((folder / "ada" / "key.pem").stat().st_mode) == 0o600
    asked = capsys.readouterr().out.splitlines()[0]
    assert main(APPROVE) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{asked}: the request")
    read_credentials(load_peer(folder / "federation.toml", "ada"))
    assert main(["cert", "show", "fed/ada/cert.pem"]) == 0
    shown = capsys.readouterr().out
    assert re.fullmatch(r"([0-9A-F]{2}:){31}[0-9A-F]{2} ada until \d{4}-\d\d-\d\d\n", shown)
    assert said[1].startswith(shown.strip())
    (folder / "revoked.txt").write_text(shown)
    assert list(read_revoked(folder / "revoked.txt").values()) == ["ada"]


def test_nothing_is_written_over(folder, capsys):
    assert main(["cert", "request", "--name", "ada", "--out", "fed/ada"]) == 0
    key = (folder / "ada" / "key.pem").read_bytes()
    assert main(["cert", "request", "--name", "ada", "--out", "fed/ada"]) == 1
    assert main(APPROVE) == 0
    assert main(APPROVE) == 1
    assert capsys.readouterr().err.count("is there already; take another --out") == 2
    assert (folder / "ada" / "key.pem").read_bytes() == key


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["request"], "--name and --out"),
        (["approve", "x"], "--ca and --ca-key"),
        (["show"], "a file"),
        (["show", "none.pem"], "none.pem"),
        (["show", "fed/federation.toml"], "holds no PEM"),
    ],
)
def test_what_is_missing_is_said(folder, capsys, words, missing):
    assert main(["cert", *words]) == 1
    assert missing in capsys.readouterr().err
