"""Clients of different rank: rows of the largest whose last directions are zero, and stay so."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_job
from plait.config import Config
from plait.engines.simulate import simulate
from plait.events import RoundDone
from plait.factors import VALUE, A, B
from plait.lora import Layout, Site, cut, resized
from plait.model.peft_adapters import save_adapters

CONFIG = Config(
    clients=4, topology="ring", rounds=4, local_steps=2, batch_size=3, ranks="4,2,1",
    switch_every=1, lr=1e-2, eval_every=9, weight_decay=0.1,
)  # fmt: skip


def test_equal_ranks_are_no_list():
    assert Config(ranks="8,8") == Config(rank=8)
    assert Config(ranks="4") == Config(rank=4)


@pytest.mark.parametrize("ranks", [[4, 2, 1], (4, 2, 1)])
def test_a_list_in_python_or_toml_is_what_it_says(ranks):
    assert dataclasses.replace(CONFIG, ranks=ranks) == CONFIG
    assert Config(ranks=4) == Config(rank=4)


def test_ranks_go_by_turns_and_the_largest_is_the_runs():
    assert [CONFIG.rank_of(k) for k in range(4)] == [4, 2, 1, 4]
    assert CONFIG.rank == 4
    assert Config.from_json(CONFIG.to_json()) == CONFIG


def test_a_file_of_ranks_is_its_numbers(tmp_path):
    file = tmp_path / "ranks.txt"
    file.write_text("4\n2\n1\n")
    assert dataclasses.replace(CONFIG, ranks=str(file)) == CONFIG


@pytest.mark.parametrize("ranks", ["4,x", "4,0", "", "none.txt", "4,-2", "4,2.5", [4, 0], [], 0])
def test_what_are_no_ranks_is_said(ranks):
    with pytest.raises(ValueError, match="write whole numbers above 0"):
        Config(ranks=ranks)


def test_other_ranks_may_take_their_place():
    assert dataclasses.replace(CONFIG, ranks="2,1").rank == 2


def test_a_list_may_be_longer_than_a_files_name():
    many = Config(ranks=",".join(["4", "2"] * 500), clients=1000)
    assert Config.from_json(many.to_json()) == many


def test_a_file_that_holds_something_else_is_named(tmp_path):
    (tmp_path / "ranks.txt").write_text("# ranks\n4\n")
    with pytest.raises(ValueError, match=r"ranks\.txt: ranks is"):
        Config(ranks=str(tmp_path / "ranks.txt"))


@pytest.mark.parametrize(
    ("name", "value"), [("mix", "trimmed-mean:1"), ("mix", "clipped-gossip:1")]
)
def test_a_rule_that_takes_zeros_for_values_refuses_them(name, value):
    with pytest.raises(ValueError, match="needs clients of one rank"):
        tiny_job(dataclasses.replace(CONFIG, **{name: value}))


LAYOUT = Layout((Site("a", 5, 3), Site("b", 2, 4)), rank=3, scale=1.0)


def test_a_row_is_cut_and_filled_up():
    A0, B0 = torch.randn(1, LAYOUT.size(A)), torch.randn(1, LAYOUT.size(B))
    state = {(VALUE, A): A0, (VALUE, B): B0}
    small = resized(LAYOUT, state, 1)
    views = LAYOUT.of_rank(1).views(B, small[VALUE, B])
    for name, whole in LAYOUT.views(B, B0).items():
        assert torch.equal(views[name], whole[:, :, :1])
    again = resized(LAYOUT.of_rank(1), small, 3)
    expected = {slot: value.clone() for slot, value in state.items()}
    cut(LAYOUT, expected, [1])
    for slot, value in again.items():
        assert torch.equal(value, expected[slot])
    for name, whole in LAYOUT.views(A, again[VALUE, A]).items():
        assert torch.equal(whole[:, :1], LAYOUT.views(A, A0)[name][:, :1])
        assert not whole[:, 1:].any()


@pytest.mark.parametrize("more", [{}, {"method": "dec-lora"}, {"dp_clip": 1.0, "dp_noise": 0.5}])
def test_a_client_never_gets_a_direction_that_it_does_not_have(more):
    job = tiny_job(dataclasses.replace(CONFIG, **more))
    stack, layout = job.initial_stack(), job.backbone.layout
    for _ in simulate(job, stack):
        for client in range(4):
            own = CONFIG.rank_of(client)
            for (_, factor), value in stack.state.items():
                for view in layout.views(factor, value[client : client + 1]).values():
                    beyond = view[:, own:] if factor is A else view[..., own:] * (factor is B)
                    assert not beyond.any()
    for view in layout.views(B, stack.factors[B]).values():
        assert view[0].any(dim=0).all(), "the largest has all of its directions"


def test_alone_it_is_what_it_would_be_in_a_run_of_its_rank():
    one = dataclasses.replace(CONFIG, method="local")
    job, plain = tiny_job(one), tiny_job(dataclasses.replace(one, ranks="2", rank=2, alpha=8.0))
    stacks = [job.initial_stack(), plain.initial_stack()]
    for each, stack in zip((job, plain), stacks, strict=True):
        list(simulate(each, stack))
    for factor in (A, B):
        row = job.own({(VALUE, factor): stacks[0].factors[factor][1]}, 1)[VALUE, factor]
        torch.testing.assert_close(row, stacks[1].factors[factor][1], rtol=0, atol=1e-6)


def test_bytes_are_those_of_each_ones_rank():
    job = tiny_job(CONFIG)
    per_rank = 4 * sum(job.backbone.layout.of_rank(1).size(f) for f in (A, B))
    assert [job.message_bytes(0, k) for k in range(4)] == [per_rank * r for r in (4, 2, 1, 4)]
    done = next(e for e in simulate(job, job.initial_stack()) if isinstance(e, RoundDone))
    assert done.sent_bytes == 2 * per_rank * (4 + 2 + 1 + 4)


def test_an_adapter_has_its_own_rank_and_the_scale_of_all(tmp_path):
    job = tiny_job(CONFIG)
    stack = job.initial_stack()
    list(simulate(job, stack))
    save_adapters(job.backbone, stack, job.config, tmp_path)
    for name, rank in (("client-0", 4), ("client-1", 2), ("client-2", 1), ("mean", 4)):
        settings = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert settings["r"] == rank
        assert settings["lora_alpha"] / rank == job.backbone.layout.scale
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {v.shape[0] for k, v in tensors.items() if "lora_A" in k} == {rank}
        assert {v.shape[1] for k, v in tensors.items() if "lora_B" in k} == {rank}
