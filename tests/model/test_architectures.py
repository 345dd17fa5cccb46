"""Every text classifier of transformers: computed as plain PEFT does, or refused in a line."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from conftest import WORDS, tiny_tokenizer
from plait.config import Config
from plait.data.tokens import tokenize
from plait.engines.local_training import local_phase
from plait.factors import Factor
from plait.lora import initial_stack
from plait.model.backbone import Backbone
from plait.model.loading import load_model
from plait.model.peft_adapters import save_adapter
from twin import all_logits

SIZES = {
    "vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "type_vocab_size": 1,
    "d_model": 32, "n_layer": 2, "n_layers": 2, "n_head": 4, "n_heads": 4, "d_inner": 64,
    "n_embd": 32, "n_positions": 64, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dim": 32,
    "hidden_dim": 64, "num_key_value_heads": 2, "head_dim": 8, "embedding_size": 16, "emb_dim": 32,
    "dff": 64, "ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "decoder_start_token_id": 0,
    "attention_window": 4, "block_sizes": [1, 1], "num_experts": 2, "num_local_experts": 2,
    "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "attention_types": [[["global"], 2]],
    "rotary_dim": 4, "position_buckets": 8, "num_buckets": 8,
}  # fmt: skip
"""Small sizes under all the names that configs have for them."""

ALIASES = {"num_hidden_layers", "hidden_size", "decoder_start_token_id"}
"""Names that configs take without having them."""

ESPECIALLY = {
    "modernbert": {"classifier_pooling": "mean"},
    "deberta-v2": {"relative_attention": True, "share_att_key": True,
                   "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
                   "norm_rel_ebd": "layer_norm"},
    "longformer": {"attention_window": [4, 4]},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 1},
    "roberta": {"pad_token_id": 1}, "distilbert": {"n_heads": 4},
}  # fmt: skip

WAYS = {
    "bert": "PackedEncoder", "roberta": "PackedEncoder", "electra": "PackedEncoder",
    "distilbert": "InterfaceEncoder", "modernbert": "InterfaceEncoder",
    "llama": "InterfaceEncoder", "qwen2": "InterfaceEncoder", "gpt2": "InterfaceEncoder",
    "albert": "InterfaceEncoder", "deberta-v2": "OwnForward", "xlnet": "OwnForward",
    "t5": "OwnForward", "bart": "OwnForward", "fnet": "OwnForward", "convbert": "OwnForward",
}  # fmt: skip
"""How some architectures are computed, in every run of the tests; the long tail is slow."""

TAIL = sorted(set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES) - WAYS.keys())


def checkpoint(kind, folder, **more):
    """A tiny random encoder of a kind, in a folder, with a tokenizer; skipped if there is none."""
    try:
        known = set(vars(AutoConfig.for_model(kind))) | ALIASES
        wanted = {name: size for name, size in SIZES.items() if name in known}
        config = AutoConfig.for_model(kind, **wanted | ESPECIALLY.get(kind, {}) | more)
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        if sum(parameter.numel() for parameter in model.parameters()) > 20_000_000:
            pytest.skip("no tiny model of this kind by sizes alone")
        if "input_ids" not in inspect.signature(model.forward).parameters:
            pytest.skip("takes no token ids")
    except Exception as error:  # another library, or sizes that don't go together
        pytest.skip(f"no tiny model of this kind: {type(error).__name__}")
    model.base_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    linear = [
        name.rpartition(".")[2]
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and any(map(str.isdigit, name.split(".")))
    ]
    # A bare `dense` would also be the pooler, which the fast ways don't adapt.
    last = next((name for name in reversed(linear) if name != "dense"), linear[0]) if linear else ""
    return ",".join(dict.fromkeys([linear[0], last])) if linear else pytest.skip("no layers")


def texts():
    return [(" ".join(WORDS[k : k + size]),) for k, size in enumerate((3, 7, 1, 5, 7, 2))]


def one_by_one(model, tokens):
    """Logits (R, C) of plain PEFT, each text alone."""
    rows = zip(tokens.offsets, tokens.offsets[1:], strict=False)
    ids = [torch.from_numpy(tokens.ids[a:b].astype("int64"))[None] for a, b in rows]
    with torch.no_grad():
        return torch.cat([model(input_ids=one).logits.float() for one in ids])


def conform(kind, folder, head="mixed", **more):
    """Train a little, export, and compare with plain PEFT; a refusal's line, or how it computes."""
    targets = checkpoint(kind, folder / "model", **more)
    config = Config(
        backbone=str(folder / "model"), head=head, rank=2, target_modules=targets, clients=2,
        local_steps=2, batch_size=3, lr=1e-2, seed=5,
    )  # fmt: skip
    try:
        loaded = load_model(config, 3)
        backbone = Backbone(loaded, config)
    except ValueError as error:
        return str(error)
    labels = torch.tensor([0, 1, 2, 0, 1, 2]).numpy()
    tokens = tokenize(texts(), labels, loaded.tokenizer, 16)
    stack = initial_stack(backbone.layout, backbone.head_start, 2, 0, backbone.device)
    train = Factor.AB | (Factor.HEAD if backbone.layout.head else Factor.NONE)
    shares = [torch.arange(6).numpy()] * 2
    local_phase(backbone, stack, train, 0, tokens, shares, range(2), config)
    assert stack.factors[Factor.B].abs().max() > 0
    row = {factor: value[0] for factor, value in stack.factors.items()}
    save_adapter(backbone, row, config, folder / "adapter")

    torch.manual_seed(1234)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    found = all_logits(backbone, stack.factors, tokens)[0]
    torch.testing.assert_close(found, one_by_one(model, tokens), rtol=1e-4, atol=1e-5)
    return type(backbone.encoder).__name__


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WAYS)
def test_what_is_exported_computes_in_peft_what_was_trained(kind, tmp_path):
    assert conform(kind, tmp_path) == WAYS[kind]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_needs_no_padding_token(kind, tmp_path):
    assert conform(kind, tmp_path, pad_token_id=None) == "InterfaceEncoder"


def test_names_that_peft_takes_for_those_of_experts_are_refused(tmp_path):
    assert "PEFT takes down_proj of a mixture of experts" in conform("hunyuan_v1_moe", tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TAIL)
def test_the_long_tail_is_right_or_refused(kind, tmp_path):
    said = conform(kind, tmp_path)
    assert "\n" not in said
    assert said.isidentifier() or "supported" in said or "can't be loaded" in said, said
