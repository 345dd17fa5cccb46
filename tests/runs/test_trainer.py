"""One's own model and data sets: the same rounds, the same events, adapters for the same model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import plait
from conftest import (
    WORDS,
    chat_tokenizer,
    random_tokens,
    save_language_model,
    tiny_job,
    tiny_model,
    tiny_tokenizer,
)
from plait.config import Config, Machine
from plait.data.tokens import tokenize
from plait.engines.simulate import simulate
from plait.events import Evaluated, RoundDone
from plait.runs.run_folder import load_run
from plait.runs.trained import find
from twin import all_logits, twin_logits

CONFIG = Config(
    topology="ring", rounds=2, local_steps=2, batch_size=3, rank=2, switch_every=1, lr=1e-2,
    label_skew="iid", eval_every=1,
)  # fmt: skip


def texts(count: int, seed: int = 0) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    return [
        {"text": " ".join(rng.choice(WORDS, size=5)), "label": int(rng.integers(3))}
        for _ in range(count)
    ]


def tokenised(tokens, texts_) -> list[dict[str, object]]:
    """Rows as a padding collator leaves them."""
    rows = []
    for i in texts_:
        ids = tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist()
        pad = 20 - len(ids)
        rows.append(
            {
                "input_ids": torch.tensor(ids + [0] * pad),
                "attention_mask": torch.tensor([1] * len(ids) + [0] * pad),
                "labels": torch.tensor(int(tokens.labels[i])),
            }
        )
    return rows


def trainer_of(**changes) -> plait.Trainer:
    given = {
        "model": tiny_model("bert"),
        "tokenizer": tiny_tokenizer(),
        "train_dataset": [texts(6, 1), texts(9, 2), texts(7, 3)],
        "eval_dataset": texts(10, 4),
        "config": CONFIG,
    }
    return plait.Trainer(**{**given, **changes})


def without_times(event):
    return {key: x for key, x in vars(event).items() if not key.endswith("seconds")}


def test_the_rounds_are_those_of_the_engine():
    tokens = random_tokens()
    job = tiny_job(Config(**CONFIG.to_json() | {"clients": 3}))
    expected = list(simulate(job, job.initial_stack()))
    hands = [tokenised(tokens, share) for share in job.shares]
    trainer = trainer_of(
        tokenizer=None, train_dataset=hands, eval_dataset=tokenised(tokens, range(20))
    )
    for mine, theirs in zip(list(trainer)[1:], expected[1:], strict=True):
        assert without_times(mine) == without_times(theirs)


@pytest.mark.parametrize("head", ["frozen", "mixed"])
def test_a_run_folder_and_adapters_for_ones_own_model(tmp_path, head):
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(
        model=model, config=dataclasses.replace(CONFIG, head=head), out=tmp_path / "run"
    )
    events = list(trainer)
    config, recorded, summary = load_run(tmp_path / "run")
    assert (config, recorded, summary) == (trainer.config, events, trainer.summary)
    assert (config.clients, config.task, summary["clients"]) == (3, "own", 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())

    adapted = PeftModel.from_pretrained(model, tmp_path / "run" / "adapters" / "client-1").eval()
    job = trainer.job
    stack = job.initial_stack()
    list(simulate(job, stack))
    row = {factor: value[1:2] for factor, value in stack.factors.items()}
    mine = all_logits(job.backbone, row, job.held_out)[0]
    for one in (adapted, trainer.model(1)):
        with torch.no_grad():
            theirs = twin_logits(one, job.held_out, np.arange(len(job.held_out)))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_without_a_folder_a_model_is_made_all_the_same_and_ones_own_stays_as_it_is():
    model = tiny_model("bert")
    trainer = trainer_of(model=model)
    for event in trainer:
        del event
    made = trainer.model("mean")
    rows = np.arange(len(trainer.job.held_out))
    with torch.no_grad():
        adapted, base = (twin_logits(x, trainer.job.held_out, rows) for x in (made, model.eval()))
    assert not torch.equal(adapted, base)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_run_in_memory_can_be_saved(tmp_path):
    trainer = trainer_of()
    events = list(trainer)
    trainer.save(tmp_path / "run")
    assert load_run(tmp_path / "run") == (trainer.config, events, trainer.summary)


def test_an_interrupted_run_goes_on(tmp_path):
    often = {"out": tmp_path / "run", "machine": Machine(save_every=1)}
    whole = list(trainer_of())
    for event in trainer_of(**often):
        if isinstance(event, Evaluated) and event.round == 0:
            break
    resumed = list(trainer_of(**often, resume=True))
    assert [without_times(x) for x in resumed if isinstance(x, RoundDone)] == [
        without_times(x) for x in whole if isinstance(x, RoundDone)
    ]
    again = trainer_of(**often, resume=True)
    assert list(again) == resumed
    adapter = load_file(tmp_path / "run" / "adapters" / "client-0" / "adapter_model.safetensors")
    found = {
        name.replace(".default", ""): value
        for name, value in again.model(0).named_parameters()
        if "lora" in name
    }
    assert found.keys() == {name for name in adapter if "lora" in name}
    assert all(torch.equal(found[name], adapter[name]) for name in found)


def test_scores_are_a_regression():
    rows = [{"text": row["text"], "label": 0.1 * i} for i, row in enumerate(texts(8))]
    trainer = trainer_of(
        model=tiny_model("bert", 1), train_dataset=[rows[:4], rows[4:]], eval_dataset=rows
    )
    assert trainer.job.started.metric == "pearson"
    assert trainer.job.held_out.labels.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": nn.Linear(2, 2)}, "The model is a Linear"),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"train_dataset": texts(4)}, "one data set, of one row or more, for each client"),
        ({"train_dataset": [texts(4), []]}, "The data set of client 1"),
        ({"tokenizer": None}, "give the model's tokenizer"),
        ({"train_dataset": [[{"text": "a", "label": 3}]]}, "from 0 to 2, .* there is 3"),
        ({"train_dataset": [[{"text": "a", "label": "x"}]]}, "there is 'x'"),
        ({"train_dataset": [[{"text": "a", "label": [1, 0]}]]}, "client 0 have 2 labels each"),
        ({"train_dataset": [[{"text": ["a", "b"], "label": 1}]]}, "client 0 have list as text"),
        ({"train_dataset": [[{"text": None, "label": 1}]]}, "client 0 have NoneType as text"),
        (
            {"model": tiny_model("bert", 1), "train_dataset": [[{"text": "a", "label": None}]]},
            "of client 0 must be numbers; there is None",
        ),
        (
            {"model": tiny_model("bert", 1), "eval_dataset": [{"text": "a", "label": math.nan}]},
            "of eval_dataset must be numbers; there is nan",
        ),
        ({"train_dataset": [[{"text": "a"}]]}, "have no 'label', only text"),
        ({"eval_dataset": [{"film": "a", "label": 1}]}, "rows of eval_dataset have no 'text'"),
        ({"metric": "acuracy"}, "Unknown metric 'acuracy'"),
    ],
)
def test_what_cannot_be_trained_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(**changes)


def test_its_models_are_asked_with_its_tokenizer(tmp_path):
    trainer = trainer_of(out=tmp_path / "run")
    list(trainer)
    rows = [("the film was good",), ("bad",)]
    tokens = tokenize(rows, np.zeros(2, dtype=np.int64), tiny_tokenizer(), CONFIG.most_tokens)
    with torch.no_grad():
        expected = twin_logits(trainer.model(1), tokens, np.arange(2)).softmax(dim=1)
    answers = trainer.predict([text for (text,) in rows], client=1)
    found = [list(one.probabilities.values()) for one in answers]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert list(answers[0].probabilities) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    card = find(tmp_path / "run").card
    assert (card.pooling, card.label_names) == ("model", tuple(answers[0].probabilities))


# -- language models


def said(count: int, seed: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    asked = (" ".join(rng.choice(WORDS, size=4)) for _ in range(count))
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
        for text in asked
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_language_model(tmp_path_factory.mktemp("llama"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    return folder, {"model": model, "tokenizer": chat_tokenizer()}


def test_a_language_model_learns_from_rows_as_in_a_chat_task(tmp_path, llama, monkeypatch):
    folder, given = llama
    hands, held_out = [said(6, 1), said(9, 2)], said(4, 3)
    rows = [row | {"client": name} for name, hand in zip("ab", hands, strict=True) for row in hand]
    for name, some in (("train", rows), ("dev", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    trainer = trainer_of(**given, train_dataset=hands, eval_dataset=held_out, out=tmp_path / "run")
    events = list(trainer)
    chat = dataclasses.replace(
        CONFIG, task="chat", train_file=str(tmp_path / "train.jsonl"), clients=2,
        dev_file=str(tmp_path / "dev.jsonl"), key_column="client", label_skew="key",
        backbone=str(folder), pooling="model",
    )  # fmt: skip
    monkeypatch.setattr("plait.data.tasks._carve", lambda train, dev: (train, dev))
    expected = list(plait.Run(chat))
    assert [*map(without_times, events)][1:] == [*map(without_times, expected)][1:]
    assert trainer.config.max_length == chat.most_tokens == 1024
    assert isinstance(trainer.predict(["good?"])[0], str)
    assert load_run(tmp_path / "run")[0] == trainer.config


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2]}, "eval_dataset has no row .* Its columns are 'input_ids'"),
        ({"messages": said(1, 0)[0]["messages"][:1]}, "eval_dataset: 1 of 1 rows have no turn of"),
    ],
)
def test_rows_that_a_language_model_learns_nothing_from_are_refused(llama, row, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(**llama[1], train_dataset=[said(3, 0)], eval_dataset=[row])
