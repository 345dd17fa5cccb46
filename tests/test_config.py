"""Settings that follow from others."""

from __future__ import annotations

import dataclasses
import json

import pytest

from plait.config import Config
from plait.engines.job import shared_settings
from plait.runs.run_folder import RunFolder, load_config


def test_texts_are_cut_as_the_task_has_it_if_nothing_is_said():
    chat = Config(task="chat")
    assert (Config().most_tokens, chat.most_tokens) == (128, 1024)
    assert dataclasses.replace(Config(), task="chat").most_tokens == 1024
    assert Config(task="chat", max_length=128).most_tokens == 128
    assert Config().digest() == Config(max_length=128).digest() != Config(max_length=64).digest()
    assert chat.digest() == Config(task="chat", max_length=1024).digest()
    assert chat.digest() != Config(task="chat", max_length=128).digest()
    for config in (Config(), chat, Config(task="chat", max_length=128), Config(max_length=64)):
        assert Config.from_json(config.to_json()) == config


def test_a_folder_of_before_goes_on(tmp_path):
    before = Config().to_json() | {"max_length": 128}
    assert Config.from_json(before) == Config()
    (tmp_path / "config.json").write_text(json.dumps(before))
    for now in (Config(), Config(max_length=128)):
        assert RunFolder.open(tmp_path, now, resume=True).rounds_before == now.rounds


def test_what_divided_by_the_rank_is_the_scale():
    sizes = {"rank": 4, "alpha": 8.0, "clients": 25}
    found = {
        scale: Config(scale=scale, **sizes).lora_alpha / 4 for scale in ("lora", "rslora", "sfed")
    }
    assert found == {"lora": 2, "rslora": 4, "sfed": 20}  # alpha / r, / sqrt(r), sqrt(N / r)
    assert not {"scale", "gossip_step"} & Config().decisive().keys()
    for step in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="above 0, and at most 1"):
            Config(gossip_step=step)
    assert Config().digest() != Config(scale="sfed").digest()
    # One frozen model is shared by runs with any number of clients.
    assert shared_settings(Config(scale="sfed", **sizes)).lora_alpha == 80
    assert shared_settings(Config(**sizes)) == shared_settings(Config(**sizes | {"clients": 3}))


def test_the_place_of_glue_makes_no_other_run(tmp_path):
    """But its rows do, which fingerprints know; so a folder goes on where GLUE has moved."""
    here, there = (Config(task="sst2", glue_dir=place) for place in ("/here", "/there"))
    assert here.digest() == there.digest() == Config(task="sst2").digest()
    assert Config(train_file="a.csv").digest() != Config(train_file="b.csv").digest()
    RunFolder.open(tmp_path / "run", here, resume=False).create(here)
    RunFolder.open(tmp_path / "run", there, resume=True).create(there)
    assert load_config(tmp_path / "run").glue_dir == "/there"
