"""A run is of what it read: it isn't resumed, or shown again, after that has changed."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers.normalizers import Lowercase

from conftest import CHATML, chat_tokenizer, tiny_job, tiny_tokenizer
from plait.config import Config
from plait.data.objectives import CLASSIFICATION, LANGUAGE
from plait.data.tasks import Rows, Task
from plait.engines.fingerprints import FILES, SMALL_BYTES, of_file, of_model, of_rows
from plait.events import RoundDone
from plait.runs.made_by import PACKAGES
from plait.runs.run import Run
from plait.runs.run_folder import load_fingerprints

CONFIG = Config(
    task="file", topology="file", clients=3, rounds=4, local_steps=1, batch_size=2, rank=2,
    eval_every=4,
)  # fmt: skip


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """A run that reads rows, mixtures and edges."""
    monkeypatch.setattr("plait.runs.run.prepare", tiny_job)
    write = {
        "train.csv": rows("train", ("fruit", "tool")),
        "dev.csv": rows("dev", ("tool", "fruit")),
        "mixtures.json": "[[1, 1], [1, 1], [1, 1]]",
        "edges.txt": "0 1\n1 2\n",
        "mine.py": "STEP = 1",
    }
    for name, text in write.items():
        (tmp_path / name).write_text(text)
    files = {"train_file": "train.csv", "dev_file": "dev.csv", "label_skew": "mixtures.json",
             "edges_file": "edges.txt", "plugin": "mine.py"}  # fmt: skip
    places = {setting: str(tmp_path / name) for setting, name in files.items()}
    return dataclasses.replace(CONFIG, **places)


def rows(split: str, labels: tuple[str, str]) -> str:
    lines = [f"{labels[k % 2]} number {k} of {split},{labels[k % 2]}" for k in range(40)]
    return "\n".join(["text,label", *lines])


def interrupted(config: Config, out) -> None:
    for event in Run(config, out):
        if isinstance(event, RoundDone) and event.round == 1:
            return


CHANGES = {
    "train.csv": (rows("train", ("tool", "fruit")), "training rows"),
    "dev.csv": (rows("dev", ("fruit", "tool")), "test rows"),
    "mixtures.json": ("[[1, 9], [9, 1], [1, 1]]", "label mixtures"),
    "edges.txt": ("0 1\n0 2\n", "edges"),
    "mine.py": ("STEP = 2", "plugins"),
}


@pytest.mark.parametrize("file", CHANGES)
@pytest.mark.parametrize("carry_out", [interrupted, lambda config, out: list(Run(config, out))])
def test_a_run_is_not_resumed_with_other_files(config, tmp_path, monkeypatch, file, carry_out):
    carry_out(config, tmp_path / "run")
    text, named = CHANGES[file]
    (tmp_path / file).write_text(text)
    monkeypatch.setattr("plait.runs.run.prepare", None)  # nothing is computed
    with pytest.raises(ValueError, match=rf"have changed: .*{named}.*take another --out"):
        list(Run(config, tmp_path / "run", resume=True))


def test_the_same_rows_in_the_same_files_are_gone_on_with(config, tmp_path):
    interrupted(config, tmp_path / "run")
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text)
    events = list(Run(config, tmp_path / "run", resume=True))
    assert sum(isinstance(event, RoundDone) for event in events) == 4


def test_the_folder_of_an_older_plait_is_gone_on_with(config, tmp_path):
    interrupted(config, tmp_path / "run")
    (tmp_path / "run" / "fingerprints.json").unlink()
    (tmp_path / "edges.txt").write_text("0 1\n0 2\n")
    list(Run(config, tmp_path / "run", resume=True))
    assert load_fingerprints(tmp_path / "run")["edges"]


def test_the_folder_says_what_computed_it(config, tmp_path):
    list(Run(config, tmp_path / "run"))
    facts = json.loads((tmp_path / "run" / "made-by.json").read_text())
    assert {"version", "python", "processor", "device", "threads", *PACKAGES} <= facts.keys()


def test_keys_texts_and_shares_count():
    one = Rows((("a",), ("b",)), np.array([0, 1]), ("x", "y"))
    task = Task("t", one, one, one, ("no", "yes"), "accuracy")
    shares = [np.array([0]), np.array([1])]
    before = of_rows(task, shares)
    for other in (
        Rows((("ab",), ("",)), one.labels, one.keys),
        Rows(one.texts, one.labels[::-1], one.keys),
        Rows(one.texts, one.labels, ("xy", "")),
    ):
        now = of_rows(dataclasses.replace(task, train=other), shares)
        assert [name for name in now if now[name] != before[name]] == ["training rows"]
    assert of_rows(task, shares[::-1])["clients' shares"] != before["clients' shares"]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("tokenizer.json", True), ("vocab.txt", True), ("model-00001-of-00002.safetensors", True),
        ("chat_template.jinja", True), ("spiece.model", True), ("README.md", False),
    ],
)  # fmt: skip
def test_of_a_backbone_whatever_is_read_counts(tmp_path, name, counts):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("one")
    config = Config(backbone=str(tmp_path))
    before = FILES["backbone"](config)
    (tmp_path / name).write_text("two")
    assert (FILES["backbone"](config) != before) == counts


def test_of_a_large_file_blocks_are_hashed(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(SMALL_BYTES + 1000))
    before = of_file(file)
    assert of_file(file) == before
    file.write_bytes(bytes(SMALL_BYTES) + b"\x01" * 1000)
    assert of_file(file) != before


@pytest.mark.parametrize("older", [False, True])
def test_a_finished_folder_stays_as_it_is(config, tmp_path, older):
    list(Run(config, tmp_path / "run"))
    if older:
        (tmp_path / "run" / "checkpoint.safetensors").unlink()
        (tmp_path / "run" / "fingerprints.json").unlink()
    before = contents(tmp_path / "run")
    list(Run(config, tmp_path / "run", resume=True))
    assert contents(tmp_path / "run") == before


def test_a_finished_run_whose_state_cant_be_read_does_not_go_further(config, tmp_path):
    list(Run(config, tmp_path / "run"))
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"\x00" * 100)
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="without its last state"):
        Run(dataclasses.replace(config, rounds=6), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


def contents(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_hashes(weights="w", objective=LANGUAGE, tokenizer=None, **settings):
    backbone = SimpleNamespace(
        weights_hash=weights, objective=objective, tokenizer=tokenizer or chat_tokenizer(**settings)
    )
    return of_model(backbone)


def lowercasing():
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({}, set()),
        ({"weights": "v"}, {"weights_hash"}),
        ({"eos": "<|end|>"}, {"tokenizer_hash"}),
        ({"tokenizer": lowercasing()}, {"tokenizer_hash"}),
        ({"template": None}, {"chat_template_hash"}),
        ({"template": CHATML + " "}, {"chat_template_hash"}),
    ],
)
def test_weights_tokenizer_and_template_have_a_hash_each(change, differing):
    ours, theirs = model_hashes(), model_hashes(**change)
    assert {name for name in ours if ours[name] != theirs[name]} == differing


def test_a_classifier_has_no_template():
    found = model_hashes(objective=CLASSIFICATION, tokenizer=tiny_tokenizer())
    assert found.keys() == {"weights_hash", "tokenizer_hash"}
