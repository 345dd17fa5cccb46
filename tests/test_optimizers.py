"""Steps: AdamW against the formula and against torch, and what an optimizer keeps."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from conftest import tiny_job
from plait.config import Config
from plait.engines.checkpoint import load_rows
from plait.engines.simulate import simulate
from plait.factors import AB, VALUE, A, B
from plait.methods import METHODS, Method, always
from plait.optimizers import ADAMW, Optimizer

LR, DECAY = 1e-2, 0.1


def gradients(count=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 10, generator=generator) for _ in range(count)]


def steps_of(optimizer, value, grads, taken=0, **kept):
    kept = {kind: [kept.get(kind, torch.zeros_like(value)).clone()] for kind in optimizer.kinds}
    values = [value.clone()]
    for number, grad in enumerate(grads, taken):
        optimizer.update(values, [grad.clone()], kept, number, LR, DECAY)
    return values[0], {kind: slots[0] for kind, slots in kept.items()}


def test_adamw_is_the_formula():
    value = torch.ones(3, 10)
    found, kept = steps_of(ADAMW, value, gradients())
    x, m, v = value.double(), torch.zeros(3, 10).double(), torch.zeros(3, 10).double()
    for t, grad in enumerate(gradients(), 1):
        g = grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - LR * DECAY * x
        x = x - LR * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    for one, expected in ((found, x), (kept["m"], m), (kept["v"], v)):
        torch.testing.assert_close(one.double(), expected, rtol=0, atol=1e-6)


def test_adamw_is_torchs():
    parameter = torch.nn.Parameter(torch.ones(3, 10))
    optimizer = torch.optim.AdamW([parameter], lr=LR, weight_decay=DECAY)
    for grad in gradients():
        parameter.grad = grad.clone()
        optimizer.step()
    found, _ = steps_of(ADAMW, torch.ones(3, 10), gradients())
    torch.testing.assert_close(found, parameter.detach(), rtol=0, atol=1e-6)


def test_steps_go_on_from_what_is_kept():
    value = torch.ones(3, 10)
    whole, slots = steps_of(ADAMW, value, gradients())
    half, kept = steps_of(ADAMW, value, gradients()[:2])
    rest, after = steps_of(ADAMW, half, gradients()[2:], taken=2, **kept)
    assert torch.equal(rest, whole)
    assert all(torch.equal(after[kind], slots[kind]) for kind in ADAMW.kinds)


# -- a method with an optimizer of its own


def _heavy_ball(values, grads, kept, _taken, lr, _weight_decay):
    for value, grad, speed in zip(values, grads, kept["speed"], strict=True):
        speed.mul_(0.9).add_(grad)
        value.sub_(speed, alpha=lr)


def _descent(values, grads, _kept, _taken, lr, _weight_decay):
    for value, grad in zip(values, grads, strict=True):
        value.sub_(grad, alpha=lr)


@pytest.mark.parametrize("share", [AB, B])
@pytest.mark.parametrize(
    ("optimizer", "kinds"),
    [
        (Optimizer(("speed",), _heavy_ball), (VALUE,)),
        (Optimizer(("speed",), _heavy_ball), (VALUE, "speed")),
        (Optimizer((), _descent), (VALUE,)),
    ],
)
def test_a_method_may_bring_its_own(monkeypatch, optimizer, kinds, share):
    own = Method(summary="", train=always(AB), share=always(share), kinds=kinds,
                 optimizer=optimizer)  # fmt: skip
    monkeypatch.setitem(METHODS, "own", lambda _: own)
    config = Config(method="own", topology="ring", clients=3, rounds=3, local_steps=2,
                    batch_size=4, rank=2, lr=0.1, optimizer_state="keep")  # fmt: skip
    job = tiny_job(config)
    stack = job.initial_stack()
    assert {kind for kind, _ in stack.state} == {VALUE, *optimizer.kinds}
    before = {slot: value.clone() for slot, value in stack.state.items()}
    list(simulate(job, stack))
    assert all(not torch.equal(stack.state[slot], value) for slot, value in before.items())
    assert {f: steps.tolist() for f, steps in stack.steps.items()} == {A: [6] * 3, B: [6] * 3}
    stack.reset(B)
    assert all(not slot.any() for slot in stack.beside(B).values())
    assert stack.factors[B].any()
    assert {f: steps.tolist() for f, steps in stack.steps.items()} == {A: [6] * 3, B: [0] * 3}


def test_a_checkpoint_of_an_older_plait_has_one_number_of_steps_for_all(tmp_path):
    stack = tiny_job(Config(clients=3, rank=2)).initial_stack()
    slots = {f"{kind}.{factor.name}": slot for (kind, factor), slot in stack.state.items()}
    said = {"rounds_done": "1", "steps.A": "3", "steps.B": "4"}
    save_file({name: slot + 1 for name, slot in slots.items()}, tmp_path / "old", said)
    load_rows(stack, tmp_path / "old")
    assert {f: steps.tolist() for f, steps in stack.steps.items()} == {A: [3] * 3, B: [4] * 3}
    assert torch.equal(stack.state["m", B], torch.ones_like(stack.state["m", B]))
