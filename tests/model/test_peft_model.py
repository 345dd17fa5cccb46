"""A PEFT model of somebody's own as a client's row."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from conftest import random_tokens, tiny_causal_model, tiny_model
from plait.config import Config
from plait.data.objectives import LANGUAGE
from plait.factors import Factor
from plait.lora import cut, initial_stack
from plait.model.backbone import Backbone
from plait.model.loading import Loaded
from plait.model.peft_adapters import lora_config
from plait.model.peft_model import ClientModel
from twin import peft_client, twin_logits

CONFIG = Config(clients=2, rank=2, alpha=4.0)


def parts(head="frozen"):
    """A backbone, a state, and a copy of the model to put adapters on."""
    config = Config(clients=2, rank=2, alpha=4.0, head=head)
    model = tiny_model("bert")
    backbone = Backbone(Loaded(copy.deepcopy(model), None, ("classifier",)), config)
    stack = initial_stack(backbone.layout, backbone.head_start, 2, 0, backbone.device)
    generator = torch.Generator().manual_seed(4)
    for value in stack.factors.values():
        value += 0.05 * torch.randn(value.shape, generator=generator)
    return backbone, stack, model.requires_grad_(False), lora_config(backbone, config)


def fitting(**changed):
    backbone, _, model, settings = parts()
    for name, value in changed.items():
        setattr(settings, name, value)
    return backbone, get_peft_model(model, settings)


@pytest.mark.parametrize(
    ("head", "saved"), [("frozen", None), ("mixed", None), ("mixed", ["classifier"])]
)
def test_a_state_goes_into_the_model_and_comes_back_to_the_bit(head, saved):
    backbone, stack, model, settings = parts(head)
    settings.modules_to_save = saved
    torch.nn.init.normal_(model.classifier.weight)  # drawn elsewhere, as by whoever loads it
    ours = ClientModel(get_peft_model(model, settings).eval(), backbone)
    ours.take({factor: value[1:] for factor, value in stack.factors.items()})
    for factor, value in stack.factors.items():
        assert torch.equal(ours.row(factor), value[1:])
    rows = range(3)
    theirs = peft_client(tiny_model("bert"), backbone.layout, stack, 1, CONFIG, ["query", "value"])
    expected = twin_logits(theirs.float(), random_tokens(), rows)
    assert torch.equal(twin_logits(ours.model, random_tokens(), rows), expected)


def test_a_client_of_smaller_rank_has_a_model_of_its_own_rank():
    backbone, stack, model, _ = parts()
    config = Config(clients=2, ranks="2,1", alpha=4.0, head="frozen")
    cut(backbone.layout, stack.state, [2, 1])
    ours = ClientModel(get_peft_model(model, lora_config(backbone, config, 1)), backbone, 1)
    ours.take({factor: value[1:] for factor, value in stack.factors.items()})
    for factor, value in stack.factors.items():
        assert torch.equal(ours.row(factor), value[1:])
    with pytest.raises(ValueError, match="has rank 1"):
        ClientModel(ours.model, backbone)


def test_what_rests_takes_no_gradient_and_keeps_none():
    backbone, model = fitting()
    ours = ClientModel(model, backbone)
    for part in ours.parameters(Factor.AB):
        part.grad = torch.ones_like(part)
    ours.train(Factor.B)
    trains = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trains
    assert all("lora_B" in name for name in trains)
    assert all(part.grad is None for part in ours.parameters(Factor.AB))


def without_lora():
    backbone, _, model, _ = parts()
    return backbone, model


def on_another_base():
    backbone, model = fitting()
    model.base_model.model.bert.encoder.layer[1].output.dense.weight.data[0, 0] += 1
    return backbone, model


def in_bfloat16():
    backbone, model = fitting()
    return backbone, model.bfloat16()


def with_another_that_trains():
    backbone, model = fitting()
    model.base_model.model.bert.pooler.dense.bias.requires_grad_()
    return backbone, model


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (without_lora, r"BertForSequenceClassification, doesn't have exactly one adapter, a LoRA"),
        (lambda: fitting(r=3), r"query has rank 3 and alpha 4, in .* rank 2 and alpha 4: make"),
        (lambda: fitting(lora_alpha=8), r"query has rank 2 and alpha 8, in the federation"),
        (lambda: fitting(use_rslora=True), r"has rank 2 and alpha 5\.65"),
        (lambda: fitting(target_modules=["query"]), r"doesn't adapt bert.*value,"),
        (lambda: fitting(target_modules=["query", "value", "key"]), r"model adapts bert.*key,"),
        (lambda: fitting(modules_to_save=["classifier"]), r"classifier\.weight, .* would train"),
        (lambda: fitting(use_dora=True), r"lora_magnitude_vector.* would train"),
        (with_another_that_trains, r"bert\.pooler\.dense\.bias of the model would train"),
        (in_bfloat16, r"adapters are torch\.bfloat16"),
        (on_another_base, r"frozen weights of the model aren't those of minilm"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_the_federations_is_refused(made, said):
    backbone, model = made()
    with pytest.raises(ValueError, match=said):
        ClientModel(model, backbone)


def test_two_adapters_are_one_too_many():
    backbone, model = fitting()
    model.add_adapter("another", model.peft_config["default"])
    with pytest.raises(ValueError, match="doesn't have exactly one adapter"):
        ClientModel(model, backbone)


def test_a_language_model_with_tied_embeddings_in_half_precision_and_an_adapter_of_another_name():
    model = tiny_causal_model("llama", tie_word_embeddings=True)
    backbone = Backbone(Loaded(copy.deepcopy(model), None, ()), CONFIG, objective=LANGUAGE)
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]
    )
    peft_model = get_peft_model(model.bfloat16(), settings, adapter_name="mine")
    ours = ClientModel(peft_model, backbone)
    stack = initial_stack(backbone.layout, {}, 1, 0, backbone.device)
    ours.take(stack.factors)
    assert torch.equal(ours.row(Factor.A), stack.factors[Factor.A])
