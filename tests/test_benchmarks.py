"""The benchmarks are fair: every rival does the same work. And the one command runs to its end."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import asked_tokens, random_tokens, save_encoder, tiny_causal_model, tiny_model
from plait.config import Machine

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
KEYS = {
    "speedup_fp32_vs_peft", "speedup_best_vs_peft", "speedup_best_vs_padded128",
    "gemm_fraction_fp32", "gemm_fraction_bf16", "gemm_fraction_of_limit_bf16",
    "padding_fraction", "cost_per_client_1000_over_30",
    "mixing_fraction_1000",
}  # fmt: skip


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def work():
    """Four clients with texts of unequal lengths, a few to a chunk."""
    from work import config_of, work_of

    config = dataclasses.replace(config_of(None, batch_size=6), lr=3e-2, clip_norm=1e-3)
    return work_of(tiny_model("bert"), random_tokens(), config, 4, Machine(chunk_tokens=150))


SLOW = pytest.param("a process each", marks=pytest.mark.slow)


@pytest.mark.parametrize("rival", ["loop", "padded", "vmap", SLOW])
def test_a_rival_has_the_losses_of_plait(rival, work):
    from rivals import in_processes, peft_steps, plait_steps, vmap_steps

    with ExitStack() as stack:
        steps = {
            "loop": lambda: peft_steps(work),
            "padded": lambda: peft_steps(work, False, 40),
            "vmap": lambda: vmap_steps(work),
            "a process each": lambda: in_processes(stack, work, 2, peft_steps),
        }[rival]()
        theirs = np.concatenate([steps(4), steps(3)], axis=1)
    ours = plait_steps(work)
    np.testing.assert_allclose(theirs, np.concatenate([ours(4), ours(3)], axis=1), atol=1e-5)


def test_a_language_models_rival_has_the_losses_of_plait(work, monkeypatch):
    import language
    from rivals import peft_steps, plait_steps
    from work import work_of

    model, tokens = tiny_causal_model("llama"), asked_tokens()
    chat = dataclasses.replace(work_of(model, tokens, work.config, 4), objective="language")
    np.testing.assert_allclose(peft_steps(chat)(3), plait_steps(chat)(3), atol=1e-5)
    needed = language.Needed.of(chat, 1)
    q_k_v_o, inner = 2 * 32 * 32 + 2 * 16 * 32, 3 * 64 * 32
    frozen, lora = 2 * (q_k_v_o + inner), 2 * 8 * (32 + 32 + 32 + 16)
    assert needed.flop() == pytest.approx(
        needed.tokens * (4 * frozen + 6 * lora) + 4 * needed.learned * 99 * 32
    )


def test_the_race_of_language_models(tmp_path, monkeypatch, capsys):
    import language

    monkeypatch.setattr("race.LEAST_SECONDS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(language, "QWEN", language.QWEN | {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 99,
    })  # fmt: skip
    out = tmp_path / "out"
    language.main(
        f"--clients 2 --batch-size 1 --max-length 16 --repeats 1 --sizes 1 --out {out}".split()
    )
    found = json.loads((out / "language.json").read_text())["language"]
    assert found["losses_apart"]["peft fp32"] < 1e-5
    assert found["gemm_fraction"].keys() == found["client_steps_per_second"].keys()
    half = ("bf16" in found["gemm_flops"], "plait bf16" in found["client_steps_per_second"])
    assert half == (language.has_bfloat16(),) * 2
    assert "GFLOP/s in fp32" in capsys.readouterr().out


def test_the_race_on_an_accelerator(work, monkeypatch):
    import accelerator
    import race

    monkeypatch.setattr(race, "LEAST_SECONDS", 0.0)
    rows = accelerator.race(work, repeats=1)
    apart = {row["system"]: row["losses_apart"] for row in rows}
    assert list(apart) == ["plait fp32", "peft fp32", "plait bf16", "peft bf16"]
    assert apart["plait fp32"] == 0
    assert 0 < apart["peft fp32"] < 1e-5 < apart["peft bf16"] < 0.1
    shown = accelerator.table([{"model": "tiny", "clients": 4, **row} for row in rows])
    assert shown.row_count == 4
    found = accelerator.study(work, runs=2)
    line = accelerator.told("tiny", found)
    assert re.search(
        r"tiny, 2 runs of 10 clients: 0\.\d+ s a step in one stack, \d+\.\d times", line
    )


def test_bench_writes_its_summary(tmp_path, monkeypatch, capsys):
    import engine

    monkeypatch.setattr("race.LEAST_SECONDS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text('{"frameworks": {"flower": 1}}')
    folder = save_encoder("bert", tmp_path / "model")
    engine.main(
        f"--backbone {folder} --clients 3 --scale 2 --models --repeats 1 --client-steps 3 "
        f"--batch-size 2 --max-length 32 --out {tmp_path / 'out'}".split()
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary.keys() >= KEYS | {"frameworks"}
    (race,) = summary["races"].values()
    for name, apart in race["losses_apart"].items():
        assert apart < (1e-3 if "bf16" in name else 1e-5), name
    assert summary["speedup_fp32_vs_peft"] > 0
    assert summary["cost_per_client_1000_over_30"] is None
    half = race["client_steps_per_second"]["plait bf16"]
    assert (half is None) == (not summary["machine"]["bfloat16"])
    assert (summary["gemm_fraction_bf16"] is None) == (race["limit_bf16"] is None) == (half is None)
    engine.print_limits(race | {"limit_bf16": race["limit"]})
    said = capsys.readouterr().out
    assert "limit =" in said
    assert "bf16: GEMM rate" in said
    assert sys.path[0] == str(BENCHMARKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_takes_at_best_is_measured_in_either_type(dtype):
    from limits import LIBRARY, Shape, alone

    shape = Shape(64, 2, 4, layers=2, d=32, f=64, heads=2, rank=2, parameters=99, dtype=dtype)
    found = alone(shape)()
    assert found.keys() >= {LIBRARY, "frozen products", "attention", "GELU", "optimizer, clipping"}
    assert min(found.values()) > 0


def test_a_race_without_bfloat16_is_won_in_fp32():
    from race import LOOPS, PLAIT, ratio

    speed = {"plait fp32": 6.0, "plait bf16": None, "peft fp32": 2.0, "peft bf16": None}
    speed |= dict.fromkeys(LOOPS["fp32"][1:], 3.0) | dict.fromkeys(LOOPS["bf16"][1:])
    result = {"client_steps_per_second": speed}
    every = PLAIT["fp32"] + PLAIT["bf16"]
    assert ratio(result, every, LOOPS["fp32"] + LOOPS["bf16"]) == 2.0
    assert ratio(result, PLAIT["bf16"], LOOPS["fp32"]) is None
