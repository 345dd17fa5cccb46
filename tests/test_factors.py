"""Factors and slots, and what they are called."""

from __future__ import annotations

import itertools

import pytest
import torch

from conftest import tiny_job
from plait.config import Config
from plait.factors import (
    AB,
    NONE,
    VALUE,
    A,
    B,
    Factor,
    factors_name,
    factors_named,
    factors_of,
    slot_name,
    slots_name,
)

HEAD = Factor.HEAD


@pytest.mark.parametrize(
    ("factors", "name"),
    [(NONE, "-"), (A, "A"), (B, "B"), (AB, "AB"), (B | HEAD, "B|HEAD"), (AB | HEAD, "A|B|HEAD")],
)
def test_factors_have_a_name(factors, name):
    assert factors_name(factors) == name


def test_slots_have_names_of_their_own():
    slots = list(itertools.product((VALUE, "m", "v"), (A, B, HEAD)))
    names = [slot_name(slot) for slot in slots]
    assert names == ["A", "B", "HEAD", "m.A", "m.B", "m.HEAD", "v.A", "v.B", "v.HEAD"]
    assert slots_name(slots) == "|".join(names)
    assert slots_name([]) == "-"


def test_the_factors_of_slots_are_each_there_once():
    assert factors_of([(VALUE, B), ("m", B), ("v", A)]) == AB
    assert factors_of([]) == NONE
    assert factors_of([("m", HEAD)]) == HEAD


@pytest.mark.parametrize("head", ["frozen", "mixed"])
def test_all_slots_of_a_factor_have_its_shape(head):
    job = tiny_job(Config(clients=3, rank=2, head=head))
    stack = job.initial_stack()
    factors = (A, B, HEAD) if head == "mixed" else (A, B)
    assert set(stack.state) == set(itertools.product((VALUE, "m", "v"), factors))
    for (_, factor), slot in stack.state.items():
        assert slot.shape == (3, job.backbone.layout.size(factor))
        assert slot.dtype is torch.float32
    assert list(stack.factors) == list(factors)
    assert set(stack.beside(A)) == {"m", "v"}
    assert stack.factors[A].data_ptr() == stack.state[VALUE, A].data_ptr()


@pytest.mark.parametrize("factors", [NONE, A, AB, AB | Factor.HEAD, Factor.BASE])
def test_a_name_of_factors_means_them(factors):
    assert factors_named(factors_name(factors)) == factors
