"""One's own model and data sets: the same rounds, the same events, adapters for the same model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

import plait
from conftest import WORDS, random_tokens, tiny_job, tiny_model, tiny_tokenizer
from plait.config import Config
from plait.engines.simulate import simulate
from plait.events import Evaluated, RoundDone
from plait.runs.run_folder import load_run
from twin import all_logits, twin_logits

CONFIG = Config(
    topology="ring", rounds=2, local_steps=2, batch_size=3, rank=2, switch_every=1, lr=1e-2,
    label_skew="iid",
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
    for mine, theirs in zip(list(trainer.train())[1:], expected[1:], strict=True):
        assert without_times(mine) == without_times(theirs)


def test_a_run_folder_and_adapters_for_ones_own_model(tmp_path):
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model=model)
    events = list(trainer.train(tmp_path / "run"))
    config, recorded, summary = load_run(tmp_path / "run")
    assert (config, recorded) == (trainer.config, events)
    assert (config.clients, config.task, summary["clients"]) == (3, "own", 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())

    trainer.save_adapters(tmp_path / "adapters")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapters" / "client-1").eval()
    row = {factor: value[1:2] for factor, value in trainer.stack.factors.items()}
    job = trainer.job
    mine = all_logits(job.backbone, row, job.held_out)[0]
    with torch.no_grad():
        theirs = twin_logits(adapted, job.held_out, np.arange(len(job.held_out)))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_goes_on(tmp_path):
    config = Config(**CONFIG.to_json() | {"save_every": 1})
    whole = list(trainer_of(config=config).train())
    stopped = trainer_of(config=config).train(tmp_path / "run")
    for event in stopped:
        if isinstance(event, Evaluated) and event.round == 0:
            break
    stopped.close()
    resumed = list(trainer_of(config=config).train(tmp_path / "run", resume=True))
    assert [without_times(x) for x in resumed if isinstance(x, RoundDone)] == [
        without_times(x) for x in whole if isinstance(x, RoundDone)
    ]
    with pytest.raises(ValueError, match="holds a finished run"):
        next(trainer_of(config=config).train(tmp_path / "run", resume=True))


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
        ({"train_dataset": [[{"text": "a"}]]}, "have no 'label', only text"),
        ({"eval_dataset": [{"film": "a", "label": 1}]}, "rows of eval_dataset have no 'text'"),
        ({"metric": "acuracy"}, "Unknown metric 'acuracy'"),
    ],
)
def test_what_cannot_be_trained_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(**changes)
