"""Every fault, on real processes over mutual TLS: nobody else crashes, the run ends, the log tells.

Most faults must not change the result by a bit: what was lost is asked for again, and what is bad
is dropped, so the peers end where the simulation of the same run ends. docs/deploy.md has the
table. `make test-faults` runs this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import grpc
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from faulty import ATTACKS, STAGES
from proxy import Proxy
from stage import LIMITS, NAMES, Faultless, Play, chat_files, tiny_files

from membership_twin import simulated
from plait.cli.main import main
from plait.engines.checkpoint import load_rows
from plait.peers.audit_check import PeersBook, findings
from plait.peers.certificates import make_authority, make_certificate
from plait.peers.credentials import Pair
from plait.peers.federation import load_federation, load_peer
from plait.peers.membership import load_members
from plait.peers.process import prepare_peer
from plait.peers.revocation import fingerprint_of

pytestmark = pytest.mark.faults

SHORT = dataclasses.replace(LIMITS, round_timeout_s=2, start_timeout_s=15, linger_s=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def faultless(config, tmp_path_factory):
    return Faultless.of(config, tmp_path_factory.mktemp("simulated"))


@pytest.fixture
def stage(config, tmp_path):
    """Builds a play; whatever was started is ended."""
    plays = []

    def build(limits=LIMITS, names=NAMES, labels=(), **changes) -> Play:
        changed = dataclasses.replace(config, clients=len(names), **changes)
        plays.append(Play.of(tmp_path, changed, limits, names, labels))
        return plays[-1]

    yield build
    for play in plays:
        play.clear()


def everyone_equals(play, faultless, names=NAMES):
    assert {name: faultless.far(play, name) for name in names} == dict.fromkeys(names, 0.0)
    books_agree(play, names)


def near(play, faultless, names):
    for name in names:
        assert play.score(name) >= faultless.scores[name] - 0.15
    books_agree(play, names)


def books_agree(play, names):
    """Whatever happened, the honest ones' audit books do not contradict one another."""
    found = findings([PeersBook.read(play.out(name)) for name in names])
    assert not [one.text for one in found if one.wrong]


def kinds(play, name, kind):
    return {(peer, reason) for k, peer, reason in play.reasons(name) if k == kind}


# -- a peer dies


def killed_and_back(play, at, faultless):
    """A peer dies in its third round, comes back, and all end as if nothing had happened."""
    victim = play.start("cai", "killed", at, 2)
    for name in ("ada", "ben"):
        play.start(name)
    victim.join(90)
    assert victim.exitcode == -signal.SIGKILL
    play.start("cai")
    play.all_end()
    everyone_equals(play, faultless)


@pytest.mark.parametrize("at", STAGES)
def test_kill_9_and_restart(stage, faultless, at):
    killed_and_back(stage(), at, faultless)


def test_kill_9_of_a_language_models_peer_and_restart(stage, config, tmp_path):
    chat = chat_files(tmp_path / "chat")
    faultless = Faultless.of(dataclasses.replace(config, **chat), tmp_path / "simulated")
    killed_and_back(stage(**chat), "after mixing", faultless)


def test_killed_for_good(stage, faultless):
    play = stage(SHORT)
    # By then all know each other: nothing of an earlier round is still to be asked for.
    victim = play.start("cai", "killed", "in training", 3)
    for name in ("ada", "ben"):
        play.start(name)
    victim.join(90)
    play.all_end(("ada", "ben"))
    near(play, faultless, ("ada", "ben"))
    for name in ("ada", "ben"):
        assert ("cai", "") in kinds(play, name, "missing") & kinds(play, name, "absent")
        # One wait; after that a peer that can't be reached is not waited for.
        assert play.summary(name)["incidents"]["missing"] == 3


def test_killed_and_its_folder_lost(stage, faultless):
    play = stage()
    victim = play.start("cai", "killed", "after mixing", 3)
    for name in ("ada", "ben"):
        play.start(name)
    victim.join(90)
    shutil.rmtree(play.out("cai"))
    play.start("cai")
    play.all_end()
    everyone_equals(play, faultless)


def test_joins_from_a_neighbours_state_when_too_much_is_lost(stage, faultless):
    limits = dataclasses.replace(LIMITS, keep_rounds=1)
    play = stage(limits)
    victim = play.start("cai", "killed", "in training", 3)
    for name in ("ada", "ben"):
        play.start(name)
    victim.join(90)
    shutil.rmtree(play.out("cai"))
    play.start("cai")
    play.all_end()
    assert kinds(play, "cai", "joined")
    near(play, faultless, NAMES)


def test_sigterm_leaves_cleanly_and_can_be_taken_up(stage, faultless):
    play = stage()
    for name in NAMES:
        play.start(name)
    play.wait_for(lambda: play.rounds_done("cai") >= 2)
    os.kill(play.started["cai"][-1].pid, signal.SIGTERM)
    assert play.end("cai", 20) == 0
    assert not (play.out("cai") / "summary.json").exists()
    assert any("told to leave" in line["message"] for line in play.said("cai"))
    assert not list(play.out("cai").glob("*.partial"))
    play.start("cai")
    play.all_end()
    everyone_equals(play, faultless)


# -- a peer is slow


def test_ten_times_slower_within_the_time_of_a_round(stage, faultless):
    play = stage()
    play.start("cai", "slow", 1.5)
    for name in ("ada", "ben"):
        play.start(name)
    play.all_end()
    everyone_equals(play, faultless)


def test_ten_times_slower_than_the_time_of_a_round(stage, faultless):
    play = stage(dataclasses.replace(SHORT, round_timeout_s=0.4, linger_s=30))
    play.start("cai", "slow", 4)
    for name in ("ada", "ben"):
        play.start(name)
    play.all_end()
    near(play, faultless, ("ada", "ben"))
    assert ("cai", "") in kinds(play, "ada", "missing")
    assert ("ada", "STALE_ROUND") in kinds(play, "cai", "rejected")
    assert ("cai", "STALE_ROUND") in kinds(play, "ada", "refused")


def test_stopped_for_a_while(stage, faultless):
    play = stage(SHORT)
    for name in NAMES:
        play.start(name)
    play.wait_for(lambda: play.rounds_done("cai") >= 1)
    os.kill(play.started["cai"][-1].pid, signal.SIGSTOP)
    play.wait_for(lambda: play.rounds_done("ada") >= 4)
    os.kill(play.started["cai"][-1].pid, signal.SIGCONT)
    play.all_end()
    near(play, faultless, NAMES)
    assert ("cai", "") in kinds(play, "ada", "missing")


# -- the network


def test_a_link_is_cut_and_heals(stage, faultless):
    play = stage(dataclasses.replace(LIMITS, linger_s=10))
    federation = load_federation(play.config_file)
    with (
        Proxy(federation.member("cai").address) as to_cai,
        Proxy(federation.member("ada").address) as to_ada,
    ):
        # Between ada and cai everything goes through proxies; ben reaches both.
        files = {
            "ada": play.rerouted("ada", "cai", to_cai.address),
            "cai": play.rerouted("cai", "ada", to_ada.address),
        }
        for name in NAMES:
            play.start(name, config=files.get(name))
        play.wait_for(lambda: play.rounds_done("ada") >= 2)
        to_cai.cut()
        to_ada.cut()
        time.sleep(5)
        to_cai.heal()
        to_ada.heal()
        play.all_end()
    assert ("cai", "UNREACHABLE") in kinds(play, "ada", "unanswered")
    everyone_equals(play, faultless)


def test_a_link_is_cut_for_rounds(stage, faultless):
    play = stage(dataclasses.replace(SHORT, round_timeout_s=1))
    federation = load_federation(play.config_file)
    with (
        Proxy(federation.member("cai").address) as to_cai,
        Proxy(federation.member("ada").address) as to_ada,
    ):
        files = {
            "ada": play.rerouted("ada", "cai", to_cai.address),
            "cai": play.rerouted("cai", "ada", to_ada.address),
        }
        for name in NAMES:
            play.start(name, "slow", 0.5, config=files.get(name))
        play.wait_for(lambda: play.rounds_done("ada") >= 1)
        to_cai.cut()
        to_ada.cut()
        play.wait_for(lambda: play.rounds_done("ada") >= 3)
        to_cai.heal()
        to_ada.heal()
        play.all_end()
    assert ("cai", "") in kinds(play, "ada", "missing")
    assert ("cai", "") in kinds(play, "ada", "back")
    near(play, faultless, NAMES)


# -- a peer is not what it should be


def test_two_configs(stage, faultless):
    play = stage(SHORT)
    other = play.changed("cai", "lr = 0.01", "lr = 0.02")
    play.start("cai", config=other)
    for name in ("ada", "ben"):
        play.start(name)
    assert play.end("cai") == 1
    play.all_end(("ada", "ben"))
    near(play, faultless, ("ada", "ben"))
    assert ("cai", "WRONG_CONFIG") in kinds(play, "ada", "refused")
    assert ("ada", "WRONG_CONFIG") in kinds(play, "cai", "rejected")
    assert "lr is 0.02 here and 0.01 at ada" in play.said("cai")[-1]["message"]


@pytest.mark.parametrize("kind", ["expired", "self-signed", "wrong authority", "none"])
def test_bad_certificates(stage, faultless, kind):
    play = stage(SHORT)
    folder = play.config_file.parent
    fault = "careless"
    if kind == "none":
        fault = "without certificate"
    elif kind == "self-signed":
        replace_certificate(folder / "cai", self_signed("cai"))
    else:
        authority = play.authority() if kind == "expired" else make_authority("elsewhere")
        days = -1 if kind == "expired" else 30
        replace_certificate(folder / "cai", make_certificate(authority, "cai", days))
    play.start("cai", fault)
    for name in ("ada", "ben"):
        play.start(name)
    play.wait_for(lambda: ("ada", "UNREACHABLE") in kinds(play, "cai", "unanswered"))
    play.all_end(("ada", "ben"))
    near(play, faultless, ("ada", "ben"))
    assert not any(line.get("kind") == "back" for line in play.said("ada"))
    if kind != "none":  # with a good certificate as a server it can still be asked
        assert ("cai", "UNREACHABLE") in kinds(play, "ada", "unanswered")


def self_signed(name: str) -> Pair:
    """A certificate that nobody but its owner vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return Pair(
        certificate.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def replace_certificate(folder: Path, pair) -> None:
    (folder / "cert.pem").write_bytes(pair.certificate)
    (folder / "key.pem").write_bytes(pair.key)


@pytest.mark.parametrize("kind", ["expired", "missing"])
def test_a_peer_with_a_bad_certificate_says_so_and_does_not_start(stage, kind):
    play = stage(SHORT)
    folder = play.config_file.parent / "cai"
    if kind == "expired":
        replace_certificate(folder, make_certificate(play.authority(), "cai", -1))
    else:
        (folder / "cert.pem").unlink()
    play.start("cai")
    assert play.end("cai", 60) == 1
    assert kind in play.said("cai")[-1]["message"]


def taken(play, name):
    """How often a peer has taken something new of its certificates."""
    return sum(line.get("kind") == "renewed" for line in play.said(name))


def revoke(play, *certificates: tuple[str, bytes]) -> None:
    with (play.config_file.parent / "revoked.txt").open("a") as file:
        file.writelines(f"{fingerprint_of(pem)} {name}\n" for name, pem in certificates)


def test_all_certificates_are_renewed_and_the_old_ones_revoked(stage, faultless):
    play = stage()
    folder = play.config_file.parent
    old = {name: Pair(*((folder / name / f"{file}.pem").read_bytes() for file in ("cert", "key")))
           for name in NAMES}  # fmt: skip
    for name in NAMES:
        play.start(name, "watchful", 1.0)
    play.wait_for(lambda: min(map(play.rounds_done, NAMES)) >= 1)
    for name in NAMES:
        replace_certificate(folder / name, make_certificate(play.authority(), name))
    play.wait_for(lambda: all(taken(play, name) == 1 for name in NAMES))
    revoke(play, *((name, pair.certificate) for name, pair in old.items()))
    play.wait_for(lambda: all(taken(play, name) == 2 for name in NAMES))
    assert says_of(play, "ada", old["cai"]) is grpc.StatusCode.UNAUTHENTICATED
    assert max(map(play.rounds_done, NAMES)) < 6, "all of that was during the run"
    play.all_end()
    everyone_equals(play, faultless)
    assert kinds(play, "ada", "refused") == {("cai", "REVOKED")}


def says_of(play, name: str, shown: Pair) -> grpc.StatusCode:
    """What a peer says to a call with somebody's certificate."""
    authority = play.authority().certificate
    own = grpc.ssl_channel_credentials(authority, shown.key, shown.certificate)
    named = [("grpc.ssl_target_name_override", name)]
    address = load_federation(play.config_file).member(name).address
    with grpc.secure_channel(address, own, named) as channel:
        call = channel.unary_unary("/plait.v1.Peer/Ask").future(b"", timeout=5)
        return call.code()


def test_a_certificate_is_revoked_while_its_owner_runs(stage, faultless):
    play = stage(SHORT)
    for name in NAMES:
        play.start(name, "watchful", 0.3)
    play.wait_for(lambda: min(map(play.rounds_done, NAMES)) >= 1)
    revoke(play, ("cai", (play.config_file.parent / "cai" / "cert.pem").read_bytes()))
    assert play.end("cai") == 1
    assert "cai's certificate is revoked" in play.said("cai")[-1]["message"]
    play.all_end(("ada", "ben"))
    near(play, faultless, ("ada", "ben"))
    for name in ("ada", "ben"):
        assert ("cai", "REVOKED") in kinds(play, name, "refused")
        assert ("cai", "") in kinds(play, name, "absent")


# -- members come and go


def propose(play, signers, *change):
    """A new list of members, signed, in the folder that all read."""
    config = ["--config", str(play.config_file)]
    main(["members", "propose", *config, "--name", "ada", *change])
    (proposed,) = play.config_file.parent.glob("proposed-*.toml")
    for name in signers:
        main(["members", "sign", str(proposed), *config, "--name", name])
    proposed.unlink()


def renew(play, names) -> list[tuple[str, bytes]]:
    """New certificates for all; the old ones."""
    places = {name: play.config_file.parent / name for name in names}
    old = [(name, (place / "cert.pem").read_bytes()) for name, place in places.items()]
    for name, place in places.items():
        replace_certificate(place, make_certificate(play.authority(), name))
    return old


def test_one_joins_one_leaves_all_are_renewed_and_one_is_revoked(stage, config):
    """A run of 60 rounds that nobody starts again."""
    play = stage(labels=("0", "1"), rounds=60, local_steps=2, train_file=None)
    four = (*NAMES, "dan")
    rows = Path(config.train_file).read_text().splitlines()
    address = play.add("dan")
    for k, name in enumerate(four):
        play.own_rows(name, [rows[0], *rows[1 + 40 * k : 41 + 40 * k]])
    for name in NAMES:
        play.start(name, "watchful", 0.3)
    play.wait_for(lambda: min(map(play.rounds_done, NAMES)) >= 2)
    propose(play, ("ada", "ben"), "--join", f"dan={address}", "--from-round", "20")
    play.start("dan", "watchful", 0.3)
    play.wait_for(lambda: play.rounds_done("dan") >= 2)
    old = renew(play, four)
    play.wait_for(lambda: all(taken(play, name) >= 1 for name in four))
    propose(play, ("ada", "ben", "dan"), "--leave", "cai", "--from-round", "45")
    play.all_end(["cai"])
    shown = [*old, ("cai", (play.config_file.parent / "cai" / "cert.pem").read_bytes())]
    revoke(play, *shown)
    there = ("ada", "ben", "dan")
    play.wait_for(lambda: all(taken(play, name) >= 2 for name in there))
    folder = play.config_file.parent / "cai"
    cai = Pair((folder / "cert.pem").read_bytes(), (folder / "key.pem").read_bytes())
    assert says_of(play, "ada", cai) is grpc.StatusCode.UNAUTHENTICATED
    assert max(map(play.rounds_done, there)) < 60, "all of that was during the run"
    play.all_end(there)
    assert [play.summary(name)["incidents"].get("missing", 0) for name in four] == [0] * 4

    settings = [load_peer(play.config_file, name) for name in four]
    members = load_members(play.config_file, settings[0])
    jobs = [prepare_peer(members.first_with(one.name), one) for one in settings]
    stacks = simulated(jobs, members)
    for k, name in enumerate(four):
        end = min(60, members.newest.peers[k].leaves or 60)
        assert play.rounds_done(name) == end - (20 if name == "dan" else 0)
        found = jobs[k].initial_stack([k])
        load_rows(found, play.out(name) / "checkpoint.safetensors")
        for slot, value in stacks[k].state.items():
            assert torch.equal(found.state[slot], value), (name, slot)
    books_agree(play, four)
    book = PeersBook.read(play.out("ada"))
    lists = [(version.from_round, version.digest) for version in members.rosters]
    assert [(line["round"], line["digest"]) for line in book.lines("members")] == lists[1:]


REASONS = {
    "NaN": {"NOT_FINITE"},
    "wrong shapes": {"WRONG_SHAPE"},
    "1 GiB": {"TOO_LARGE"},
    "random bytes": {"MALFORMED", "TOO_LARGE"},
    # A receiver that is a round behind may find the wrong factors first.
    "old and future rounds": {"STALE_ROUND", "TOO_FAR_AHEAD", "REPLAY", "WRONG_PHASE"},
    "another's name": {"WRONG_SENDER"},
    "wrong phase": {"WRONG_PHASE"},
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_hostile_peer(stage, faultless, kind):
    play = stage()
    play.start("cai", "hostile", kind)
    for name in ("ada", "ben"):
        play.start(name)
    play.wait_for(lambda: play.rounds_done("ada") >= 4)
    grown = peak_mib(play.started["ada"][-1].pid)
    play.all_end()
    # No attack changed a bit: after each, the same peer's honest message was taken.
    everyone_equals(play, faultless)
    for name in ("ada", "ben"):
        found = {reason for peer, reason in kinds(play, name, "refused") if peer == "cai"}
        assert found
        assert found <= REASONS[kind], found
    assert grown < 1200, f"{grown} MiB at most"


def peak_mib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    raise AssertionError(pid)


@pytest.mark.parametrize(
    "mix", ["trimmed-mean:1", "clipped-gossip:0.05", "trimmed-product:1", "clipped-product:0.05"]
)
def test_a_member_that_lies(stage, faultless, mix):
    play = stage(SHORT, mix=mix)
    play.start("cai", "lying", 100.0)
    for name in ("ada", "ben"):
        play.start(name)
    play.all_end(("ada", "ben"))
    near(play, faultless, ("ada", "ben"))


def listens(play, name):
    return any(line["message"].startswith("listening") for line in play.said(name))


def test_a_liar_that_is_there_first(stage, faultless):
    play = stage()
    play.start("ada", "ahead", 100.0)
    play.wait_for(lambda: listens(play, "ada"))
    play.start("ben")
    play.wait_for(lambda: listens(play, "ben"))
    time.sleep(3)
    play.start("cai")
    play.all_end()
    everyone_equals(play, faultless)


def test_joins_while_a_member_lies(stage, faultless):
    play = stage(dataclasses.replace(LIMITS, keep_rounds=1))
    victim = play.start("cai", "killed", "in training", 3)
    play.start("ada", "ahead", 100.0)
    play.start("ben")
    victim.join(90)
    shutil.rmtree(play.out("cai"))
    play.start("cai")
    play.all_end()
    assert kinds(play, "cai", "joined")
    assert ("cai", "") in kinds(play, "ben", "gave")
    near(play, faultless, ("ben", "cai"))


@pytest.mark.parametrize("of", ["a liar", "an honest one"])
def test_of_two_peers_the_operator_says_whom_to_trust(stage, of):
    limits = dataclasses.replace(SHORT, keep_rounds=1, linger_s=60)
    play = stage(limits, names=("ada", "ben"), rounds=8)
    if of == "a liar":
        play.start("ada", "ahead", 100.0)
        play.wait_for(lambda: listens(play, "ada"))
    else:
        victim = play.start("ben", "killed", "in training", 2)
        play.start("ada", "slow", 0.3)
        victim.join(90)
        shutil.rmtree(play.out("ben"))
        play.wait_for(lambda: play.rounds_done("ada") >= 4)
    play.start("ben")
    assert play.end("ben") == 1
    assert "--trust ada" in play.said("ben")[-1]["message"]
    if of == "an honest one":
        play.start("ben", trust="ada")
        play.all_end(("ada", "ben"))
        assert kinds(play, "ben", "joined")


def test_training_that_diverges_stops_its_own_peer_only(stage, faultless):
    play = stage(SHORT)
    play.start("cai", "diverging", 2)
    for name in ("ada", "ben"):
        play.start(name)
    assert play.end("cai") == 1
    assert "not finite in round 2" in play.said("cai")[-1]["message"]
    play.all_end(("ada", "ben"))
    near(play, faultless, ("ada", "ben"))


def test_full_disk(stage, faultless):
    play = stage(SHORT)
    out = play.out("cai")
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", out]).returncode:
        pytest.skip("only root can mount a small disk here")
    try:
        play.start("cai", "slow", 0.5)
        for name in ("ada", "ben"):
            play.start(name)
        play.wait_for(lambda: play.rounds_done("cai") >= 1)
        fill(out / "ballast")
        assert play.end("cai") == 1
        play.all_end(("ada", "ben"))
    finally:
        subprocess.run(["umount", out], check=True)
    assert "No space left" in play.said("cai")[-1]["message"]
    near(play, faultless, ("ada", "ben"))


def fill(path: Path) -> None:
    """Leave no room on a disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
