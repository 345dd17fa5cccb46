"""Two peers that accept no connection, in networks of their own behind a router that drops them.

Five network namespaces: the router, three peers and a relay, each on a net of its own. The router
drops every attempt to connect to two of the peers, and for a while, when told to, everything.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stage import LIMITS, NAMES, Faultless, Play, tiny_files

from plait.peers.certificates import init_federation

pytestmark = pytest.mark.faults

PLACES = (*NAMES, "relay")
HIDDEN = ("ben", "cai")
SILENCE_S = float(os.environ.get("PLAIT_SILENCE_S", 20))
"""Longer than a dead connection goes unnoticed. Six minutes are for a day with more time."""


def run(words: str, **options) -> None:
    done = subprocess.run(words.split(), text=True, capture_output=True, check=False, **options)
    assert done.returncode == 0, (words, done.stderr)


@dataclasses.dataclass
class Networks:
    """The namespaces; their names have the process's number in them."""

    prefix: str = f"plait-{os.getpid()}"

    def build(self) -> None:
        run(f"ip netns add {self.prefix}-router")
        self.route("sysctl -qw net.ipv4.ip_forward=1")
        for k, name in enumerate(PLACES, 1):
            one = f"{self.prefix}-{name}"
            run(f"ip netns add {one}")
            router = f"ip -n {self.prefix}-router"
            run(f"{router} link add to-{name} type veth peer name eth0 netns {one}")
            run(f"{router} addr add 10.213.{k}.1/24 dev to-{name}")
            run(f"{router} link set to-{name} up")
            run(f"ip -n {one} addr add 10.213.{k}.2/24 dev eth0")
            for link in ("lo", "eth0"):
                run(f"ip -n {one} link set {link} up")
            run(f"ip -n {one} route add default via 10.213.{k}.1")
        self.route("nft add table ip f")
        self.route("nft add chain ip f c {type filter hook forward priority 0 ;}")
        for name in HIDDEN:
            self.route(f"nft add rule ip f c oifname to-{name} tcp flags & (syn|ack) == syn drop")

    def route(self, words: str) -> None:
        run(f"ip netns exec {self.prefix}-router {words}")

    def silence(self, seconds: float) -> None:
        """Nothing goes through the router for so long."""
        self.route("nft insert rule ip f c drop")
        time.sleep(seconds)
        self.route("nft flush chain ip f c")
        for name in HIDDEN:
            self.route(f"nft add rule ip f c oifname to-{name} tcp flags & (syn|ack) == syn drop")

    def start(self, name: str, log: Path, *words: str) -> subprocess.Popen:
        inside = ["ip", "netns", "exec", f"{self.prefix}-{name}", sys.executable, "-m", "plait"]
        with log.open("ab") as file:
            return subprocess.Popen([*inside, *words], stderr=file)

    def clear(self) -> None:
        for name in ("router", *PLACES):
            subprocess.run(["ip", "netns", "del", f"{self.prefix}-{name}"], check=False)


@pytest.fixture
def networks():
    made = Networks()
    try:
        made.build()
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"network namespaces take root, and nft: {error}")
    try:
        yield made
    finally:
        made.clear()


def play_of(folder: Path, config, relay: str | None) -> Play:
    limits = dataclasses.replace(LIMITS, round_timeout_s=SILENCE_S + 60, linger_s=SILENCE_S + 60)
    path = init_federation(
        folder / "federation", NAMES, config, addresses=["10.213.1.2:7600", "", ""],
        relay=relay, limits=limits,
    )  # fmt: skip
    return Play(folder, path)


def run_all(networks: Networks, play: Play, *others: subprocess.Popen, cut: bool = False) -> None:
    peers = {
        name: networks.start(
            name, play.log(name), "peer", "--config", str(play.config_file), "--name", name
        )
        for name in NAMES
    }
    try:
        if cut:
            play.wait_for(lambda: play.rounds_done("ada") >= 2, 240)
            networks.silence(SILENCE_S)
        codes = {name: peer.wait(SILENCE_S + 240) for name, peer in peers.items()}
    finally:
        for process in (*peers.values(), *others):
            process.kill()
            process.wait()
    assert not any(codes.values()), {name: play.said(name)[-5:] for name in NAMES}


def equal(play: Play, config, folder: Path) -> None:
    faultless = Faultless.of(config, folder)
    assert {name: faultless.far(play, name) for name in NAMES} == dict.fromkeys(NAMES, 0.0)


def test_two_peers_that_accept_no_connection(networks, tmp_path):
    config = dataclasses.replace(tiny_files(tmp_path / "tiny"), topology="star")
    play = play_of(tmp_path, config, None)
    run_all(networks, play)
    equal(play, config, tmp_path / "simulated")


def test_two_that_accept_none_meet_at_a_relay_and_the_router_is_silent(networks, tmp_path):
    config = dataclasses.replace(tiny_files(tmp_path / "tiny"), rounds=60, eval_every=60)
    play = play_of(tmp_path, config, "10.213.4.2:7700")
    relay = networks.start(
        "relay", tmp_path / "relay.log", "relay", "--config", str(play.config_file)
    )
    run_all(networks, play, relay, cut=True)
    assert all(
        ("unanswered", peer, "UNREACHABLE") in play.reasons("ben") for peer in ("ada", "cai")
    )
    equal(play, config, tmp_path / "simulated")
