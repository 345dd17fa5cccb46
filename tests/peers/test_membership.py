"""Members that come and go while a federation runs, held to a simulation with the same lists."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
import torch
from test_chat_peers import SHAPES, jsonl, local

from conftest import save_language_model
from membership_twin import simulated
from plait.config import Config
from plait.peers import process as peers
from plait.peers.certificates import init_federation, make_certificate, write_secret
from plait.peers.federation import Limits, Member, load_federation, load_peer
from plait.peers.membership import keep_list, load_members
from plait.peers.pem import Pair
from plait.peers.process import Process
from plait.peers.roster import after, first, sign

ROUNDS, CHANGE = 10, 6
CONFIG = Config(
    task="chat", topology="complete", method="adf", rounds=ROUNDS, switch_every=2, local_steps=1,
    batch_size=2, rank=2, lr=1e-2, max_length=300, eval_every=100,
)  # fmt: skip
LIMITS = Limits(round_timeout_s=30, start_timeout_s=60, linger_s=10)


def rows_of(folder, number):
    jsonl(folder / "chats.jsonl", [SHAPES["ada"](f"Is it {i}?", f"yes {number}") for i in range(9)])
    local(folder, 'train_file = "chats.jsonl"')


@pytest.fixture
def machines(tmp_path):
    """Name -> federation.toml on a machine of its own: ada, ben, cai, and dan, who is no member."""
    model = save_language_model(tmp_path / "model")
    config = Config.from_json(CONFIG.to_json() | {"backbone": str(model)})
    file = init_federation(tmp_path / "fed", ("ada", "ben", "cai"), config, limits=LIMITS)
    folder = file.parent
    authority = Pair((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes())
    text = (folder / "cai" / "peer.toml").read_text()
    ports = init_federation(tmp_path / "other", ("dan", "eve"), config)
    listen = load_federation(ports).member("dan").address
    (folder / "dan").mkdir()
    pair = make_certificate(authority, "dan")
    (folder / "dan" / "cert.pem").write_bytes(pair.certificate)
    write_secret(folder / "dan" / "key.pem", pair.key)
    old = load_peer(file, "cai").listen
    lines = [one for one in text.replace(old, listen).splitlines() if "metrics" not in one]
    (folder / "dan" / "peer.toml").write_text("\n".join([*lines, ""]))
    places = {}
    for number, name in enumerate(("ada", "ben", "cai", "dan")):
        rows_of(folder / name, number)
        places[name] = tmp_path / name / "federation.toml"
    for place in places.values():
        shutil.copytree(folder, place.parent)
    return places, Member(name="dan", address=listen)


def signed(places, roster, *names):
    for name in names:
        own = load_peer(places[name], name)
        roster = sign(roster, name, own.certificate.read_bytes(), own.key.read_bytes())
    return roster


def start(file, name, errors):
    own = load_peer(file, name)
    process = Process(load_members(file, own), own, threading.Event())
    process.lists = file.parent

    def live():
        try:
            with process:
                assert process.run()
        except BaseException as error:
            errors.append((name, error))

    thread = threading.Thread(target=live)
    thread.start()
    return process, thread


def test_one_joins_and_one_leaves_and_all_have_the_factors_of_a_simulation(machines, monkeypatch):
    monkeypatch.setattr(peers, "configure_process", lambda: None, raising=False)
    places, dan = machines
    base = load_federation(places["ada"])
    roster = signed(places, after(first(base), CHANGE, [dan], ["cai"]), "ada", "ben")
    errors, running = [], {}
    slow = threading.Event()
    for name in ("ada", "ben", "cai"):
        running[name] = start(places[name], name, errors)
    keep_list(roster, places["ada"].parent)  # at one of them alone
    keep_list(roster, places["dan"].parent)
    slow.set()
    running["dan"] = start(places["dan"], "dan", errors)
    for _, thread in running.values():
        thread.join(120)
        assert not thread.is_alive()
    assert not errors
    processes = [process for process, _ in running.values()]
    assert [one.members.roster.version for one in processes] == [2, 2, 2, 2]
    stacks = simulated([one.job for one in processes], processes[0].members)
    for k, process in enumerate(processes):
        for slot, value in process.stack.state.items():
            assert torch.equal(value, stacks[k].state[slot]), (process.settings.name, slot)
    assert (places["ben"].parent / "ben" / "out" / "members-2.toml").is_file(), "it travelled"


def test_a_list_that_too_few_have_signed_changes_nothing(machines):
    places, dan = machines
    base = load_federation(places["ada"])
    roster = signed(places, after(first(base), CHANGE, [dan]), "ada")
    own = load_peer(places["ben"], "ben")
    keep_list(roster, places["ben"].parent)
    with pytest.raises(ValueError, match=r"members-2.toml: .* signatures of 2 members"):
        load_members(places["ben"], own)


def soon(what) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)
