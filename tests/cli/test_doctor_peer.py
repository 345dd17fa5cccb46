"""`plait peer --check`: what it finds in a peer's files, on its disk and of the others."""

from __future__ import annotations

import shutil
import socket
import time
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread

import pytest

from plait.cli import doctor_peer as doctor
from plait.cli.main import main
from plait.lora import Layout
from plait.peers.codec import Answer
from plait.peers.federation import load_federation, load_peer, split_address
from plait.peers.membership import Members
from plait.peers.revocation import fingerprint_of
from plait.peers.signing import make_authority, make_certificate
from plait.peers.status import _Nobody
from plait.peers.transport import GrpcTransport


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def peer(tmp_path):
    """Writes a peer's folder with a certificate that is valid for so many days from now."""
    pytest.importorskip("cryptography.x509")
    from plait.config import Config
    from plait.peers import certificates

    def write(days: float, listen: str | None = None):
        path = certificates.init_federation(tmp_path / "fed", ["p0", "p1"], Config())
        folder = path.parent / "p0"
        files = [(path.parent / name).read_bytes() for name in ("ca.pem", "ca.key")]
        pair = certificates.make_certificate(certificates.Pair(*files), "p0", days)
        (folder / "cert.pem").write_bytes(pair.certificate)
        (folder / "key.pem").write_bytes(pair.key)
        (folder / "key.pem").chmod(0o600)
        if listen:
            text = (folder / "peer.toml").read_text().splitlines()
            own = [line for line in text if not line.startswith("listen")]
            (folder / "peer.toml").write_text("\n".join([f'listen = "{listen}"', *own]))
        return folder

    return write


def marks(folder) -> list[str]:
    return [found.mark for found in doctor.check_peer(folder / "peer.toml")]


@pytest.mark.parametrize(("days", "mark"), [(365, "ok"), (3, "note"), (-1, "bad")])
def test_certificates_by_the_days_they_have(peer, days, mark):
    assert marks(peer(days))[:4] == [mark, "ok", "ok", "ok"]


def test_a_key_that_others_can_read_and_a_port_in_use(peer):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        folder = peer(365, f"127.0.0.1:{taken.getsockname()[1]}")
        (folder / "key.pem").chmod(0o644)
        assert marks(folder)[:4] == ["ok", "bad", "bad", "ok"]


@pytest.mark.parametrize(
    ("address", "right"), [("::1:7600", "[::1]:7600"), ("http://h:7600", "h:7600")]
)
def test_an_address_in_another_form_is_said_with_the_right_one(peer, address, right):
    found = list(doctor.check_peer(peer(365, address) / "peer.toml"))
    assert [one.mark for one in found] == ["bad"]
    assert right in found[0].text


def test_what_a_peer_would_refuse_the_doctor_finds(peer):
    folder = peer(365)
    (folder.parent / "ca.pem").write_text("")
    found = next(doctor.check_peer(folder / "peer.toml"))
    assert (found.mark, "ca.pem" in found.text, bool(found.fix)) == ("bad", True, True)


def test_a_federations_folder_on_the_command_line(capsys, peer, tmp_path):
    folder = peer(-1)
    assert main(["doctor", f"--federation={folder}"]) == 1
    assert "1 of these keeps" in capsys.readouterr().err
    (folder / "peer.toml").write_text("listen = 3")
    assert marks(folder) == ["bad"]
    (folder / "peer.toml").unlink()
    assert main(["doctor", f"--federation={folder}"]) == 1
    assert "has no peer.toml" in capsys.readouterr().err


def found(folder, part: str) -> doctor.Finding:
    """The one finding with these words."""
    (one,) = [one for one in doctor.check_peer(folder / "peer.toml") if part in one.text + one.fix]
    return one


class Desk(_Nobody):
    """Answers as a peer does that has these settings, and a clock that is so much ahead."""

    def __init__(self, settings=None, ahead: float = 0.0) -> None:
        self.settings, self.ahead = settings or {}, ahead

    def answer(self, question):
        if question.kind == "settings":
            return Answer(self.settings)
        return Answer({"time": time.time() + self.ahead})


@contextmanager
def there(folder, desk=None, change=lambda path: None):
    """The other peer, p1, as a server; `change` is done to a copy of its files before."""
    copy = folder.parent.with_name("theirs")
    shutil.copytree(folder.parent, copy)
    change(copy)
    file = copy / "federation.toml"
    transport = GrpcTransport(
        Members(load_federation(file)), load_peer(file, "p1"), Layout((), 1, 1.0), desk or Desk()
    )
    transport.start()
    try:
        yield
    finally:
        transport.stop(0)
        shutil.rmtree(copy)


@pytest.fixture
def as_read(monkeypatch):
    """No model is loaded: what was read of it is given."""
    given = {"weights_hash": "0123", "tokenizer_hash": "4567"}
    monkeypatch.setattr(
        "plait.peers.process.as_read", lambda federation, _: replace(federation, read=given)
    )
    return lambda folder: replace(load_federation(folder.parent / "federation.toml"), read=given)


def test_another_peer_that_is_there_and_runs_the_same(peer, as_read):
    folder = peer(365)
    assert found(folder, "p1 at").mark == "note"
    assert "not there yet" in found(folder, "p1 at").text
    with there(folder, Desk(as_read(folder).shared())):
        of_p1 = [one for one in doctor.check_peer(folder / "peer.toml") if "p1" in one.text]
    assert [one.mark for one in of_p1] == ["ok", "ok", "ok"]
    assert "weights (0123)" in of_p1[2].text


@pytest.mark.parametrize("what", ["weights_hash", "tokenizer_hash", "labels", "lr"])
def test_another_peer_with_something_else_is_named_with_both(peer, as_read, what):
    folder = peer(365)
    with there(folder, Desk(as_read(folder).shared() | {what: "other"})):
        one = found(folder, "another setting")
    assert one.mark == "bad"
    assert f"{what} is" in one.text
    assert "'other' at p1" in one.text


def test_clocks_that_differ(peer, as_read):
    folder = peer(365)
    with there(folder, Desk(as_read(folder).shared(), ahead=-300)):
        one = found(folder, "clock of p1")
    assert (one.mark, "300 s back" in one.text, "NTP" in one.fix) == ("bad", True, True)


def another_authority(files) -> None:
    root = make_authority("another")
    pair = make_certificate(root, "p1")
    (files / "ca.pem").write_bytes(root.certificate)
    (files / "p1" / "cert.pem").write_bytes(pair.certificate)
    (files / "p1" / "key.pem").write_bytes(pair.key)


def listed(files) -> None:
    pem = (files / "p0" / "cert.pem").read_bytes()
    (files / "revoked.txt").write_text(f"{fingerprint_of(pem)} p0\n")


def another_federation(files) -> None:
    path = files / "federation.toml"
    path.write_text(path.read_text().replace('"trial"', '"other"'))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_authority, "shows no good certificate: unable to get local issuer"),
        (listed, "revoked certificate"),
        (another_federation, "federation is 'trial'"),
    ],
)
def test_another_peer_that_does_not_fit(peer, change, said):
    folder = peer(365)
    with there(folder, change=change):
        one = found(folder, said)
    assert (one.mark, bool(one.fix)) == ("bad", True)


def test_a_certificate_of_its_own_that_is_revoked(peer):
    folder = peer(365)
    listed(folder.parent)
    assert found(folder, "is on the list").mark == "bad"


def test_another_peer_whose_certificate_is_revoked_here(peer):
    folder = peer(365)
    with there(folder):
        pem = (folder.parent / "p1" / "cert.pem").read_bytes()
        (folder.parent / "revoked.txt").write_text(f"{fingerprint_of(pem)} p1\n")
        assert found(folder, "p1 at").mark == "bad"
        assert "is revoked" in found(folder, "p1 at").text


def test_an_address_that_leads_nowhere_or_to_something_else(peer):
    folder = peer(365)
    shared = folder.parent / "federation.toml"
    address = load_federation(shared).member("p1").address
    with socket.create_server(split_address(address)) as server:

        def greet() -> None:
            with server.accept()[0] as connection:
                connection.sendall(b"220 mail.example.org\r\n" * 9)

        thread = Thread(target=greet)
        thread.start()
        assert found(folder, "p1 at").mark == "bad"
        thread.join()
    shared.write_text(shared.read_text().replace(address, "no-such-host.invalid:7600"))
    assert (found(folder, "p1 at").mark, "federation.toml" in found(folder, "p1 at").fix) == (
        "bad", True,
    )  # fmt: skip


def test_peer_check_says_all_of_it_and_starts_nothing(peer, capsys):
    folder = peer(365)
    command = [
        "peer",
        "--config",
        str(folder.parent / "federation.toml"),
        "--name",
        "p0",
        "--check",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("the certificate is valid", "is free", "not there yet"))
    assert not (folder / "out").exists()
    (folder / "cert.pem").write_bytes(b"")
    assert main(command) == 1
    assert "holds no PEM certificate" in capsys.readouterr().out


def test_rows_of_its_own_and_what_is_wrong_with_them(peer):
    folder = peer(365)
    assert found(folder, "its share of the task demo").mark == "ok"
    shared = folder.parent / "federation.toml"
    text = shared.read_text().replace("[run]", '[run]\ntask = "file"')
    shared.write_text(f'labels = ["no", "yes"]\n{text}')
    assert found(folder, "`train_file` and `dev_file`").mark == "bad"
    local = '[local]\ntrain_file = "t.csv"\ndev_file = "d.csv"\ntext_columns = "words"\n'
    (folder / "peer.toml").write_text((folder / "peer.toml").read_text() + local)
    for name, count in (("t", 20), ("d", 8)):
        rows = [f"{name} {k},{'yes' if k % 2 else 'no'}" for k in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["words,label", *rows]))
    assert found(folder, "18 rows to train on, 8 to judge by").mark == "ok"
    (folder / "t.csv").write_text("text,label\na,no")
    assert found(folder, "no column 'words'").mark == "bad"


def test_a_run_folder_that_cannot_be_written(peer, monkeypatch):
    folder = peer(365)
    assert found(folder, "GiB free").mark in ("ok", "note")
    monkeypatch.setattr("plait.cli.doctor_checks.os.access", lambda *_: False)
    assert found(folder, "change `out` in peer.toml").mark == "bad"
