"""Which way to compute a model: the fastest one that gives the model's own answer.

The answer to compare with is `OwnForward`'s on a few short texts, one at a time: the code of
transformers as it is, with LoRA as PEFT adds it. A way that differs from it by more than rounding,
or that breaks, isn't taken; so nothing is silently different, whatever the architecture.

Legend: n clients, Q places asked, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from plait.data.objectives import LANGUAGE, Objective
from plait.data.tokens import Batch, Tokens, pack
from plait.factors import Factor
from plait.lora import Layout, initial_stack
from plait.model.backend import Backend
from plait.model.heads import READS, MeanHead, MeanPooledClassifier, OwnHead
from plait.model.interface_encoder import InterfaceEncoder
from plait.model.own_forward import GROUPINGS, OwnForward
from plait.model.packed_encoder import PACKED_MODEL_TYPES, PackedEncoder
from plait.model.rectangle_encoder import RectangleEncoder

Encoder = PackedEncoder | InterfaceEncoder | RectangleEncoder
Head = MeanHead | OwnHead

LENGTHS = (9, 4, 9, 6)
"""Tokens of a client's texts, special ones not counted: two alike, and others that need padding."""


@dataclass(frozen=True)
class Probe:
    """Texts and the state of two clients: the first one's B is zero, and its head the start's.

    Attributes:
        batch: Four texts for each.
        A: (2, P).
        B: (2, P).
        heads: The trained head's parameters by name (2, ...).
        dtype: What the model computes in.
    """

    batch: Batch
    A: Tensor
    B: Tensor
    heads: dict[str, Tensor]
    dtype: torch.dtype

    @classmethod
    def of(cls, tokenizer: Any, config: Any, layout: Layout, start: dict[str, Tensor],
           backend: Backend, objective: Objective) -> Probe:  # fmt: skip
        """The same for every run with a model; `start` is its trained head, by name."""
        rng = np.random.default_rng(0)
        texts = [_text(tokenizer, config, length, rng) for length in LENGTHS * 2]
        ids = np.concatenate(texts).astype(np.int32)
        offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
        tokens = Tokens(ids, ids * 0, offsets, np.zeros(len(texts), dtype=np.int64))
        if objective is LANGUAGE:
            tokens = replace(tokens, asked=~np.isin(np.arange(len(ids)), offsets[1:] - 1))
        factors = dict(initial_stack(layout, start, 2, 0, torch.device("cpu")).factors)
        generator = torch.Generator().manual_seed(0)
        for factor in [one for one in factors if one is not Factor.A]:
            row = factors[factor][1]
            row += 0.05 * torch.randn(row.shape, generator=generator)
        there = {factor: value.to(backend.device) for factor, value in factors.items()}
        heads = layout.views(Factor.HEAD, there[Factor.HEAD]) if layout.head else {}
        heads = {name: part.to(backend.dtype) for name, part in heads.items()}
        batch = pack(tokens, np.arange(len(texts)).reshape(2, -1), padded=False)
        return cls(batch.to(backend.device), there[Factor.A], there[Factor.B], heads, backend.dtype)

    def agrees(self, found: Callable[[], Tensor], expected: Tensor) -> bool:
        """Whether logits (Q, C) are what is expected, but for rounding; if it breaks, no."""
        exact = self.dtype is torch.float32 and expected.device.type == "cpu"
        tolerance = (1e-3 if exact else 0.1) * max(float(expected.abs().max()), 1e-3)
        try:
            with torch.no_grad():
                logits = found().float()
        except Exception:  # any code of any model
            return False
        near = logits.shape == expected.shape and (logits - expected).abs() <= tolerance
        return bool(torch.as_tensor(near).all())

    @torch.no_grad()
    def sees_padding(self, encoder: Encoder | OwnForward, compute: Callable[[], Tensor]) -> bool:
        """Whether what a text gets depends on the token that is put behind it.

        That may be little in a model of random weights and much in another: convolutions look
        past a text's end.
        """
        if not isinstance(encoder, RectangleEncoder | OwnForward):
            return False
        before, pad_id = compute(), encoder.pad_id
        encoder.pad_id = int(self.batch.ids[1])  # a word
        try:
            return not torch.equal(compute(), before)
        except Exception:  # any code of any model
            return True
        finally:
            encoder.pad_id = pad_id


def choose(
    model: Any, base: Any, prefix: str, layout: Layout, backend: Backend, probe: Probe
) -> tuple[Encoder, Head] | tuple[OwnForward, None]:
    """An encoder and the head that reads it, or the model's own forward pass.

    Args:
        model: The whole model, frozen.
        base: Its encoder.
        prefix: The path to it.
        layout: Where adapters and head lie in a row.
        backend: How to compute.
        probe: What to try it on.

    Raises:
        ValueError: The model's own code breaks, or the adapters don't change what it says.
    """
    own = OwnForward(model, layout)
    expected = _own_answer(own, probe, base.config.model_type)
    own.remove()
    for build in _encoders(model, base, prefix, layout, backend):
        if (both := _if_right(build, model, probe, expected)) is not None:
            return both
    own = OwnForward(model, layout)
    compute = partial(own, probe.batch, probe.A, probe.B, probe.heads)
    for own.group in GROUPINGS:
        if probe.agrees(compute, expected) and not probe.sees_padding(own, compute):
            return own, None
    raise ValueError(
        f"A {base.config.model_type} model isn't supported: it doesn't give the same answer twice."
    )


def _encoders(
    model: Any, base: Any, prefix: str, layout: Layout, backend: Backend
) -> Iterator[Callable[[], Encoder]]:
    """The encoders that may be right for a model, the fastest first."""
    if backend.packs:
        if base.config.model_type in PACKED_MODEL_TYPES:
            yield lambda: PackedEncoder(base, prefix, layout, backend)
        yield lambda: InterfaceEncoder(base, prefix, layout, backend)
    yield lambda: RectangleEncoder(model, base, layout)


def check_dropout(encoder: Encoder | OwnForward, probe: Probe) -> None:
    """That there is a mask for the input of every adapted layer.

    Raises:
        ValueError: One sees something else than tokens of the texts.
    """
    if isinstance(encoder, OwnForward):
        width = len(probe.batch.ids)
        with torch.no_grad():
            encoder(probe.batch, probe.A, probe.B, probe.heads,
                    lambda _name, x: x.new_ones(width, x.shape[-1]))  # fmt: skip


def _if_right(
    build: Callable[[], Encoder], model: Any, probe: Probe, expected: Tensor
) -> tuple[Encoder, Head] | None:
    """An encoder and its head if together they say what is expected; else the model is put back."""
    try:
        encoder = build()
    except Exception:  # not a model of the kind that this encoder is made for
        return None
    mean_pooled = isinstance(model, MeanPooledClassifier)
    for read in ("mean",) if mean_pooled else READS:
        head = MeanHead(model) if mean_pooled else OwnHead(model, read)
        compute = partial(_logits, encoder, head, probe)
        if probe.agrees(compute, expected) and not probe.sees_padding(encoder, compute):
            return encoder, head
        head.remove()
    encoder.remove()
    return None


def _logits(encoder: Encoder, head: Head, probe: Probe) -> Tensor:
    """(Q, C), client by client."""
    batch = probe.batch
    hidden = encoder(batch, probe.A, probe.B, None, head.asked_only)
    prefix = "" if isinstance(head, MeanHead) else "model."
    each = head.read(hidden, batch).split(batch.asked_counts.tolist())
    parts = [
        {prefix + name: part[k] for name, part in probe.heads.items()} for k in range(len(each))
    ]
    return torch.cat([functional_call(head, *one) for one in zip(parts, each, strict=True)])


def _own_answer(own: OwnForward, probe: Probe, kind: str) -> Tensor:
    """Logits (Q, C) by the model's own code.

    Raises:
        ValueError: It breaks, or the adapted layers don't change what it says.
    """
    try:
        with torch.no_grad():
            logits, bare = (
                own(probe.batch, probe.A, B, probe.heads).float() for B in (probe.B, 0 * probe.B)
            )
    except Exception as error:  # any code of any model
        line = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"A {kind} model isn't supported: on a short text its code says "
            f"{type(error).__name__}: {line}"
        ) from error
    if not logits.isfinite().all():
        raise ValueError(f"A {kind} model isn't supported: its answers aren't finite numbers.")
    if torch.equal(logits, bare) and logits.any():
        raise ValueError(
            f"A {kind} model isn't supported with these target modules: what they compute doesn't "
            "change its answer. Name others with --target-modules."
        )
    return logits


def _text(tokenizer: Any, config: Any, length: int, rng: np.random.Generator) -> np.ndarray:
    """Ids (about `length`,) of words of the tokenizer's; random ones where there is none."""
    config = config.get_text_config()
    size = int(getattr(config, "vocab_size", 256))
    roles = (getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos"))
    special = {one for one in roles if isinstance(one, int)}
    special |= set() if tokenizer is None else set(tokenizer.all_special_ids)
    ids = rng.choice(np.setdiff1d(np.arange(size), list(special)), length)
    if tokenizer is not None:
        found = np.asarray(tokenizer(tokenizer.decode(ids.tolist()))["input_ids"])
        return found[found < size] if len(found) else ids
    eos = getattr(config, "eos_token_id", None)
    return np.append(ids, eos) if isinstance(eos, int) and eos < size else ids
