from __future__ import annotations

import base64
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import BertProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from plait.config import THIS_MACHINE, Config, Machine
from plait.data.objectives import CLASSIFICATION, LANGUAGE
from plait.data.tasks import Rows, Task
from plait.data.tokens import Tokens
from plait.engines.job import Job, Materials, Rules, assemble
from plait.model.backbone import Backbone
from plait.model.heads import MeanPooledClassifier
from plait.model.kernels.compiled import kernels
from plait.model.loading import Loaded

# Tiny models gain nothing from a second thread, and lose much where other work wants the cores.
torch.set_num_threads(1)

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}


def tiny_model(architecture: str, num_labels: int = 3):
    """A small random model of an architecture, the same in every test."""
    torch.manual_seed(0)
    if architecture == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}
    elif architecture == "xlnet":
        sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 99}
    else:
        sizes = dict(TINY)
    if architecture == "roberta":
        sizes |= {"type_vocab_size": 1, "pad_token_id": 1}
    if architecture in ("electra", "albert"):
        sizes |= {"embedding_size": 16}
    if architecture == "modernbert":  # a window shorter than the texts
        sizes |= {"local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0}
    kind = "bert" if architecture == "mean-pooled" else architecture
    config = AutoConfig.for_model(kind, num_labels=num_labels, **sizes)
    if architecture == "mean-pooled":
        model = MeanPooledClassifier(AutoModel.from_config(config), num_labels)
        torch.nn.init.normal_(model.classifier.weight, std=0.1)
        return model
    return AutoModelForSequenceClassification.from_config(config)


def tiny_causal_model(architecture: str, **settings: Any):
    """A small random language model of an architecture, the same in every test."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(architecture, **(sizes | settings))
    return AutoModelForCausalLM.from_config(config).float()


def tiny_job(config: Config, machine: Machine = THIS_MACHINE) -> Job:
    """A prepared run on a small random BERT and random texts, whatever task the config names.

    Of a chat task, on a small random Llama.
    """
    rules = Rules.of(config)
    chat = config.task == "chat"
    tokens = asked_tokens() if chat else random_tokens()
    held_out = tokens.take(np.arange(20))
    rows, some = (Rows((("",),) * len(one), one.labels) for one in (tokens, held_out))
    objective = LANGUAGE if chat else CLASSIFICATION
    names = () if chat else ("a", "b", "c")
    task = Task("random", rows, some, some, names, objective.metric, objective)
    model = tiny_causal_model("llama") if chat else tiny_model("bert")
    backbone = Backbone(Loaded(model, None, ()), rules.config, machine, objective)
    shares = np.array_split(np.arange(len(tokens)), config.clients)
    materials = Materials(task, backbone, tokens, held_out)
    return assemble(rules, materials, shares, time.perf_counter())


@pytest.fixture
def ragged_tokens() -> Tokens:
    """Sixty texts of 3 to 20 tokens, three classes."""
    return random_tokens()


def tokens_of(lengths: Sequence[int]) -> Tokens:
    """Texts of these lengths, no two tokens alike."""
    ids = np.arange(sum(lengths), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(ids=ids, types=ids * 0, offsets=offsets, labels=np.zeros(len(lengths), np.int64))


def random_tokens() -> Tokens:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 21, 60)
    total = int(lengths.sum())
    return Tokens(
        ids=rng.integers(5, 99, total).astype(np.int32),
        types=np.zeros(total, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=rng.integers(0, 3, 60),
    )


def asked_tokens() -> Tokens:
    """The same texts for a language model, which learns a bit more than half of their tokens."""
    tokens = random_tokens()
    asked = np.random.default_rng(1).random(len(tokens.ids)) < 0.6
    asked[tokens.offsets[1:] - 2] = True
    asked[tokens.offsets[1:] - 1] = False
    return dataclasses.replace(tokens, labels=tokens.labels * 0, asked=asked)


@pytest.fixture(autouse=True)
def cpu_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere sums are rounded otherwise; test_accelerator.py names the device."""
    monkeypatch.setattr("plait.machine.devices.PREFERRED", ("cpu",))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests tokenise isn't left in the user's cache."""
    os.environ["PLAIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def compiler() -> None:
    """The test needs kernels.c compiled."""
    if kernels(torch.float32) is None:
        pytest.skip("no C compiler here")


@pytest.fixture(params=["kernels", "operators"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with the C kernels, and once as where there is no compiler."""
    _compute(request, monkeypatch)


@pytest.fixture(params=["kernels", "operators", "accelerator"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of these, and all clients at once, as on an accelerator."""
    _compute(request, monkeypatch)


def _compute(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "kernels":
        request.getfixturevalue("compiler")
    monkeypatch.setattr("plait.model.backend.fastest", lambda _device, _dtype: request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of PyTorch's threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


WORDS = [
    "the", "a", "film", "question", "is", "was", "good", "bad", "what", "who", "when", "great",
]  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words to ids, for the tiny models."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, "number"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]",
    )  # fmt: skip


def save_encoder(architecture: str, folder: Path) -> Path:
    """A tiny checkpoint of an encoder alone, as pretraining leaves it, with a tokenizer."""
    model = tiny_model(architecture)
    base = model.base if architecture == "mean-pooled" else model.base_model
    base.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if architecture == "mean-pooled":
        (folder / "modules.json").write_text("[]")
    return folder


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML, eos: str | None = "<|im_end|>"):
    """Bytes to ids, with ChatML's end of a turn, and EOS, as special tokens."""
    letters = ByteLevel.alphabet()
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    fast.chat_template = template
    return fast


def save_language_model(folder: Path) -> Path:
    """A tiny Llama that reads bytes and ChatML."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    sizes = {"num_key_value_heads": 2, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    config = AutoConfig.for_model(
        "llama", **(TINY | sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 512})
    )
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # it prefers some tokens to others
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def of_another_version(pem: bytes) -> bytes:
    """A certificate, PEM, that says it is of version 107 of X.509."""
    head, tail = pem.splitlines()[0], pem.splitlines()[-1]
    der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    changed = der.replace(bytes.fromhex("a003020102"), bytes.fromhex("a00302016a"), 1)
    assert changed != der
    return b"\n".join([head, base64.encodebytes(changed).strip(), tail, b""])
