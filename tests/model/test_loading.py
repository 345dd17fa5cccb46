"""Loading a backbone from a folder, and an adapter onto a base that someone else loaded."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import plait
from conftest import WORDS, save_encoder, tiny_model, tiny_tokenizer
from plait.config import Config
from plait.data.tokens import tokenize
from plait.engines.job import prepare
from plait.lora import initial_stack
from plait.machine.devices import resolve_device
from plait.model.backbone import Backbone
from plait.model.heads import MeanPooledClassifier
from plait.model.loading import load_model
from plait.model.peft_adapters import save_adapter
from twin import all_logits, twin_logits

ARCHITECTURES = ("bert", "roberta", "electra", "distilbert", "deberta-v2")


def some_tokens(tokenizer):
    rng = np.random.default_rng(0)
    texts = [(" ".join(rng.choice(WORDS, size=rng.integers(2, 9))),) for _ in range(12)]
    return tokenize(texts, rng.integers(0, 3, 12), tokenizer, 16)


def trained_row(backbone, seed=0):
    """One client's state, as if it had been trained."""
    stack = initial_stack(backbone.layout, backbone.head_start, 1, seed, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    return {
        factor: value + 0.1 * torch.randn(value.shape, generator=generator)
        for factor, value in stack.factors.items()
    }


@pytest.mark.parametrize("head", ["frozen", "mixed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_loads_onto_a_base_from_anywhere(architecture, head, tmp_path):
    folder = save_encoder(architecture, tmp_path / "model")
    config = Config(backbone=str(folder), head=head, rank=2, seed=5)
    loaded = load_model(config, 3)
    assert loaded.fresh, "an encoder alone has no classifier"
    backbone = Backbone(loaded, config)
    row = trained_row(backbone)
    save_adapter(backbone, {f: v[0] for f, v in row.items()}, config, tmp_path / "adapter")

    torch.manual_seed(1234)  # elsewhere, what the checkpoint lacks is drawn differently
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()

    tokens = some_tokens(loaded.tokenizer)
    with torch.no_grad():
        expected = twin_logits(model, tokens, np.arange(len(tokens)))
    logits = all_logits(backbone, row, tokens)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert logits.std() > 1e-5


def test_the_hash_of_weights_is_of_those_in_the_checkpoint_in_any_precision(tmp_path):
    config = Config(backbone=str(save_encoder("bert", tmp_path / "model")))
    loaded = load_model(config, 3)
    other_head = load_model(dataclasses.replace(config, seed=1), 2)
    assert Backbone(other_head, dataclasses.replace(config, dtype="bfloat16")).weights_hash == (
        loaded.weights_hash
    )
    before = loaded.weights_hash
    with torch.no_grad():  # one entry, the last of many
        words = loaded.model.bert.embeddings.word_embeddings.weight
        words[-1, -1] += 0.1
    assert words.numel() > 1024
    assert loaded.weights_hash != before


def test_a_sentence_encoder_is_mean_pooled_unless_asked_otherwise(tmp_path):
    folder = str(save_encoder("mean-pooled", tmp_path))
    assert isinstance(load_model(Config(backbone=folder), 3).model, MeanPooledClassifier)
    own = load_model(Config(backbone=folder, pooling="model"), 3).model
    assert not isinstance(own, MeanPooledClassifier)
    bert = str(save_encoder("bert", tmp_path / "bert"))
    assert not isinstance(load_model(Config(backbone=bert), 3).model, MeanPooledClassifier)
    forced = load_model(Config(backbone=bert, pooling="mean"), 3).model
    assert isinstance(forced, MeanPooledClassifier)


def test_fresh_weights_come_from_the_seed_and_leave_the_global_stream_alone(tmp_path):
    folder = str(save_encoder("bert", tmp_path))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    heads = [
        load_model(Config(backbone=folder, seed=seed), 3).model.classifier.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_on_own_data_and_model_gives_an_adapter_that_load_base_carries(tmp_path):
    folder = save_encoder("mean-pooled", tmp_path / "model")
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"question": " ".join(rng.choice(WORDS, 5)), "kind": kind})
        for kind in ["x", "y"] * 40
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:60]))
    (tmp_path / "dev.jsonl").write_text("\n".join(lines[60:]))
    config = Config(
        task="file", train_file=str(tmp_path / "train.jsonl"),
        dev_file=str(tmp_path / "dev.jsonl"), text_columns="question", label_column="kind",
        backbone=str(folder), label_skew="iid", clients=3, rounds=2, local_steps=1,
        batch_size=4, rank=2, topology="ring",
    )  # fmt: skip
    *_, last = plait.Run(config, tmp_path / "run")

    base = plait.load_base(tmp_path / "run")
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapters" / "client-1").eval()

    loaded = load_model(config, 2)
    texts = [(json.loads(line)["question"],) for line in lines[60:]]
    labels = np.array([0, 1] * 10)
    tokens = tokenize(texts, labels, loaded.tokenizer, 128)
    with torch.no_grad():
        answers = twin_logits(model, tokens, np.arange(len(tokens))).argmax(dim=1).numpy()
    assert (answers == labels).mean() == pytest.approx(last.scores[1])


def test_what_cannot_be_loaded_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no model folder"):
        load_model(Config(backbone="./nowhere"), 2)
    with pytest.raises(ValueError, match="can't be loaded"):
        load_model(Config(backbone=str(tmp_path)), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no cuda device"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="is not a run folder"):
        plait.load_base(tmp_path)


def test_targets_that_match_nothing_are_said(tmp_path):
    loaded = load_model(Config(backbone=str(save_encoder("bert", tmp_path))), 2)
    with pytest.raises(ValueError, match=r"No linear layer .* named \['q_proj'\]"):
        Backbone(loaded, Config(target_modules="q_proj"))
    loaded.model.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match="name its linear layers with --target-modules"):
        Backbone(loaded, Config())


@pytest.mark.parametrize(("architecture", "shared"), [("mean-pooled", True), ("bert", False)])
def test_runs_share_a_model_unless_its_head_is_drawn_from_their_seed(
    tmp_path, architecture, shared
):
    folder = str(save_encoder(architecture, tmp_path / "model"))
    config = Config(task="movies", backbone=folder, clients=2, max_length=8, label_skew="iid")
    first = prepare(config)
    other = prepare(dataclasses.replace(config, seed=1))
    assert (first.backbone is other.backbone) == shared
    tuning = prepare(dataclasses.replace(config, seed=1, eval_split="validation"))
    assert tuning.backbone is other.backbone
    assert len(tuning.held_out) == len(tuning.task.validation)
    assert len(prepare(config).held_out) == len(tuning.task.test)


def finished(tmp_path, names):
    """A tiny finished classifier whose outputs have these names."""
    model = tiny_model("bert", len(names))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: k for k, name in enumerate(names)}
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return model, Config(backbone=str(tmp_path / "model"))


def test_outputs_are_matched_by_name(tmp_path):
    model, config = finished(tmp_path, ["tool", "Fruit", "pet"])
    loaded = load_model(config, 3, ("fruit", "pet", "tool"))
    assert torch.equal(loaded.model.classifier.weight, model.classifier.weight[[1, 2, 0]])
    assert torch.equal(loaded.model.classifier.bias, model.classifier.bias[[1, 2, 0]])


NUMBERED = tuple(sorted(f"LABEL_{k}" for k in range(12)))  # as words: 0, 1, 10, 11, 2, ...


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ([f"LABEL_{k}" for k in range(12)], NUMBERED),
        (["Not-Entailment", "ENTAILMENT"], ("entailment", "not_entailment")),
        (["not  entailment", "entailment"], ("entailment", "not_entailment")),
        ([str(k) for k in range(12)], tuple(map(str, range(12)))),
    ],
)
def test_outputs_are_matched_however_names_are_written(tmp_path, theirs, ours):
    model, config = finished(tmp_path, theirs)
    plain = ["_".join(name.lower().replace("-", " ").split()) for name in theirs]
    order = [plain.index(name.lower()) for name in ours]
    found = load_model(config, len(ours), ours).model.classifier.weight
    assert torch.equal(found, model.classifier.weight[order])


def test_outputs_without_names_stay_as_they_are(tmp_path):
    model, config = finished(tmp_path, ["LABEL_0", "LABEL_1", "LABEL_2"])
    loaded = load_model(config, 3, ("fruit", "pet", "tool"))
    assert torch.equal(loaded.model.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("ours", [("a", "b", "c"), ("tool", "fruit"), ()])
def test_other_classes_get_a_new_output_layer_and_a_line(ours, tmp_path, caplog):
    model, config = finished(tmp_path, ["tool", "fruit", "pet"])
    loaded = load_model(config, len(ours) or 1, ours)
    assert len(loaded.model.classifier.weight) == (len(ours) or 1)
    assert not torch.equal(loaded.model.classifier.weight[0], model.classifier.weight[0])
    assert "output layer is drawn anew" in caplog.text


def _cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _with(**settings):
    def change(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def _without(part):
    def change(file):
        tensors = {name: x for name, x in load_file(file).items() if part not in name}
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def _nan(file):
    tensors = load_file(file)
    tensors["encoder.layer.1.output.dense.weight"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})


def _pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")


CODE = {"AutoModelForSequenceClassification": "mine.Model", "AutoConfig": "mine.Config"}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("model.safetensors", _cut, "model.*can't be loaded"),
        ("config.json", _cut, "model.*can't be loaded"),
        ("tokenizer.json", _cut, "model.*can't be loaded"),
        ("config.json", _with(num_hidden_layers=3), "is torn"),
        ("config.json", _with(vocab_size=98), "is torn: .*word_embeddings"),
        ("config.json", _with(model_type="mine", auto_map=CODE), "can't be loaded.*custom code"),
        ("model.safetensors", _without("word_embeddings"), "is torn: .*word_embeddings"),
        ("model.safetensors", _without("embeddings.LayerNorm"), "is torn: .*embeddings.LayerNorm"),
        ("model.safetensors", _pointer, "Git LFS in the place of model.safetensors: run `git lfs"),
        ("tokenizer.json", _pointer, "Git LFS in the place of tokenizer.json"),
    ],
)
def test_a_torn_folder_is_said_in_a_line(name, change, said, tmp_path):
    folder = save_encoder("bert", tmp_path / "model")
    change(folder / name)
    with pytest.raises(ValueError, match=said) as error:
        load_model(Config(backbone=str(folder)), 2)
    assert "\n" not in str(error.value)


def test_settings_of_old_checkpoints_do_not_matter(tmp_path):
    folder = save_encoder("bert", tmp_path / "model")
    _with(return_dict=False, output_hidden_states=True)(folder / "config.json")
    config = Config(backbone=str(folder))
    assert type(Backbone(load_model(config, 2), config).encoder).__name__ == "PackedEncoder"
    _without("pooler")(folder / "model.safetensors")
    assert "bert.pooler.dense" in load_model(config, 2).fresh, "as many have none"
    _nan(folder / "model.safetensors")
    with pytest.raises(ValueError, match="its answers aren't finite numbers"):
        Backbone(load_model(config, 2), config)


@pytest.mark.parametrize("left", [None, '{"tokenizer_class": "BertTokenizer"}'])
def test_a_folder_without_tokenizer_is_said(left, tmp_path):
    folder = save_encoder("bert", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if left:
        (folder / "tokenizer_config.json").write_text(left)
        (folder / "vocab.txt").write_text("")
    with pytest.raises(ValueError, match=r"model.*(tokenizer|vocab)"):
        load_model(Config(backbone=str(folder)), 2)


def test_an_adapter_given_as_backbone_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "roberta-base"}')
    with pytest.raises(ValueError, match="--backbone roberta-base"):
        load_model(Config(backbone=str(tmp_path)), 2)


def test_tokens_that_the_model_does_not_know_are_said(tmp_path):
    loaded = load_model(Config(backbone=str(save_encoder("bert", tmp_path))), 2)
    backbone = Backbone(loaded, Config())
    known = some_tokens(loaded.tokenizer)
    backbone.check(known)
    with pytest.raises(ValueError, match="embeddings for 99 only"):
        backbone.check(dataclasses.replace(known, ids=known.ids + 90))
    with pytest.raises(ValueError, match="knows no word"):
        backbone.check(tokenize([("x y",), ("z",)], np.zeros(2, int), loaded.tokenizer, 16))
