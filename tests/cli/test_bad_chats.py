"""Rows and models that a language model can't learn from: one line, and nothing is left behind."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import chat_tokenizer, save_language_model
from plait.cli.main import main

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
GOOD = {"messages": [USER, BOT]}
ROW = "1 of 30 rows have"
PART = {"type": "text", "text": "hi"}
ROWS = {
    "role": ({"messages": [{"role": "bot", "content": "x"}, BOT]}, f"{ROW} the role 'bot'"),
    "no answer": ({"messages": [USER]}, f"{ROW} no turn of the assistant in 'messages'"),
    "empty answer": ({"messages": [USER, BOT | {"content": ""}]}, f"{ROW} no 'content'"),
    "null content": ({"messages": [USER | {"content": None}, BOT]}, f"{ROW} no 'content'"),
    "parts": ({"messages": [USER | {"content": [PART]}, BOT]}, f"{ROW} a list as 'content'"),
    "tools": (GOOD | {"tools": [{"name": "look_up"}]}, f"{ROW} 'tools', which a prompt"),
    "calls": (
        {"messages": [USER, BOT | {"tool_calls": [{"id": "1"}]}]}, f"{ROW} 'tool_calls', which",
    ),
    "mixed": ({"prompt": "a", "completion": "b"}, f"{ROW} prompt and completion, where others"),
    "too long": (
        {"messages": [USER | {"content": "x" * 99}, BOT]},
        "1 of 25 rows have a prompt of 60 tokens or more",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def said(tmp_path, model, capsys):
    """The one line that is said of rows and a model."""

    def run(rows, folder=None, *flags):
        file = tmp_path / "rows.jsonl"
        rows = [*(numbered(GOOD, k) for k in range(29)), *rows]
        file.write_text("\n".join(map(json.dumps, rows)))
        out = tmp_path / "out"
        words = f"run --task chat --train-file {file} --backbone {folder or model} --out {out}"
        code = main([*words.split(), "--max-length=60", "--clients=2", "--rounds=1", *flags])
        assert (code, out.exists()) == (1, False)
        *_, line = capsys.readouterr().err.strip().splitlines()
        return line

    return run


def numbered(row, k):
    return {"messages": [{"role": "user", "content": f"hi {k}"}, row["messages"][-1]]}


@pytest.mark.parametrize(("row", "message"), ROWS.values(), ids=ROWS)
def test_a_row(said, row, message):
    assert message in said([row])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a film", ""] * 9}, "9 of 18 rows have no 'text': rows 2, 4, 6"),
        ({"messages": [[USER, BOT]] * 8 + [[BOT]]}, "1 of 9 rows begin with the assistant"),
        ({"messages": [[USER, BOT]] * 9, "tools": [None] * 8 + ["[{}]"]}, "1 of 9 rows have 'to"),
        ({"messages": [json.dumps([USER, BOT])] * 9}, "have no list of objects with role and"),
    ],
)
def test_a_parquet_file(said, tmp_path, rows, message):
    pytest.importorskip("pyarrow", reason="comes with plait[glue]")
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    assert message in said([], None, f"--train-file={tmp_path / 'rows.parquet'}")


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


def without_eos(folder):
    chat_tokenizer(eos=None).save_pretrained(folder)


def with_few_positions(folder):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 24, "vocab_size": 260}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_template, "has no chat template, and rows are conversations"),
        (without_eos, "has no EOS"),
        (with_few_positions, "have up to 28 tokens, and the model has positions for 24: pass"),
    ],
)
def test_a_model(said, model, tmp_path, change, message):
    folder = shutil.copytree(model, tmp_path / "other")
    change(folder)
    assert message in said([], folder)
