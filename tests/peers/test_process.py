"""The parts of a peer's process: its data, its figures, its log, its commands."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import signal
import socket
import subprocess
import threading
import urllib.request
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import fake_runs
from conftest import tiny_tokenizer
from fake_network import Hub, member, start_peer
from plait.cli import main as cli
from plait.config import Config, Machine
from plait.data.tasks import load_task
from plait.engines.job import Rules
from plait.events import Evaluated, from_line, to_line
from plait.peers import local_federation as up
from plait.peers import process as peers
from plait.peers.certificates import free_ports, init_federation
from plait.peers.federation import Federation, Limits, load_federation, load_peer
from plait.peers.json_log import Few, JsonLines
from plait.peers.membership import Members, check_members
from plait.peers.process import (
    check_sizes,
    counting_alone,
    neighbours_of,
    open_folder,
    patient,
    prepare_peer,
    take_up,
    with_descriptors,
)
from plait.peers.prometheus import serve_metrics
from plait.peers.refusals import Reason
from plait.peers.status import PeerStatus, first_end, lag
from plait.peers.status import status as ask_all
from plait.peers.transport import Counts, GrpcTransport
from plait.runs.run_folder import RunFolder

CONFIG = Config(topology="ring", clients=3, rounds=2, rank=2, local_steps=1, batch_size=2)


def one_peer():
    return start_peer(Hub(), 0, CONFIG, [member(f"p{k}") for k in range(3)])


def own_rows(tmp_path, **labels) -> Config:
    """Files with a row for each label; `Config` for a peer that has them."""
    for file, of in labels.items():
        lines = [f"text {k} of {file},{label}" for k, label in enumerate(of)]
        (tmp_path / f"{file}.csv").write_text("\n".join(["text,label", *lines]))
    files = {f"{file}_file": str(tmp_path / f"{file}.csv") for file in labels}
    return dataclasses.replace(CONFIG, task="file", **files)


def test_own_rows_get_the_federations_numbers(tmp_path):
    config = own_rows(tmp_path, train=["tool", "fruit"] * 5, dev=["pet", "fruit"])
    task = load_task(config, ["fruit", "pet", "tool"])
    assert task.label_names == ("fruit", "pet", "tool")
    assert set(task.train.labels) | set(task.validation.labels) == {0, 2}
    assert task.test.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"dev_file.*pet; federation\.toml names fruit, tool"):
        load_task(config, ["fruit", "tool"])


def test_a_peer_with_one_class_takes_part(tmp_path):
    config = own_rows(tmp_path, train=["1"] * 10, dev=["0", "2"])
    task = load_task(config, ["0", "1", "2"])
    assert set(task.train.labels) == {1}
    assert (task.num_outputs, task.test.labels.tolist()) == (3, [0, 2])


def test_own_rows_are_of_the_task_file():
    federation = SimpleNamespace(labels=("a", "b"), config=CONFIG)
    settings = SimpleNamespace(name="ada", local={"train_file": "x.csv"}, apply=lambda c: c)
    with pytest.raises(ValueError, match='put task = "file"'):
        prepare_peer(federation, settings)


def test_a_message_above_the_limit_is_known_before_the_start():
    job = one_peer().job
    check_sizes(job, Limits())
    with pytest.raises(ValueError, match=r"up to \d+ bytes, and max_message_bytes is 1000:"):
        check_sizes(job, Limits(max_message_bytes=1000))


def test_neighbours_are_those_of_some_round():
    turn = one_peer().inbox.turn
    assert neighbours_of(turn, 2) == {1, 2}
    line = {0: (1,), 1: (0, 2)}
    turns = lambda t: SimpleNamespace(hears=line[t], heard_by=())  # noqa: E731
    assert neighbours_of(turns, 2) == {0, 1, 2}


def test_a_full_table_of_descriptors_is_waited_for():
    tries = []

    def write():
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.EMFILE, "Too many open files")

    with_descriptors(write)
    assert len(tries) == 3
    with pytest.raises(OSError, match="No space"):
        with_descriptors(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))


def test_a_port_for_figures_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"{address}.*change `metrics`"):
            serve_metrics(address, one_peer().desk, SimpleNamespace(counts=Counts()))


def test_what_libraries_say_is_bounded():
    few = Few()
    record = logging.LogRecord("grpc", logging.ERROR, "x.py", 1, "again", (), None)
    assert sum(few.filter(record) for _ in range(1000)) == Few.MOST


def test_sigterm_ends_what_up_began():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), up.told_to_end():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_up_does_not_wait_for_the_others_of_one_that_failed(tmp_path):
    path = init_federation(tmp_path / "f", ["a", "b"], Config())
    ended, waiting = (subprocess.Popen(words) for words in (["false"], ["sleep", "60"]))
    ended.wait()
    try:
        assert list(up.watch({"a": ended, "b": waiting}, path)) in ([], ["round 0/20"])
        assert waiting.poll() is None
    finally:
        waiting.kill()
        waiting.wait()


def test_own_rows_need_classes_that_all_agree_on():
    federation = SimpleNamespace(labels=None, config=CONFIG)
    settings = SimpleNamespace(name="ada", local={"train_file": "x.csv"}, apply=lambda c: c)
    with pytest.raises(ValueError, match=r"put labels = "):
        prepare_peer(federation, settings)


@pytest.mark.parametrize("change", ["leaves", "symmetric"])
def test_a_directed_topology_takes_no_changes_and_no_symmetry(change):
    members = tuple(member(f"p{k}") for k in range(2))
    limits = Limits(symmetric_loss=change == "symmetric")
    if change == "leaves":
        members = (member("p0", leaves=1), member("p1"))
    config = Config(topology="one_peer_exponential", clients=2, rounds=2)
    federation = Federation(id="f", config=config, peers=members, limits=limits)
    with pytest.raises(ValueError, match="need a symmetric topology"):
        check_members(federation)
    walk = Config(method="rw-lora", topology="ring", clients=2, rounds=2)
    with pytest.raises(ValueError, match="rw-lora on ring"):
        check_members(dataclasses.replace(federation, config=walk))


@pytest.mark.parametrize(
    ("method", "keep", "wait", "linger"), [("adf-offset", 8, 5, 7), ("rw-lora", 40, 200, 207)]
)
def test_where_peers_rest_all_rounds_of_the_others_are_waited_for(method, keep, wait, linger):
    rules = Rules.of(Config(method=method, topology="ring", clients=3, rounds=40))
    limits = patient(Limits(round_timeout_s=5, linger_s=7), rules)
    found = limits.keep_rounds, limits.round_timeout_s, limits.linger_s
    assert found == (keep, wait, linger)


def test_the_frozen_weights_are_part_of_what_must_be_agreed_on(tmp_path, monkeypatch):
    file = init_federation(tmp_path / "f", ["p0", "p1", "p2"], CONFIG)
    federation, job = load_federation(file), one_peer().job
    job.backbone.tokenizer = tiny_tokenizer()
    monkeypatch.setattr(peers, "prepare_peer", lambda *_: job)
    process = peers.Process(Members(federation), load_peer(file, "p0"), threading.Event(), False)
    assert process.desk.settings["weights_hash"] == job.backbone.weights_hash
    digest = process.transport.identity.config_digest(0)
    assert digest == process.members.digest(0) != federation.digest()


READ = ("edges", "label mixtures", "plugins", "training rows", "test rows", "backbone")


@pytest.mark.parametrize("name", READ)
def test_what_all_must_read_alike_is_part_of_it(name):
    job = one_peer().job
    job.backbone.tokenizer = tiny_tokenizer()
    members = tuple(member(f"p{k}") for k in range(3))

    def digest(config: Config = CONFIG, **changed: str) -> str:
        federation = Federation(id="f", config=config, peers=members)
        read = dict.fromkeys(READ, "0") | changed
        found = peers.what_was_read(federation, job, read)
        return dataclasses.replace(federation, read=found).digest()

    before = digest()
    assert (digest(**{name: "1"}) == before) == (name == "backbone"), "which the weights tell"
    own = dataclasses.replace(CONFIG, task="file")
    assert (digest(own, **{name: "1"}) == digest(own)) == (name in READ[3:])
    elsewhere = (dataclasses.replace(CONFIG, plugin=f"/{host}/mine.py") for host in "ab")
    assert len({digest(config) for config in elsewhere}) == 1
    job.backbone.tokenizer.add_tokens(["more"])
    assert digest() != before


def test_what_stops_a_peer_names_settings_of_its_files(tmp_path, monkeypatch):
    file = init_federation(tmp_path / "f", ["p0", "p1", "p2"], CONFIG)
    (tmp_path / "f" / "p0" / "out").mkdir()
    (tmp_path / "f" / "p0" / "out" / "something").touch()
    for name in ("configure_process", "log_to_stderr", "raise_descriptor_limit"):
        monkeypatch.setattr(peers, name, lambda *_: None)
    monkeypatch.setattr(peers.signal, "signal", lambda *_: None)
    with pytest.raises(ValueError, match="is not an empty folder; take another `out`"):
        peers.run_peer(file, "p0")


def test_a_checkpoint_that_cant_be_read_is_set_aside(tmp_path):
    peer = one_peer()
    folder = RunFolder.open(tmp_path / "out", CONFIG, resume=True)
    folder.create(CONFIG)
    for event in islice(fake_runs.events(CONFIG, 0.8), 3):
        folder.record(event)
    folder.save(peer.stack, 1)
    assert take_up(folder, peer.stack)[1] == 1
    folder.checkpoint_file.write_bytes(b"\x00" * 100)
    assert take_up(folder, peer.stack) == ([], 0)
    assert folder.checkpoint_file.with_suffix(".unreadable").exists()


def test_prometheus_reads_round_lag_bytes_and_incidents():
    desk = one_peer().desk
    desk.heard_of(1, 4)
    desk.refused("p1", Reason.NOT_FINITE, "a NaN")
    counts = Counts()
    counts.sent_bytes["p1"] = 12
    address = f"127.0.0.1:{free_ports(1)[0]}"
    ends = {"certificate": 1893456000}
    transport = SimpleNamespace(counts=counts, expires=lambda: ends)
    stop = serve_metrics(address, desk, transport)
    try:
        with urllib.request.urlopen(f"http://{address}/metrics") as answer:
            text = answer.read().decode()
    finally:
        stop()
    for line in (
        "plait_round 0.0",
        'plait_lag_rounds{peer="p1"} -2.0',
        'plait_incidents_total{kind="refused",peer="p1",reason="NOT_FINITE"} 1.0',
        'plait_sent_bytes_total{peer="p1"} 12.0',
        'plait_certificate_expires_seconds{of="certificate"} 1.893456e+09',
    ):
        assert line in text
    serve_metrics(None, desk, SimpleNamespace())()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"certificate": 1893456000, "authority": 2093456000}, "2030-01-01"),
        ({"certificate": 1893456000, "authority": 1893355200}, "2029-12-30, authority"),
        ({"certificate": 10**400}, "-"),
        ({"certificate": "[/x]"}, "-"),
        ({"certificate": None, "authority": 3}, "-"),
        ({}, "-"),
        ("soon", "-"),
        (None, "-"),
    ],
)
def test_whatever_a_peer_says_of_its_certificate_the_status_has_a_day_or_nothing(told, said):
    assert first_end(told) == said


def test_a_log_line_is_json():
    record = logging.LogRecord("plait", logging.WARNING, "", 1, "two\nlines", (), None)
    record.peer = "ben"
    line = json.loads(JsonLines("ada").format(record))
    assert (line["self"], line["peer"], line["message"]) == ("ada", "ben", "two lines")


def test_status_of_a_federation(tmp_path, capsys):
    file = init_federation(tmp_path / "f", ["p0", "p1", "p2"], CONFIG)
    federation = load_federation(file)
    peer = one_peer()
    settings = peers.load_peer(file, "p0")
    transport = GrpcTransport(Members(federation), settings, peer.job.backbone.layout, peer.desk)
    transport.start()
    try:
        found = ask_all(file)
        assert cli.main(["status", "--config", str(file), "--name", "p1"]) == 1
    finally:
        transport.stop(0)
    assert found[0].facts["round"] == 0
    assert not found[0].why
    address = federation.member("p1").address
    assert found[1].why == f"nobody listens at {address}: not started yet, stopped, or done"
    assert "0/2" in capsys.readouterr().out
    (tmp_path / "f" / "p1" / "out").mkdir()
    (tmp_path / "f" / "p1" / "out" / "summary.json").write_text("{}")
    file.write_text(file.read_text().replace(federation.member("p2").address, "no.invalid:7600"))
    found = ask_all(file)
    assert found[1].why == f"done: {tmp_path / 'f' / 'p1' / 'out' / 'summary.json'}"
    assert [one.done for one in found] == [False, True, False]
    assert found[2].why == "there is no host of the name in no.invalid:7600"
    assert lag([PeerStatus("a", {"round": 5}), found[0]], found[0]) == 5


def test_commands_for_a_new_federation_and_for_mistakes(tmp_path, capsys):
    where = str(tmp_path / "f")
    assert cli.main(["init-federation", where, "--peers", "ada,ben", "--rounds", "3"]) == 0
    assert load_federation(tmp_path / "f" / "federation.toml").config.rounds == 3
    said = capsys.readouterr().out
    assert "plait peer --config" in said
    assert "train_file" not in said
    own = ["--peers", "ada,ben", "--task", "file", "--labels", "a,b"]
    assert cli.main(["init-federation", f"{where}-2", *own]) == 0
    assert "under [local]: train_file" in capsys.readouterr().out
    file = f"{where}/federation.toml"
    assert cli.main(["peer", "--config", file, "--name", "nobody"]) == 1
    assert "nobody" in capsys.readouterr().err
    assert cli.main(["pear"]) == 2
    assert cli.main(["up", "--out", where]) == 1
    assert "not an empty folder" in capsys.readouterr().err


def test_results_of_all_peers_are_brought_together(tmp_path, monkeypatch):
    file = init_federation(tmp_path / "federation", ["a", "b"], CONFIG)
    for client, name in enumerate("ab"):
        out = peers.load_peer(file, name).out
        adapter = out / "adapters" / f"client-{client}"
        adapter.mkdir(parents=True)
        save_file({"x": torch.full((2, 2), float(client))}, adapter / "adapter_model.safetensors")
        settings = {"r": CONFIG.rank, "lora_alpha": 16}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        shared = ("method", "task", "seed", "rounds", "metric", "majority", "config_digest")
        values = dict.fromkeys(shared, "x") | {"sent_bytes": 10, "incidents": {}}
        (out / "summary.json").write_text(json.dumps(values))
        begin = [
            dataclasses.replace(one_peer().job.started, objective="language"),
            fake_runs.evaluated(CONFIG, -1, 0.5),
        ]
        end = Evaluated(
            round=1, rows=4, scores=[0.5 + 0.2 * client], losses=[1.0], averaged_score=math.nan,
            averaged_loss=math.nan, seconds=1.0, confusion=[[2, 0], [client, 2 - client]],
            own_scores=[0.25 + client / 2], own_rows=[8],
        )  # fmt: skip
        said = (*begin, end)
        (out / "events.jsonl").write_text("".join(to_line(event) + "\n" for event in said))
    monkeypatch.setattr(up, "write_samples", lambda *given: {"exact_match": given == written})
    written = (tmp_path, load_federation(file).config)
    summary = up.merge(file, tmp_path)
    assert summary["exact_match"]
    assert summary["accuracy_base"] == 0.52
    assert summary["perplexity_client_mean"] == pytest.approx(math.e)
    assert summary["accuracy_client_min"] == 0.5
    assert (summary["accuracy_own_mean"], summary["accuracy_own_min"]) == (0.5, 0.25)
    assert summary["macro_f1_clients"] == pytest.approx((8 / 9 + 6 / 7) / 2)  # of [[4, 0], [1, 3]]
    assert "accuracy_averaged_model" not in summary
    assert summary["sent_bytes"] == 20
    mean = load_file(tmp_path / "adapters" / "mean" / "adapter_model.safetensors")["x"]
    assert torch.equal(mean, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("checkpoint", [True, False], ids=["", "of an older plait"])
def test_a_finished_peer_that_is_started_again_leaves_its_folder_alone(
    tmp_path, monkeypatch, checkpoint
):
    file = init_federation(tmp_path / "f", ["p0", "p1", "p2"], CONFIG)
    settings, federation = load_peer(file, "p0"), load_federation(file)
    peer = one_peer()
    folder = RunFolder.open(settings.out, settings.apply(federation.config), resume=True)
    folder.create(settings.apply(federation.config))
    folder.record(peer.job.started)
    if checkpoint:
        folder.save(peer.stack, 2)
    folder.finish({"rounds": 2})
    (settings.out / "x.partial").touch()
    before = {path: path.read_bytes() for path in settings.out.rglob("*") if path.is_file()}
    monkeypatch.setattr(peers, "Process", None)
    for name in ("configure_process", "log_to_stderr", "raise_descriptor_limit"):
        monkeypatch.setattr(peers, name, lambda *_: None)
    monkeypatch.setattr(peers.signal, "signal", lambda *_: None)
    assert peers.run_peer(file, "p0")
    now = {path: path.read_bytes() for path in settings.out.rglob("*") if path.is_file()}
    assert now == before


def test_what_a_finished_run_said_is_never_dropped(tmp_path):
    peer = one_peer()
    folder = RunFolder.open(tmp_path / "out", CONFIG, resume=True)
    folder.create(CONFIG)
    folder.record(peer.job.started)
    folder.finish({})
    assert folder.restore(peer.stack) == [peer.job.started]


def test_a_peer_is_not_started_again_with_other_rows(tmp_path):
    config = own_rows(tmp_path, train=["tool", "fruit"] * 5, dev=["pet", "fruit"])
    settings = SimpleNamespace(
        name="p0", local={"train_file": "x"}, apply=lambda _: config, out=tmp_path / "out",
        machine=Machine(),
    )  # fmt: skip
    federation = SimpleNamespace(labels=("fruit", "pet", "tool"), config=config)
    folder, read = open_folder(federation, settings)
    folder.create(config, read)
    open_folder(federation, settings)
    own_rows(tmp_path, train=["fruit", "tool"] * 5, dev=["pet", "fruit"])
    with pytest.raises(ValueError, match="have changed: training rows"):
        open_folder(federation, settings)


def test_a_peers_first_event_names_all_peers_and_itself(monkeypatch):
    members = tuple(member(name) for name in ("p7", "p2", "p5"))
    federation = Federation(id="f", config=CONFIG, peers=members, limits=Limits())
    settings = SimpleNamespace(name="p2", local={}, apply=lambda c: c, machine=Machine())
    monkeypatch.setattr(peers, "prepare", lambda *_: one_peer().job)
    started = prepare_peer(federation, settings).started
    assert (started.client_names, started.peer) == (("p7", "p2", "p5"), 1)
    assert from_line(to_line(started)) == started


def test_a_peer_with_rows_of_its_own_counts_no_others():
    job = counting_alone(one_peer().job, 1)
    others = [sum(row) for row in job.started.label_counts]
    assert others[0] == others[2] == 0 < others[1]
