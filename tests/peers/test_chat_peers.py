"""Peers with rows of their own for a language model, each of another shape."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from conftest import CHATML, save_language_model
from fake_network import Hub, start_peer, together
from plait.config import Config
from plait.data.tasks import TASKS, Rows, TaskRow
from plait.engines.job import prepare
from plait.engines.simulate import simulate
from plait.events import Evaluated, RoundDone
from plait.peers.certificates import init_federation
from plait.peers.exchange import differences
from plait.peers.federation import load_federation, load_peer
from plait.peers.membership import Members
from plait.peers.process import Process, own_task, prepare_peer
from plait.runs.answers import answer
from plait.runs.run_folder import load_samples, load_summary
from plait.runs.trained import export

NAMES = ("ada", "ben", "cai")
SAYS = {"ada": "yes it is", "ben": "no", "cai": "what?"}
SHAPES = {
    "ada": lambda asked, said: {"messages": turns(asked, said)},
    "ben": lambda asked, said: {"prompt": f"{asked}\n", "completion": said},
    "cai": lambda asked, said: {"instruction": asked, "output": said},
}
CONFIG = Config(
    task="chat", topology="ring", rounds=2, switch_every=1, local_steps=2, batch_size=3, rank=2,
    lr=1e-2, lora_dropout=0.1, generate_rows=2, max_new_tokens=3, max_length=300,
)  # fmt: skip


def turns(asked, said):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def federation(tmp_path, model):
    """Makes the files of three peers, each with rows of its own."""

    def write(**settings):
        config = dataclasses.replace(CONFIG, backbone=str(model), **settings)
        file = init_federation(tmp_path / "fed", NAMES, config)
        for number, name in enumerate(NAMES):
            folder, shape = file.parent / name, SHAPES[name]
            jsonl(
                folder / "chats.jsonl",
                [shape(f"Is it {i}?", SAYS[name]) for i in range(8 + 3 * number)],
            )
            jsonl(folder / "held-out.jsonl", [SHAPES["ada"](f"Is {i}?", "yes") for i in range(4)])
            local(folder, 'train_file = "chats.jsonl"', 'dev_file = "held-out.jsonl"')
        return file

    return write


def local(folder, *lines):
    file = folder / "peer.toml"
    text = file.read_text()
    head = [] if "[local]" in text else ["[local]"]
    file.write_text("\n".join([text, *head, *lines, ""]))


def joined(tasks):
    """All peers' rows in one task, by key."""
    parts = [task.train for task in tasks]
    texts = tuple(text for part in parts for text in part.texts)
    keys = tuple(name for name, part in zip(NAMES, parts, strict=True) for _ in part.texts)
    return dataclasses.replace(
        tasks[0], name="joined", train=Rows(texts, np.zeros(len(texts), np.int64), keys)
    )


@pytest.mark.parametrize("method", ["adf", "dec-lora"])
def test_with_rows_of_their_own_they_are_the_simulation_with_these_rows_by_key(
    federation, monkeypatch, method
):
    file = federation(method=method)
    shared, settings = load_federation(file), [load_peer(file, name) for name in NAMES]
    task = joined([own_task(shared, one) for one in settings])
    monkeypatch.setitem(TASKS, "joined", TaskRow(lambda _: task, ""))
    whole = prepare(dataclasses.replace(shared.config, task="joined", label_skew="key"))
    stack = whole.initial_stack()
    expected = list(simulate(whole, stack))

    hub = Hub()
    jobs = [prepare_peer(shared, one) for one in settings]
    ours = [start_peer(hub, k, job.config, shared.peers, job=job) for k, job in enumerate(jobs)]
    said = together(ours, shared.config.rounds)

    for slot, value in stack.state.items():
        assert torch.equal(torch.cat([peer.stack.state[slot] for peer in ours]), value), slot
    assert not all(torch.equal(value[0], value[1]) for value in stack.factors.values())
    for kind, fields in ((RoundDone, ["train_losses"]), (Evaluated, ["scores", "losses"])):
        *_, last = (event for event in expected if isinstance(event, kind))
        for client, events in enumerate(said):
            *_, own = (event for event in events if isinstance(event, kind))
            assert all(getattr(own, f) == [getattr(last, f)[client]] for f in fields)


def process(file, name):
    return Process(Members(load_federation(file)), load_peer(file, name), threading.Event())


def test_another_chat_template_is_refused_and_named(federation):
    file = federation()
    other = save_language_model(file.parent / "ben" / "model")
    local(file.parent / "ben", 'backbone = "model"')
    ada, ben = process(file, "ada"), process(file, "ben")
    assert ada.members.digest(0) == ben.members.digest(0)
    (other / "chat_template.jinja").write_text(CHATML.replace("im_start", "end"))
    shutil.rmtree(file.parent / "ben" / "out")
    ben = process(file, "ben")
    digests = [one.transport.identity.config_digest(0) for one in (ada, ben)]
    assert digests[0] != digests[1]
    said = differences(ada.desk.settings, ben.desk.settings, "ben")
    assert re.fullmatch(r"chat_template_hash is '\w+' here and '\w+' at ben", said)


def test_a_peers_folder_has_its_samples_and_an_adapter_for_peft(federation, tmp_path):
    file = federation(method="local")  # it waits for nobody
    with process(file, "ben") as ben:
        assert ben.run()
    out = load_peer(file, "ben").out
    summary, samples = load_summary(out), load_samples(out)
    assert summary["metric"] == "token-accuracy"
    assert summary["perplexity_client_mean"] == pytest.approx(math.exp(summary["loss"]))
    assert {"perplexity_base", "exact_match", "exact_match_base"} <= summary.keys()
    assert [one["reference"] for one in samples] == ["yes", "yes"]
    export(out, 1, tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == load_federation(file).config.backbone
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert tokenizer.chat_template == CHATML
    written = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    prompts = [{"prompt": turns(one["prompt"], "")[:1]} for one in samples]
    assert answer(written, tokenizer, prompts, 3) == [one["after"] for one in samples]


def test_rows_that_cannot_be_read_leave_nothing_behind(federation):
    file = federation(max_length=8)
    with pytest.raises(ValueError, match="rows have a prompt of 8 tokens or more"):
        process(file, "ada")
    assert not load_peer(file, "ada").out.exists()


def test_a_peers_rows_may_be_on_the_hub(federation):
    file = federation()
    lines = (file.parent / "ada" / "peer.toml").read_text()
    (file.parent / "ada" / "peer.toml").write_text(lines.replace("chats.jsonl", "org/plays:main"))
    assert load_peer(file, "ada").local["train_file"] == "org/plays:main"
