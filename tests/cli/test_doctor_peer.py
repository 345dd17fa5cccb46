"""`plait doctor --federation`: what it finds in a peer's files, on its disk and of the others."""

from __future__ import annotations

import socket

import pytest

from plait.cli import doctor_peer as doctor
from plait.cli.main import main
from plait.peers.federation import load_federation, split_address


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


def test_others_that_answer_that_do_not_and_that_are_nowhere(peer):
    folder = peer(365)
    shared = folder.parent / "federation.toml"
    address = load_federation(shared).member("p1").address
    assert found(folder, "p1 at").mark == "note"
    with socket.create_server(split_address(address)):
        assert found(folder, "p1 at").text == f"p1 at {address} answers"
    shared.write_text(shared.read_text().replace(address, "no-such-host.invalid:7600"))
    assert (found(folder, "p1 at").mark, "federation.toml" in found(folder, "p1 at").fix) == (
        "bad", True,
    )  # fmt: skip


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
