"""On a graphics card, where there is one: what a CPU gets, and a host that doesn't wait."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from conftest import tiny_job
from plait.config import Config, Machine
from plait.engines.local_training import local_phase
from plait.engines.simulate import simulate
from plait.events import Evaluated
from plait.factors import Factor
from twin import ARCHITECTURES, PHASES, all_logits, setup, twin_evaluation, twin_local_phase

THERE = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICE = next((kind for kind, there in THERE.items() if there), "cuda")
CONFIG = Config(clients=4, local_steps=5, batch_size=6, rank=4, lr=5e-3, clip_norm=0.5)
MACHINE = Machine(device=DEVICE)
pytestmark = pytest.mark.skipif(not any(THERE.values()), reason="no graphics card here")


@pytest.mark.parametrize("head", ["frozen", "mixed"])
@pytest.mark.parametrize("train", PHASES, ids=lambda f: f.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_local_phase_equals_peft(architecture, train, head, ragged_tokens):
    config = dataclasses.replace(CONFIG, head=head)
    model, backbone, stack, shares, targets = setup(
        architecture, config, ragged_tokens, machine=Machine(device=DEVICE, chunk_tokens=150)
    )
    train |= Factor.HEAD if head == "mixed" else Factor.NONE
    expected, after = twin_local_phase(
        model, backbone.layout, stack, train, 1, ragged_tokens, shares, config, targets
    )
    losses = local_phase(backbone, stack, train, 1, ragged_tokens, shares, range(4), config)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    for factor, value in after.items():
        torch.testing.assert_close(stack.factors[factor].cpu(), value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_equals_peft(architecture, ragged_tokens):
    model, backbone, stack, _, targets = setup(architecture, CONFIG, ragged_tokens, machine=MACHINE)
    logits = all_logits(backbone, stack.factors, ragged_tokens)
    expected = twin_evaluation(model, backbone.layout, stack, ragged_tokens, CONFIG, targets)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_bfloat16_gives_nearly_the_same_losses(ragged_tokens):
    losses = []
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, dtype=dtype)
        _, backbone, stack, shares, _ = setup("bert", config, ragged_tokens, machine=MACHINE)
        args = (Factor.AB, 0, ragged_tokens, shares, range(4), config)
        losses.append(local_phase(backbone, stack, *args))
    np.testing.assert_allclose(*losses, rtol=0, atol=0.02)
    assert not np.array_equal(*losses)


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA tells when the host waits")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_host_waits_once_a_phase_and_not_for_each_step(dropout, ragged_tokens):
    waits = []
    for local_steps in (2, 6):
        config = dataclasses.replace(CONFIG, local_steps=local_steps, lora_dropout=dropout)
        _, backbone, stack, shares, _ = setup("bert", config, ragged_tokens, machine=MACHINE)
        args = (backbone, stack, Factor.AB, 0, ragged_tokens, shares, range(4), config)
        local_phase(*args)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            local_phase(*args)
        torch.cuda.set_sync_debug_mode("default")
        waits.append([f"{one.filename}:{one.lineno}" for one in seen])
    assert waits[0]
    assert len(waits[1]) == len(waits[0]), waits[1]


def test_a_run_goes_as_on_the_cpu():
    config = Config(clients=4, rounds=4, local_steps=2, switch_every=2, eval_every=1)
    evaluated = []
    for device in ("cpu", DEVICE):
        job = tiny_job(config, Machine(device=device))
        events = list(simulate(job, job.initial_stack()))
        evaluated.append([event for event in events if isinstance(event, Evaluated)])
    for ours, theirs in zip(*evaluated, strict=True):
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=0, atol=1e-4)
        assert abs(ours.averaged_loss - theirs.averaged_loss) < 1e-4
