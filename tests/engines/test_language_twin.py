"""Language models: the stacked engine against plain transformers and PEFT, text by text.

The twin reads each text alone, one client after another, in float64.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from conftest import asked_tokens, tiny_causal_model
from plait.config import Config
from plait.data.objectives import LANGUAGE
from plait.engines.local_training import batch_rows, evaluate, local_phase
from plait.factors import Factor
from plait.lora import initial_stack
from plait.model.backbone import Backbone
from plait.model.heads import judge_in_parts, losses_in_parts
from plait.model.interface_encoder import InterfaceEncoder
from plait.model.loading import Loaded

WINDOW = {"sliding_window": 4, "head_dim": 8}  # shorter than the texts
ARCHITECTURES = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "mistral": WINDOW, "phi3": {}, "olmo2": {},
    "gemma2": WINDOW | {"attn_logit_softcapping": 0.05}, "gemma3_text": WINDOW,
    "gpt_neox": {}, "gpt2": {},
}  # fmt: skip
CONFIG = Config(
    rank=4, clients=3, local_steps=5, batch_size=4, lr=1e-3, target_modules="all-linear"
)


def setup(architecture, config=CONFIG):
    model = tiny_causal_model(architecture, **ARCHITECTURES[architecture])
    tokens = asked_tokens()
    backbone = Backbone(Loaded(copy.deepcopy(model), None, ()), config, objective=LANGUAGE)
    stack = initial_stack(backbone.layout, {}, config.clients, 0, backbone.device)
    generator = torch.Generator().manual_seed(4)
    for value in stack.factors.values():
        value += 0.05 * torch.randn(value.shape, generator=generator)
    shares = np.split(np.arange(len(tokens)), [3, 25])  # fewer than a batch, and uneven
    return model, tokens, backbone, stack, shares


def peft_client(model, layout, factors, client, config=CONFIG):
    targets = [site.name for site in layout.sites]
    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=targets,
        fan_in_fan_out=model.config.model_type == "gpt2",  # a Conv1D's weight is transposed
    )  # fmt: skip
    peft_model = get_peft_model(copy.deepcopy(model).double(), settings).eval()
    parameters = dict(peft_model.named_parameters())
    for factor in (Factor.A, Factor.B):
        for name, value in layout.views(factor, factors[factor]).items():
            parameters[_path(name, factor)].data.copy_(value[client])
    return peft_model, parameters


def _path(name, factor):
    return f"base_model.model.{name}.lora_{factor.name}.default.weight"


def judged(peft_model, tokens, texts):
    """The losses of some texts' learned tokens, and the likeliest tokens; each text read alone."""
    losses, answers = [], []
    for text in texts:
        span = slice(tokens.offsets[text], tokens.offsets[text + 1])
        ids = torch.from_numpy(tokens.ids[span].astype(np.int64))
        asked = torch.from_numpy(tokens.asked[span])
        logits = peft_model(input_ids=ids[None]).logits[0][asked]
        losses.append(functional.cross_entropy(logits, ids.roll(-1)[asked], reduction="none"))
        answers.append(logits.argmax(dim=-1))
    return torch.cat(losses), torch.cat(answers)


def twin_local_phase(model, layout, factors, train, tokens, shares):
    """Losses (N, K), and Factor -> (N, P), each client on its own."""
    losses, after = [], {factor: [] for factor in factors}
    for client, share in enumerate(shares):
        peft_model, parameters = peft_client(model, layout, factors, client)
        trained = [
            parameters[_path(site.name, factor)]
            for factor in (Factor.A, Factor.B) if factor in train for site in layout.sites
        ]  # fmt: skip
        for parameter in peft_model.parameters():
            parameter.requires_grad_(any(parameter is one for one in trained))
        optimizer = torch.optim.AdamW(trained, lr=CONFIG.lr, weight_decay=0)
        for step in range(CONFIG.local_steps):
            (texts,) = batch_rows(share, client, range(step, step + 1), CONFIG)
            loss = judged(peft_model, tokens, texts)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CONFIG.clip_norm)
            optimizer.step()
            losses.append(loss.item())
        for factor in factors:
            row = [parameters[_path(site.name, factor)].detach().flatten() for site in layout.sites]
            after[factor].append(torch.cat(row).float())
    return np.reshape(losses, (len(shares), -1)), {f: torch.stack(v) for f, v in after.items()}


def same_training(architecture, train):
    model, tokens, backbone, stack, shares = setup(architecture)
    start = {factor: value.clone() for factor, value in stack.factors.items()}
    expected, after = twin_local_phase(model, backbone.layout, start, train, tokens, shares)
    losses = local_phase(backbone, stack, train, 0, tokens, shares, range(3), CONFIG)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    for factor, value in stack.factors.items():
        torch.testing.assert_close(value, after[factor], rtol=0, atol=1e-4)
    assert isinstance(backbone.encoder, InterfaceEncoder)


@pytest.mark.parametrize("train", [Factor.A, Factor.B, Factor.AB], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_that_of_plain_peft(architecture, train):
    same_training(architecture, train)


@pytest.mark.parametrize("backend", ["operators", "accelerator", "slow"])
def test_so_it_is_on_other_machines(backend, monkeypatch):
    monkeypatch.setattr("plait.model.backend.fastest", lambda _device, _dtype: backend)
    model, tokens, backbone, stack, _ = setup("llama")
    losses, answers = evaluate(backbone, stack.factors, tokens)
    for client in range(3):
        peft_model, _ = peft_client(model, backbone.layout, stack.factors, client)
        with torch.no_grad():
            expected, likeliest = judged(peft_model, tokens, range(60))
        torch.testing.assert_close(losses[client], expected.float(), rtol=0, atol=1e-5)
        assert torch.equal(answers[client], likeliest)


def test_a_client_is_computed_alike_whoever_else_is_there():
    _, tokens, backbone, stack, shares = setup("llama")
    alone = setup("llama")[3]
    for slot, value in alone.state.items():
        alone.state[slot] = value[1:2]
    local_phase(backbone, stack, Factor.AB, 0, tokens, shares, range(3), CONFIG)
    local_phase(backbone, alone, Factor.AB, 0, tokens, shares, [1], CONFIG)
    for factor, value in alone.factors.items():
        assert torch.equal(value[0], stack.factors[factor][1])


def test_outputs_of_a_vocabulary_are_judged_in_parts(monkeypatch):
    monkeypatch.setattr("plait.model.heads.ROWS_AT_ONCE", 4)
    sizes = []
    weight = torch.randn(7, 5)

    def head(x):
        sizes.append(len(x))
        return functional.linear(x, weight)

    features, targets = torch.randn(14, 5, requires_grad=True), torch.arange(14) % 7
    losses = losses_in_parts(head, features, targets, [3, 11])
    (losses * torch.arange(14)).sum().backward()
    assert sizes == [3, 4, 4, 3], "a client's places are apart from another's"
    judged, answers = judge_in_parts(head, features, targets, [3, 11], LANGUAGE)
    assert sizes == [3, 4, 4, 3] * 2
    assert torch.equal(judged, losses)
    found, features.grad = features.grad, None
    outputs = functional.linear(features, weight)
    expected = functional.cross_entropy(outputs, targets, reduction="none")
    (expected * torch.arange(14)).sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, features.grad)
    assert torch.equal(answers, outputs.argmax(dim=1))


def test_a_language_models_head_stays_frozen():
    with pytest.raises(ValueError, match="stays frozen"):
        setup("llama", Config(head="mixed", target_modules="q_proj"))
