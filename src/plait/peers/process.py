"""One peer as a process: from its files to its adapter, through whatever happens on the way.

    <out>/config.json, events.jsonl, summary.json, adapters/    as in any run folder (run_folder.py)
    <out>/checkpoint.safetensors                                the state after the last round

A round's messages exist only once, so a peer saves after each round: started again it does the
round that was cut off anew, with the same rows in the same order, and asks for what it lost. What
it sent last is saved with it: a neighbour may not have had it yet.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from plait.config import Config
from plait.data.tasks import Task, load_task, without_rows
from plait.engines.checkpoint import load_beside
from plait.engines.fingerprints import FILES, fingerprints, of_model
from plait.engines.job import Job, prepare
from plait.events import Evaluated, Event, Incident, RoundDone, releases
from plait.factors import slots_name
from plait.figures import FIGURES, taken
from plait.lora import Stack
from plait.machine.files import held, make_lasting
from plait.machine.process_settings import configure_process
from plait.model.peft_adapters import save_adapter
from plait.peers.audit import BOOK, Book
from plait.peers.certificates import write_secret
from plait.peers.codec import Message, dtype_of, encode
from plait.peers.exchange import Exchange, Left, Terms
from plait.peers.federation import (
    Federation,
    Limits,
    Member,
    PeerSettings,
    load_peer,
)
from plait.peers.guard import HANDSHAKE_S, raise_descriptor_limit
from plait.peers.inbox import FactorRows, Inbox, Turn
from plait.peers.joining import Entrance
from plait.peers.json_log import log_to_stderr
from plait.peers.mailbox import Desk
from plait.peers.membership import (
    MOST_TURNS,
    Members,
    add_signed,
    check_members,
    keep_list,
    load_members,
    take_list,
)
from plait.peers.message_body import template_of, unpack
from plait.peers.prometheus import serve_metrics
from plait.peers.quorum import Quorum, middle
from plait.peers.refusals import plain
from plait.peers.roster import Roster, read_roster, write_roster
from plait.peers.round_loop import Due, Peer, agreed_turns
from plait.peers.transport import GrpcTransport
from plait.plugins import load_plugins
from plait.presets import as_settings
from plait.privacy import Noise, secret_noise, seeded_noise, spent
from plait.runs.made_by import made_by
from plait.runs.run_folder import RunFolder, load_events
from plait.runs.samples import write_samples

LOG = logging.getLogger("plait.peer")

KEY_BYTES = 32
SENT, SENT_IN, NOTED = "sent", "sent_in", "noted"
"""In a checkpoint, the body of the last message, its round as 8 bytes, and the hash of the audit
book's last line before it, (bytes,) uint8."""


def run_peer(
    federation_file: Path, name: str, insecure_loopback: bool = False, trust: str | None = None
) -> bool:
    """Take part in a federation until its last round; writes the peer's run folder.

    Args:
        federation_file: `federation.toml`; `<name>/peer.toml` lies beside it.
        name: Which peer this is.
        insecure_loopback: No TLS; refused for any address that is not of this machine.
        trust: The peer whose word on the round, and whose state, are taken without a majority.

    Returns:
        Whether it is done; False if it was told to leave before (SIGTERM, SIGINT).

    Raises:
        ValueError: The files ask for what can't be, or training diverged.
        OSError: The run folder can't be written.
    """
    configure_process()
    log_to_stderr(name)
    raise_descriptor_limit()
    leave = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leave.set())
    with saying_what_stops():
        settings = load_peer(federation_file, name)
        members = load_members(federation_file, settings)
        if was_finished(members.first_with(name), settings):
            LOG.info("the run was finished before: %s", settings.out)
            return True
        with Process(members, settings, leave, insecure_loopback, trust) as process:
            process.lists = federation_file.parent
            return process.run()


@contextmanager
def saying_what_stops() -> Iterator[None]:
    """A line of the log for an error that ends the peer, in the words of its files."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = as_settings(str(error))
        LOG.error("stopped: %s", said, extra={"kind": "stopped"})
        if isinstance(error, OSError):
            raise
        raise ValueError(said) from error


class Process:
    """Everything that a peer has while it runs."""

    def __init__(
        self,
        members: Members,
        settings: PeerSettings,
        leave: threading.Event,
        insecure_loopback: bool = False,
        trust: str | None = None,
        own_loop: bool = False,
    ) -> None:
        """Open the folder, prepare the run and take up the state; nothing listens yet.

        Once `leave` is set, by whoever it may be, the peer goes. With `own_loop` somebody else
        trains, and may have the rows, too.
        """
        self.settings = settings
        federation = members.first_with(settings.name)
        self.me = federation.index(settings.name)
        load_plugins(settings.apply(federation.config).plugin)
        check_members(federation)
        self.lists: Path | None = None
        self._learning = threading.Lock()
        self._until_end = ExitStack()
        taken_up = settings.out.exists()
        if taken_up:
            self._until_end.enter_context(held(settings.out))
        self.folder, read = open_folder(federation, settings, own_loop)
        self.leave = leave
        self.job = prepare_peer(federation, settings, own_loop)
        check_sizes(self.job, federation.limits)
        if not taken_up:  # only now: a peer that can't run leaves nothing behind
            make_lasting(settings.out)
            self._until_end.enter_context(held(settings.out))
        config = settings.apply(federation.config)
        if not self.folder.finished(config):
            self.folder.create(config, read, made_by(settings.machine))
        self.members = members.with_read(what_was_read(federation, self.job, read))
        self.stack = self.job.initial_stack([self.me])
        noise = noise_of(self.folder, self.job.config)
        self.done, self.first_round = take_up(self.folder, self.stack)
        limits = patient(federation.limits, self.job)
        turn = agreed_turns(self.job, self.me, self._peers)
        rounds = self.job.config.rounds
        inbox = Inbox(self.me, turn, rounds, limits.keep_rounds, limits.symmetric_loss)
        trusted = None if trust is None else federation.index(trust)
        quorum = Quorum(voters=voters_of(self._peers, self.me), trusted=trusted)
        self.desk = Desk(inbox, self.members.newest.names, quorum)
        self.desk.roster = self._list
        noted = load_beside(self.folder.checkpoint_file, NOTED)
        vouched = None if noted is None else noted.numpy().tobytes().hex()
        self.book = Book(self.folder.path, vouched)
        self._until_end.callback(self.book.close)
        self.desk.note = self.book.note
        self.transport = GrpcTransport(
            self.members, settings, self.job.backbone.layout, self.desk,
            kinds=self.job.method.kinds, rank_of=self._rank_of, insecure_loopback=insecure_loopback,
        )  # fmt: skip
        counts = self.transport.counts
        self.desk.live = lambda: {
            "expires": self.transport.expires(),
            **{name: sum(counter.values()) for name, counter in vars(counts).items()},
        }
        self.exchange = Exchange(
            self.desk,
            self.transport,
            Terms(
                round_timeout_s=limits.round_timeout_s,
                start_timeout_s=limits.start_timeout_s,
                linger_s=limits.linger_s,
            ),
        )
        self.exchange.leave = self.leave
        self.exchange.learn = self.learn
        self.peer = Peer(self.job, self.stack, self.exchange, self.write, noise)
        self._follow()

    @property
    def federation(self) -> Federation:
        """The federation with its newest list of members."""
        return self.members.newest

    @property
    def joins(self) -> int:
        """The first round that this peer takes part in."""
        return self.federation.member(self.settings.name).joins

    @property
    def end(self) -> int:
        """The round before which this peer's part is over."""
        rounds = self.job.config.rounds
        return min(rounds, self.federation.member(self.settings.name).leaves or rounds)

    def __enter__(self) -> Process:
        """Begin to listen."""
        self.transport.start()
        self._metrics = serve_metrics(self.settings.metrics, self.desk, self.transport)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave: open calls may end, nothing new begins."""
        self.exchange.stop()
        self.transport.stop(0.5)
        self._metrics()
        self._until_end.close()

    def run(self) -> bool:
        """All rounds, trained as in a simulation; whether it is done, and wasn't told to leave."""
        for due in self.rounds():
            self.peer.train(due)
        return self.folder.summary_file.exists()

    def rounds(self) -> Iterator[Due]:
        """All rounds, then the adapter, then a while for those who still need messages.

        Yields where local training is due.
        """
        LOG.info("listening on %s", self.settings.listen, extra={"round": self.first_round})
        try:
            self._begin()
            if self.first_round > 0 and not self.done:  # begun from a neighbour's state
                self._see(self.job.started)
            for said in self.peer.rounds(self.first_round, self.end):
                if isinstance(said, Due):
                    yield said
                else:
                    self._see(said)
        except Left:
            LOG.info("told to leave; round %d can be taken up again", self.desk.inbox.round)
            return
        self._end()

    def _end(self) -> None:
        """Write the result and stay for those who need messages; where clients rest, stay first.

        Their last message may be the only copy of the model. A peer that is started again has it
        until its result is there, and is not taken up any more from then on.
        """
        rests = some_rest(self.job)
        if not rests:
            self._finish()
        self.exchange.linger(self.exchange.neighbours, self.end)
        if rests and not self.leave.is_set():
            self._finish()

    def write(
        self,
        rows: FactorRows,
        round_: int,
        active: str,
        kind: str,
        before: FactorRows | None = None,
    ) -> Message:
        """A message of this peer, with what changed where it is said what was before."""
        return encode(
            self.job.own(rows, self.me),
            layout=self.job.layout_of(self.me),
            federation=self.federation.id,
            config_digest=self.members.digest(round_),
            sender=self.settings.name,
            round=round_,
            active=active,
            kind="state" if kind == "state" else "round",
            wire=self.job.config.wire,
            before=None if before is None else self.job.own(before, self.me),
        )

    def _rank_of(self, name: str) -> int:
        names, config = self.members.newest.names, self.job.config
        return config.rank_of(names.index(name)) if name in names else config.rank

    # -- the list of members

    def _peers(self, round_: int) -> tuple[Member, ...]:
        return self.members.at(round_).peers

    def learn(self, peer: int, text: str) -> bool:
        """Take a newer list of members from a peer; whether it counts. Called on any thread."""

        def add() -> Roster | None:
            roster = read_roster(text)
            if roster.version <= self.members.roster.version:
                return None  # another was quicker
            add_signed(self.members, roster, self.settings)
            return roster

        return self._learn(add, self.desk.names[peer])

    def _look(self) -> None:
        """Take a list of members that somebody has put beside federation.toml."""
        if folder := self.lists:
            self._learn(lambda: take_list(self.members, folder, self.settings), self.desk.name)

    def _learn(self, add: Callable[[], Roster | None], source: str) -> bool:
        """Go by a list that counts, if there is one; False if it doesn't count."""
        with self._learning:
            before = self.members.roster
            try:
                roster = add()
            except ValueError as error:
                detail = f"its list of members doesn't count: {error}"
                self.desk.report("refused", source, detail, "MEMBERS")
                return False
            if roster is None:
                return True
            keep_list(roster, self.folder.path)
            self._follow()
        self.transport.renew()
        self.desk.report("members", self.desk.name, changes(before, roster, source))
        self.desk.note("members", peer=source, round=roster.from_round, digest=roster.digest)
        self.exchange.spread()
        return True

    def _follow(self) -> None:
        """Go by the newest list."""
        newest, turn = self.members.newest, self.desk.inbox.turn
        neighbours = neighbours_of(turn, self.job.config.rounds)
        with self.desk.condition:
            self.desk.names, self.desk.version = newest.names, self.members.roster.version
            self.desk.settings = newest.shared()
        self.exchange.meets(neighbours)
        self.peer.end = self.end

    def _list(self, version: int) -> str:
        roster = self.members.version(version)
        return "" if roster is None or version == 1 else write_roster(roster)

    # -- where to begin

    def _begin(self) -> None:
        """Find out where the others are; begin from their states where there is none of one's own.

        A new process a few rounds behind does them all: it comes out where it would have been.
        """
        self.desk.note(
            "started", by=self.settings.name, federation=plain(self.federation.id, 80),
            config=self.members.digest(0), round=self.first_round,
            keep=self.desk.inbox.keep_rounds, version=version("plait"),
        )  # fmt: skip
        with self.desk.condition:
            self.desk.inbox.skip_to(self.first_round)
            self._remember()
        turn = self.desk.inbox.turn
        expects = lambda done: state_of(self.job, turn, done)  # noqa: E731
        indivisible = self.job.method.mix(self.first_round).indivisible
        entrance = Entrance(self.exchange, self.joins, expects, indivisible)
        has_state = self.first_round > 0
        if not has_state and (self.joins > 0 or entrance.is_late()):
            self._join(entrance)
        if has_state:
            self.exchange.greet(self.exchange.neighbours)
        self.exchange.check_welcome()

    def _join(self, entrance: Entrance) -> None:
        """Wait until there is a state to begin from, and begin from it."""
        target = entrance.find()
        self.first_round = min(max(target, self.joins), self.end - 1)
        states = [self.job.whole(rows, peer) for peer, rows in entrance.states.items()]
        own = {slot: self.stack.state[slot][0].cpu() for slot in states[0]}
        self.peer.adopt(middle(own, states))
        names = ", ".join(self.desk.names[peer] for peer in sorted(entrance.states))
        detail = f"began at round {self.first_round} from the states of {names}"
        self.desk.report("joined", self.desk.name, detail)

    # -- what is kept

    def _see(self, event: Event) -> None:
        """Record an event, and save the state where a round is complete."""
        self.done = [event]  # the rest is in the folder: rounds without end take no memory
        with_descriptors(lambda: self.folder.record(event))
        match event:
            case RoundDone():
                self._look()
                self.desk.facts["phase"] = event.active
                self._tell(loss=event.train_losses[0])
                LOG.info(
                    "round %d done: loss %.4f, %d of %d neighbours, %.1f s of training",
                    event.round, event.train_losses[0], len(event.edges),
                    len(self.desk.inbox.turn(event.round).hears), event.train_seconds,
                    extra={"round": event.round},
                )  # fmt: skip
                if not self.peer.evaluates_after(event.round):
                    self._save(event.round + 1)
            case Evaluated():
                self._tell(score=event.scores[0])
                if event.round >= 0:
                    self._save(event.round + 1)

    def _tell(self, **facts: float) -> None:
        """Say how it goes to neighbours who ask; with differential privacy that is not theirs."""
        if self.job.config.dp_clip is None:
            self.desk.facts |= {name: x for name, x in facts.items() if math.isfinite(x)}

    def _remember(self) -> None:
        """Have the last message of this peer again: a neighbour may still wait for it."""
        file = self.folder.checkpoint_file
        sent, sent_in = load_beside(file, SENT), load_beside(file, SENT_IN)
        if sent is None or sent_in is None:
            return
        round_ = int.from_bytes(sent_in.numpy().tobytes(), "little")
        dtype = dtype_of("round", self.job.config.wire)
        template = template_of(self.job.layout_of(self.me), self.job.shared(round_), dtype)
        rows = self.job.whole(unpack(bytearray(sent.numpy()), template), self.me)
        active = self.desk.inbox.turn(round_).active
        (last,) = (e for e in self.done if isinstance(e, RoundDone) and e.round == round_)
        heard = {peer for _, peer, _ in last.edges}
        self.desk.inbox.remember(round_, self.write(rows, round_, active, "round"), heard)

    def _save(self, rounds_done: int) -> None:
        """Write the state, and what was sent last on the way there."""
        with self.desk.condition:
            message = self.desk.inbox.last_sent()
        beside = {}
        if message:
            beside = {SENT: message.body, SENT_IN: message.header.round.to_bytes(8, "little")}
        try:
            beside[NOTED] = bytes.fromhex(self.book.sync())
            kept = {name: torch.tensor(np.frombuffer(x, np.uint8)) for name, x in beside.items()}
            with_descriptors(lambda: self.folder.save(self.stack, rounds_done, **kept))
        except OSError as error:
            raise OSError(
                f"{self.folder.path} can't be written after round {rounds_done - 1}: {error}. "
                "Make room and start the peer again; it goes on from its last checkpoint."
            ) from error

    def _finish(self) -> None:
        row = {factor: value[0] for factor, value in self.stack.factors.items()}
        adapter = self.folder.path / "adapters" / f"client-{self.me}"
        config = self.job.config
        save_adapter(self.job.backbone, row, config, adapter, config.rank_of(self.me))
        self.done = load_events(self.folder.path)
        summary = self._summary()
        if self.peer.judges:
            summary |= write_samples(self.folder.path, self.job.config, self.me, self.job.task)
        self.desk.note("finished", round=self.end)
        LOG.info("the last line of %s has the hash %s", BOOK, self.book.sync())
        self.folder.finish(summary)
        spent = f", epsilon {summary['dp_epsilon']:.3g}" if "dp_epsilon" in summary else ""
        LOG.info("done: %s%s", adapter, spent)

    def _summary(self) -> dict[str, Any]:
        config, found = self.job.config, taken(self.done)
        rounds = [event for event in self.done if isinstance(event, RoundDone)]
        incidents = [event.kind for event in self.done if isinstance(event, Incident)]
        return {
            "peer": self.settings.name,
            "client": self.me,
            **{key: getattr(config, key) for key in ("method", "task", "seed", "rounds")},
            "rounds_done": len(rounds),
            "metric": self.job.started.metric,
            "majority": self.job.started.majority,
            **self._scores(found),
            "sent_bytes": found["sent_bytes"],
            "incidents": {kind: incidents.count(kind) for kind in sorted(set(incidents))},
            "train_seconds": found["train_seconds"],
            "config_digest": self.federation.digest(),
            **spent(config, releases(rounds)),
        }

    def _scores(self, found: Mapping[str, float]) -> dict[str, float]:
        """How its model did at the end; nothing where it has no rows to tell."""
        judged = [event for event in self.done if isinstance(event, Evaluated)]
        if not judged:
            return {}
        return {
            "accuracy": found["accuracy_client_mean"],
            "loss": found["loss_client_mean"],
            **{name: value for name, value in found.items() if FIGURES[name].only},
            "rows": judged[-1].rows,
        }


def with_descriptors(write: Callable[[], None]) -> None:
    """Write; where strangers hold all descriptors wait for the end of their handshakes."""
    end = time.monotonic() + 4 * HANDSHAKE_S
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or time.monotonic() > end:
                raise
        time.sleep(0.2)


def was_finished(federation: Federation, settings: PeerSettings) -> bool:
    """Whether the run folder holds the result already; then nothing in it is touched.

    Raises:
        ValueError: It was made by another config.
    """
    config = settings.apply(federation.config)
    return RunFolder.open(settings.out, config, resume=True).finished(config)


def open_folder(
    federation: Federation, settings: PeerSettings, own_loop: bool = False
) -> tuple[RunFolder, dict[str, str]]:
    """The run folder, new or taken up again, and the hashes of what is read.

    A write that was cut off is cleared away.

    Raises:
        ValueError: It was made by another config, or with other rows or files.
    """
    config = settings.apply(federation.config)
    for partial in settings.out.glob("*.partial"):
        partial.unlink()
    folder = RunFolder.open(settings.out, config, resume=True)
    read = fingerprints(config, own_task(federation, settings, own_loop))
    folder.check(lambda: read)
    return folder, read


def what_was_read(federation: Federation, job: Job, read: Mapping[str, str]) -> dict[str, str]:
    """Hashes of what all peers must have read alike.

    Args:
        federation: As its file has it.
        job: The prepared run.
        read: What this peer read -> a hash of it.
    """
    names = [*FILES.keys() - {"backbone"}]
    if federation.config.task not in ("file", "chat"):  # else peers may have rows of their own
        names += ["training rows", "test rows"]
    common = {name: read[name] for name in names if name in read}
    return common | of_model(job.backbone)


def as_read(federation: Federation, settings: PeerSettings) -> Federation:
    """The federation with `what_was_read`, before a run: reads it all, and loads the model."""
    config = settings.apply(federation.config)
    load_plugins(config.plugin)
    read = fingerprints(config, own_task(federation, settings))
    read = what_was_read(federation, prepare_peer(federation, settings), read)
    return dataclasses.replace(federation, read=read)


def noise_of(folder: RunFolder, config: Config) -> Noise:
    """The noise of a peer: from a key of its own, made when its folder is begun, kept for restarts.

    A key that was cut off while it was written has not been used yet.

    Raises:
        ValueError: The key is gone, and rounds were done with it.
    """
    if config.dp_clip is None:
        return seeded_noise(config.seed)
    path = folder.path / "noise.key"
    if not path.exists() or path.stat().st_size != KEY_BYTES:
        if folder.checkpoint_file.exists():
            raise ValueError(
                f"{path} is not there any more, or cut short, and rounds were done with its noise: "
                "with another key what is sent again would tell more than it may. Put it back, or "
                f"move {folder.path} away to begin anew; what was sent so far comes on top of the "
                "epsilon that the new folder will name."
            )
        path.unlink(missing_ok=True)
        write_secret(path, secrets.token_bytes(KEY_BYTES))
    return secret_noise(path.read_bytes())


def take_up(folder: RunFolder, stack: Stack) -> tuple[list[Event], int]:
    """Bring `stack` to the folder's checkpoint; the events up to it, and the round to do next.

    A checkpoint that can't be read, which takes a broken disk, is set aside and counts as lost.
    """
    try:
        rounds_done = folder.rounds_done
        return folder.restore(stack), rounds_done
    except (SafetensorError, KeyError) as error:
        LOG.error("%s can't be read (%s); beginning without it", folder.checkpoint_file, error)
        folder.checkpoint_file.replace(folder.checkpoint_file.with_suffix(".unreadable"))
        return folder.restore(stack), 0


def prepare_peer(federation: Federation, settings: PeerSettings, own_loop: bool = False) -> Job:
    """The run as one peer has it: with its own data, or its share of the common task."""
    own, me = own_task(federation, settings, own_loop), federation.index(settings.name)
    job = prepare(settings.apply(federation.config), settings.machine, own)
    said = dataclasses.replace(job.started, client_names=federation.names, peer=me)
    job = dataclasses.replace(job, started=said)
    return job if own is None else counting_alone(job, me)


def counting_alone(job: Job, me: int) -> Job:
    """The job of a peer with rows of its own, which knows no other's label counts: they are 0."""
    counts = job.started.label_counts
    known = [row if k == me else [0] * len(row) for k, row in enumerate(counts)]
    return dataclasses.replace(job, started=dataclasses.replace(job.started, label_counts=known))


def own_task(federation: Federation, settings: PeerSettings, own_loop: bool = False) -> Task | None:
    """The rows that a peer has of its own; None if it has its share of the common task.

    With `own_loop` they may be known to the loop alone: then the task has none.

    Raises:
        ValueError: The federation isn't one of peers with rows of their own.
    """
    config = settings.apply(federation.config)
    here = "train_file" in settings.local
    if not here and not (own_loop and config.task in ("file", "chat")):
        return None
    load = load_task if here else without_rows
    if config.task == "chat":
        return load(config)
    if federation.labels is None:
        raise ValueError(
            f"{settings.name} has rows of its own, so the federation must name the classes "
            'for all: put labels = ["...", "..."] at the top of federation.toml.'
        )
    if config.task != "file":
        raise ValueError(
            f"{settings.name} has a train_file of its own, and the task is {config.task}; put "
            'task = "file", or "chat" for a language model, under [run] of federation.toml.'
        )
    return load(config, federation.labels)


def neighbours_of(turn: Callable[[int], Turn], rounds: int) -> frozenset[int]:
    """Whoever a peer exchanges messages with in some round; of very many the first decide."""
    turns = [turn(t) for t in range(min(rounds, MOST_TURNS))]
    return frozenset(peer for one in turns for peer in (*one.hears, *one.heard_by))


def voters_of(
    members: Callable[[int], Sequence[Member]], me: int
) -> Callable[[int], frozenset[int]]:
    """Round -> the other members that have come as far: those of the round before it."""

    def voters(round_: int) -> frozenset[int]:
        before = max(0, round_ - 1)
        took_part = (k for k, one in enumerate(members(before)) if one.takes_part(before))
        return frozenset(took_part) - {me}

    return voters


def changes(before: Roster, after: Roster, source: str) -> str:
    """What a new list of members changes, in words.

    Args:
        before: The list that it follows.
        after: The new one.
        source: Who brought it.
    """
    old = {peer.name: peer for peer in before.peers}
    said = [f"{peer.name} joins" for peer in after.peers if peer.name not in old]
    said += [
        f"{peer.name} leaves"
        for peer in after.peers
        if peer.leaves is not None and old.get(peer.name) and old[peer.name].leaves is None
    ]
    what = ", ".join(said) or "addresses change"
    return f"version {after.version} from {source}: {what}, from round {after.from_round} on"


def state_of(job: Job, turn: Callable[[int], Turn], round_: int) -> tuple[str, str]:
    """What a state after so many rounds says of itself: (active, factors)."""
    return turn(max(0, round_ - 1)).active, slots_name(job.travelled(round_))


def some_rest(job: Job) -> bool:
    """Whether there are rounds in which a client neither trains nor waits, as in a walk."""
    turns = range(min(job.config.rounds, MOST_TURNS))
    clients = range(job.config.clients)
    return not all(job.method.at(round_, client) for round_ in turns for client in clients)


def patient(limits: Limits, job: Job) -> Limits:
    """The limits; one that rests is ahead at once, and waits there while others do the rounds."""
    if not some_rest(job):
        return limits
    rounds = job.config.rounds
    return dataclasses.replace(
        limits,
        keep_rounds=rounds,
        round_timeout_s=rounds * limits.round_timeout_s,
        linger_s=rounds * limits.round_timeout_s + limits.linger_s,
    )


def check_sizes(job: Job, limits: Limits) -> None:
    """Refuse a run whose messages nobody would take.

    Raises:
        ValueError: With both sizes.
    """
    template = template_of(job.backbone.layout, job.travels)
    most = len(template.head) + template.values_bytes
    if most > limits.max_message_bytes:
        raise ValueError(
            f"A message of this run has up to {most} bytes, and max_message_bytes is "
            f"{limits.max_message_bytes}: nobody would take it. Raise max_message_bytes under "
            "[limits] of federation.toml at every peer, or lower the rank."
        )
