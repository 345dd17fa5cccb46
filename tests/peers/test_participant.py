"""Training loops of one's own in a federation: the numbers of `plait peer`, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import threading
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics  # noqa: F401 - takes seconds, which are no peer's
import torch
from peft import get_peft_model
from torch.nn import functional
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from conftest import WORDS, save_encoder, tiny_job, tiny_model
from plait import join
from plait.config import Config
from plait.data.tasks import TASKS, Rows, TaskRow
from plait.engines.job import prepare
from plait.engines.local_training import batch_rows
from plait.engines.simulate import simulate
from plait.engines.steps import local_steps
from plait.events import Evaluated, RoundDone
from plait.factors import VALUE, Factor
from plait.methods import METHODS
from plait.model.peft_adapters import lora_config
from plait.model.peft_model import ClientModel
from plait.peers import json_log
from plait.peers.certificates import init_federation
from plait.peers.federation import Limits, load_federation, load_peer
from plait.peers.membership import Members
from plait.peers.participant import Participant, _hand_over
from plait.peers.process import Process, own_task
from plait.peers.round_loop import Due
from plait.peers.trainer_callback import _check_optimizer, _check_steps
from plait.runs.run_folder import load_events, load_summary
from twin import padded, twin_logits

NAMES = ("ada", "ben")
CONFIG = Config(
    task="file", topology="complete", rounds=3, switch_every=1, local_steps=2, batch_size=4,
    rank=2, lr=5e-3, head_lr=5e-3, max_length=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(json_log, "log_events", lambda _: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_encoder("mean-pooled", tmp_path_factory.mktemp("model"))


@pytest.fixture
def federation(tmp_path, model):
    """Makes the files of two peers, some with rows of their own."""

    def write(with_rows=NAMES, at="fed", **settings):
        config = dataclasses.replace(CONFIG, **({"backbone": str(model)} | settings))
        file = init_federation(
            tmp_path / at,
            NAMES,
            config,
            labels=("no", "yes"),
            limits=Limits(round_timeout_s=20, start_timeout_s=20, linger_s=5),
        )
        for number, name in enumerate(with_rows):
            folder = file.parent / name
            for part, count, seed in (("train", 12, number), ("dev", 4, 9)):
                rng = np.random.default_rng(seed)
                lines = [f"{' '.join(rng.choice(WORDS, 5))},{rng.choice(['no', 'yes'])}"
                         for _ in range(count)]  # fmt: skip
                (folder / f"{part}.csv").write_text("\n".join(["text,label", *lines]))
            with (folder / "peer.toml").open("a") as own:
                own.write('[local]\ntrain_file = "train.csv"\ndev_file = "dev.csv"\n')
        return file

    return write


def simulation(file, monkeypatch):
    """The simulation of the same peers with the same rows; its stack at the end."""
    shared = load_federation(file)
    tasks = [own_task(shared, load_peer(file, name)) for name in NAMES]
    parts = [task.train for task in tasks]
    texts = tuple(text for part in parts for text in part.texts)
    keys = tuple(name for name, part in zip(NAMES, parts, strict=True) for _ in part.texts)
    labels = np.concatenate([part.labels for part in parts])
    task = dataclasses.replace(tasks[0], name="joined", train=Rows(texts, labels, keys))
    monkeypatch.setitem(TASKS, "joined", TaskRow(lambda _: task, ""))
    job = prepare(dataclasses.replace(shared.config, task="joined", label_skew="key"))
    stack = job.initial_stack()
    return list(simulate(job, stack)), stack


def plait_steps(peer, model, round_):
    """Plait's own local steps, on what the model holds."""
    process, client = peer.process, peer._client
    stack = process.job.initial_stack([0])
    stack.state |= {(VALUE, factor): client.row(factor) for factor in stack.factors}
    turns = process.job.turns(round_.number, process.me)
    loss = local_steps(process.job, stack, round_.number, [process.me], turns)[0]
    client.take(stack.factors)
    return loss


def peft_steps(peer, model, round_):
    """A loop as anyone writes it, on the rows that `plait peer` would take."""
    job, me, config = peer.process.job, peer.process.me, peer.config
    head = peer._client.parameters(Factor.HEAD)
    groups = [
        {"params": [one for one in round_.parameters if all(one is not h for h in head)]},
        {"params": head, "lr": config.head_lr},
    ]
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=decay, fused=True)
    first, losses = round_.number * config.local_steps, []
    for texts in batch_rows(job.shares[me], me, range(first, first + config.local_steps), config):
        logits = twin_logits(model.eval(), job.train, texts)
        loss = functional.cross_entropy(logits, torch.from_numpy(job.train.labels[texts]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(round_.parameters, config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def loop(file, name, steps, made=lambda model: model, stop_after=math.inf):
    """A peer with a loop of its own, which may be cut off with a round half done."""
    with join(file, name) as peer:
        model = made(peer.model())
        for done, round_ in enumerate(peer.rounds(model)):
            loss = steps(peer, model, round_)
            if done == stop_after:
                break
            peer.mix(model, loss)
    return peer


def beside(work, *args):
    """A function in a thread of its own; `result` waits for what it returns or raises."""
    found = []

    def run():
        try:
            found.append(work(*args))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(60)
        assert found, "it hangs"
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    return result


def plait_peer(file, name):
    with Process(
        Members(load_federation(file)), load_peer(file, name), threading.Event()
    ) as process:
        assert process.run()
    return process


@pytest.mark.parametrize(
    ("steps", "tolerance"), [(plait_steps, 0), (peft_steps, 1e-5)], ids=["to the bit", "PEFT"]
)
def test_a_loop_and_a_plait_peer_are_the_simulation(federation, monkeypatch, steps, tolerance):
    """Cut off in its second round and started again, too."""
    file = federation()
    said, stack = simulation(file, monkeypatch)
    made = (lambda model: model.double()) if tolerance else (lambda model: model)
    ben = beside(plait_peer, file, "ben")
    loop(file, "ada", steps, made, stop_after=1)
    peer = loop(file, "ada", steps, made)
    for client, process in enumerate((peer.process, ben())):
        for factor, value in stack.factors.items():
            mine = process.stack.factors[factor][0]
            torch.testing.assert_close(mine, value[client], rtol=0, atol=tolerance)
    for factor in stack.factors:
        assert torch.equal(peer._client.row(factor), peer.process.stack.factors[factor])
    for client, name in enumerate(NAMES):
        events = load_events(load_peer(file, name).out)
        for kind, field in ((RoundDone, "train_losses"), (Evaluated, "losses")):
            ours, expected = ([getattr(e, field) for e in some if isinstance(e, kind)]
                              for some in (events, said))  # fmt: skip
            np.testing.assert_allclose(
                ours, [[one[client]] for one in expected], rtol=0, atol=tolerance
            )


class InOrder(Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def trained(file, name, out):
    """A trainer of transformers on the rows that `plait peer` would take."""
    with join(file, name) as peer:
        job, me, config = peer.process.job, peer.process.me, peer.config
        rows = batch_rows(job.shares[me], me, range(6), config).ravel()
        ids, types, mask = (one.tolist() for one in padded(job.train, rows, 0))
        texts = [
            {"input_ids": one, "token_type_ids": two, "attention_mask": three, "labels": label}
            for one, two, three, label in zip(
                ids, types, mask, job.train.labels[rows].tolist(), strict=True
            )
        ]
        args = TrainingArguments(
            output_dir=str(out), max_steps=6, per_device_train_batch_size=config.batch_size,
            learning_rate=config.lr, lr_scheduler_type="constant", report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, logging_steps=2,
        )  # fmt: skip
        InOrder(
            model=peer.model(), args=args, train_dataset=texts, callbacks=[peer.callback()]
        ).train()
    return peer


def idle(peer, model):
    """A neighbour that hands back what it got."""
    for _ in peer.rounds():
        peer.mix(model)


def test_a_trainer_of_transformers_does_what_the_loop_does_bit_for_bit(
    federation, tmp_path, classifier
):
    """Phases and new moments in each round included; a model without dropout."""
    peers = []
    for at, work in (
        ("one", partial(loop, steps=peft_steps)),
        ("two", partial(trained, out=tmp_path)),
    ):
        file = federation(backbone=str(classifier), at=at)
        other = join(file, "ben")  # whole, before another draws a head in this process
        ben = beside(idle, other, other.model())
        peers.append(work(file, "ada"))
        ben()
    for factor, value in peers[0].process.stack.factors.items():
        assert torch.equal(peers[1].process.stack.factors[factor], value)
        assert not torch.equal(peers[1].process.stack.factors[factor], 0 * value)
    said = [
        event.train_losses[0]
        for event in load_events(peers[1].process.folder.path)
        if isinstance(event, RoundDone)
    ]
    assert math.isnan(said[0])
    assert 0 < said[1] < 2, "what the trainer logged before"
    again = trained(file, "ada", tmp_path)
    for factor, value in peers[1].process.stack.factors.items():
        assert torch.equal(again._client.row(factor), value)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A tiny BERT without dropout."""
    folder = save_encoder("bert", tmp_path_factory.mktemp("classifier"))
    file = folder / "config.json"
    file.write_text(file.read_text().replace('_dropout_prob": 0.1', '_dropout_prob": 0.0'))
    return folder


def test_rows_that_the_loop_alone_knows(federation):
    file = federation(with_rows=["ben"], method="local")
    with join(file, "ada") as peer:
        digest = peer.process.federation.digest()
        model = peer.model()
        for round_ in peer.rounds():
            for parameter in round_.parameters:
                parameter.data.add_(round_.number + 1)
            peer.mix(model)
    out = load_peer(file, "ada").out
    summary, events = load_summary(out), load_events(out)
    assert summary["rounds_done"] == CONFIG.rounds
    assert "accuracy" not in summary
    assert "loss" not in peer.process.desk.facts
    assert not any(isinstance(event, Evaluated) for event in events)
    assert all(math.isnan(e.train_losses[0]) for e in events if isinstance(e, RoundDone))
    assert (out / "adapters" / "client-0" / "adapter_model.safetensors").is_file()
    with join(file, "ada") as peer:  # it is over: the model is the last one
        peer.model()
        assert list(peer.rounds()) == []
        assert set(peer._client.row(Factor.B).flatten().tolist()) == {1 + 2 + 3}
    ben = Process(Members(load_federation(file)), load_peer(file, "ben"), threading.Event())
    assert ben.federation.digest() == digest, "rows are nobody else's business"


def test_a_loop_that_does_not_mix_is_told(federation):
    file = federation(with_rows=[], method="local")
    with join(file, "ada") as peer:
        with pytest.raises(ValueError, match=r"There is no model: take peer\.model\(\)"):
            next(peer.rounds())
        model = peer.model()
        with pytest.raises(ValueError, match=r"mix\(model\) ends a round: call it in the loop"):
            peer.mix(model)
        rounds = peer.rounds()
        next(rounds)
        with pytest.raises(ValueError, match=r"Round 0 wasn't mixed: call peer\.mix"):
            next(rounds)
        assert next(peer.rounds()).number == 0
        old, start = peer._client.row(Factor.B), peer.model()  # another one, in the same round
        start.base_model.model.classifier.weight.data.fill_(1)
        peer._client = None
        next(peer.rounds(start))
        assert torch.equal(peer._client.row(Factor.B), old)
        assert not start.base_model.model.classifier.weight.any()
        with pytest.raises(ValueError, match="call it in the loop over rounds"):
            peer.mix(peer.process)


def test_a_method_that_sends_moments_takes_no_other_loop(federation, monkeypatch):
    row = METHODS["local"]
    sends = lambda config: dataclasses.replace(row(config), kinds=("x", "m"))  # noqa: E731
    monkeypatch.setitem(METHODS, "local", sends)
    with pytest.raises(ValueError, match="local sends what its optimizer keeps"):
        join(federation(with_rows=[], method="local"), "ada")


def test_a_method_of_turns_within_a_round_takes_no_other_loop(federation):
    with pytest.raises(ValueError, match="In la-lora factors take local steps by turns"):
        join(federation(with_rows=[], method="la-lora"), "ada")


class Skipping(ExitStack):
    """The process of a peer that does rounds 0, 1 and, as it was away for long, 5."""

    first_round, me = 0, 0

    def __init__(self, **settings):
        super().__init__()
        self.job = tiny_job(Config(clients=2, rank=2, rounds=6, switch_every=2, **settings))
        self.stack, self.peer = self.job.initial_stack([0]), SimpleNamespace(train=lambda *_: None)

    def rounds(self):
        return map(Due, (0, 1, 5))


@pytest.mark.parametrize(
    ("policy", "anew"),
    [("reset_each_round", "yyy"), ("reset_each_phase", "yny"), ("keep", "nnn")],
)
def test_moments_start_anew_where_the_peers_do(policy, anew):
    process = Skipping(optimizer_state=policy)
    peer = Participant(process, over=False)
    settings = lora_config(process.job.backbone, process.job.config)
    model = get_peft_model(tiny_model("bert").requires_grad_(False), settings)
    found = []
    for round_ in peer.rounds(model):
        optimizer = torch.optim.AdamW(round_.parameters)
        optimizer.state = dict.fromkeys(round_.parameters, "kept")
        round_.reset(optimizer)
        found.append("n" if optimizer.state else "y")
        peer.mix(model)
    assert "".join(found) == anew


@pytest.mark.parametrize(
    ("spoil", "loss", "said"),
    [
        (lambda a, b: a.data.add_(1e-6), 1.0, "A of the model has changed in round 0, in which B"),
        (lambda a, b: b.data.fill_(math.nan), 1.0, "B of the model is not finite in round 0"),
        (lambda a, b: None, math.inf, "loss of client 0 is not finite in round 0"),
    ],
)
def test_what_diverged_or_should_have_rested_is_not_handed_over(spoil, loss, said):
    job = tiny_job(Config(clients=2, rank=2, local_steps=1, batch_size=2))
    model = get_peft_model(tiny_model("bert"), lora_config(job.backbone, job.config))
    client, stack = ClientModel(model.requires_grad_(False), job.backbone), job.initial_stack([0])
    client.take(stack.factors)
    before = {slot: value.clone() for slot, value in stack.state.items()}
    spoil(client.parameters(Factor.A)[0], client.parameters(Factor.B)[0])
    with pytest.raises(ValueError, match=said):
        _hand_over(client, loss, job, stack, 0, [0], job.turns(0, 0))
    assert all(torch.equal(stack.state[slot], value) for slot, value in before.items())


def test_a_trainer_that_ends_too_early_or_lacks_a_parameter_is_refused():
    state = SimpleNamespace(max_steps=5, global_step=2)
    _check_steps(state, 3)
    with pytest.raises(ValueError, match=r"ends after 5 steps, .* pass max_steps=6"):
        _check_steps(state, 4)
    held, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.AdamW([held])
    _check_optimizer(SimpleNamespace(parameters=[held]), optimizer)
    with pytest.raises(ValueError, match="classifier must be trainable"):
        _check_optimizer(SimpleNamespace(parameters=[held, other]), optimizer)
