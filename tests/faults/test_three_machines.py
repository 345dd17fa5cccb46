"""docs/deploy.md as a new user walks it: three machines, a bridge, and nothing else in common.

Each machine is a network namespace with its own addresses, and a folder with nothing in it but what
the page says to copy. The commands are those of the page; only the model is a tiny one.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import PeftModel
from stage import NAMES, tiny_files

import plait

pytestmark = pytest.mark.faults

PAGE = (Path(__file__).parent.parent.parent / "docs" / "deploy.md").read_text()
TINY = ("rank", "pooling", "local_steps", "batch_size", "lr", "max_length")


def said(command: str) -> list[str]:
    """The words of a command as the page has it."""
    text = re.search(rf"^{command}.*?[^\\]$", PAGE, re.DOTALL | re.MULTILINE)
    assert text, command
    return shlex.split(text[0].replace("\\\n", " "))


def run(*words: str, **options) -> str:
    if words[0] == "plait":
        words = (sys.executable, "-m", *words)
    done = subprocess.run(words, text=True, capture_output=True, **options)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


@pytest.fixture
def machines():
    """Name -> the prefix of a command that runs on that peer's machine."""
    space = {name: f"plait-{os.getpid()}-{name}" for name in NAMES}
    bridge = f"plait{os.getpid() % 10**8}"
    if subprocess.run(
        ["ip", "link", "add", bridge, "type", "bridge"], capture_output=True
    ).returncode:
        pytest.skip("network namespaces take root")
    hosts = [Path("/etc/netns") / one for one in space.values()]
    try:
        run("ip", "link", "set", bridge, "up")
        for k, (name, one) in enumerate(space.items(), 1):
            run("ip", "netns", "add", one)
            run(*f"ip link add {bridge[:8]}-{name} type veth peer name eth0 netns {one}".split())
            run("ip", "link", "set", f"{bridge[:8]}-{name}", "master", bridge, "up")
            for words in (
                f"addr add 10.213.77.{k}/24 dev eth0",
                "link set eth0 up",
                "link set lo up",
            ):
                run("ip", "-n", one, *words.split())
        for folder in hosts:  # `ip netns exec` shows it as /etc/hosts
            folder.mkdir(parents=True)
            lines = [f"10.213.77.{k} {name}.example.org" for k, name in enumerate(NAMES, 1)]
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        yield {
            name: ("ip", "netns", "exec", one, sys.executable, "-m") for name, one in space.items()
        }
    finally:
        for one in space.values():
            subprocess.run(["ip", "netns", "del", one], check=False)
        for folder in hosts:
            shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["ip", "link", "del", bridge], check=False)


def certify(tmp_path, name: str) -> None:
    """The peer makes a key and a request; where the authority is it becomes a certificate."""
    place, machine = Path("fed") / name, tmp_path / name
    named = [[word.replace("ada", name) for word in said(f"plait cert {what}")]
             for what in ("request", "approve")]  # fmt: skip
    run(*named[0], cwd=machine)
    shutil.copy(machine / place / "request.pem", tmp_path / place)
    run(*named[1], cwd=tmp_path)
    shutil.copy(tmp_path / place / "cert.pem", machine / place)
    assert not (tmp_path / place / "key.pem").exists()


def test_three_machines_from_nothing_to_an_adapter(machines, tmp_path, monkeypatch):
    tiny = tiny_files(tmp_path / "tiny")
    settings = [f"--{name.replace('_', '-')}={getattr(tiny, name)}" for name in TINY]
    init = [*said("plait init-federation"), *settings, f"--backbone={tiny.backbone}", "--rounds=4"]
    run(*init, cwd=tmp_path)
    rows = list(csv.reader(Path(tiny.train_file).read_text().splitlines()))
    for k, name in enumerate(NAMES):
        machine = tmp_path / name / "fed"
        machine.mkdir(parents=True)
        for file in ("federation.toml", "ca.pem", "revoked.txt"):
            shutil.copy(tmp_path / "fed" / file, machine)
        shutil.copytree(tmp_path / "fed" / name, machine / name)
        certify(tmp_path, name)
        local = re.search(r"^\[local\]\n.*?(?=```)", PAGE, re.DOTALL | re.MULTILINE)
        with (machine / name / "peer.toml").open("a") as file:
            file.write(local[0])
        for path, part in (("reviews.csv", rows[1 + k :: 3]), ("held-out.csv", rows[1:40])):
            with (machine / name / path).open("w", newline="") as file:
                words = {"0": "negative", "1": "positive"}
                csv.writer(file).writerows([rows[0], *([t, words[label]] for t, label in part)])

    def command(name: str, what: str) -> list[str]:
        return [*machines[name], *(name if word == "ada" else word for word in said(what))]

    peers = {}
    for name in NAMES:
        with (tmp_path / f"{name}.log").open("w") as log:
            words = command(name, "plait peer --config")
            peers[name] = subprocess.Popen(words, cwd=tmp_path / name, stderr=log)
    try:
        for _ in itertools.takewhile(lambda _: peers["ben"].poll() is None, range(600)):
            words = [*command("ben", "plait status"), "--json"]
            status = subprocess.run(words, cwd=tmp_path / "ben", capture_output=True, text=True)
            if status.returncode == 0:
                break
            time.sleep(0.1)
        assert [one["name"] for one in json.loads(status.stdout)] == list(NAMES), status
        codes = {name: peer.wait(180) for name, peer in peers.items()}
    finally:
        for peer in peers.values():
            peer.kill()
    assert not any(codes.values()), [(tmp_path / f"{name}.log").read_text() for name in NAMES]
    for k, name in enumerate(NAMES):
        monkeypatch.chdir(tmp_path / name)
        out = Path("fed") / name / "out"
        assert json.loads((out / "summary.json").read_text())["rounds_done"] == 4
        PeftModel.from_pretrained(plait.load_base(out), out / "adapters" / f"client-{k}")
