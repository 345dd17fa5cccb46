"""`plait data` shows what a model sees of rows and who gets which, without loading the model."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from conftest import chat_tokenizer, tiny_tokenizer
from plait.cli import data as command
from plait.cli.main import main


@pytest.fixture
def tokenizers(tmp_path):
    chat_tokenizer().save_pretrained(tmp_path / "chat")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def chat_file(folder):
    rows = [{"prompt": f"{i:02d}", "completion": "ab" * (1 + i % 3), "who": "xy"[i % 2]}
            for i in range(40)]  # fmt: skip
    return write(folder / "rows.jsonl", rows)


def test_of_chat_rows_it_shows_what_is_learned_lengths_and_clients(tokenizers, capsys, caplog):
    args = ["--task=chat", f"--train-file={chat_file(tokenizers)}", "--key-column=who",
            "--clients=2", "--max-length=8", "--show=2"]  # fmt: skip
    assert main(["data", *args, f"--backbone={tokenizers}/chat"]) == 0
    said = capsys.readouterr().out
    assert "<|im_end|>" in said
    assert "33 training rows, 3 for validation, 4 to report on" in said
    assert "median 7, longest 9." in said
    lines = [line.split() for line in said[said.index("client  rows") :].splitlines()[1:]]
    rows = {name: [int(number) for number in numbers] for name, *numbers in lines}
    assert rows["all"][0] == rows["0"][0] + rows["1"][0] == 33
    assert all(tokens - learned == 2 * count for count, tokens, learned in rows.values())
    cut = int(said.split("longest 9. ")[1].split()[0])
    assert f"{cut} of 33 rows are cut to 8 tokens" in caplog.text


def test_on_a_terminal_what_is_only_read_is_dim(tokenizers, capsys, monkeypatch):
    console = Console(force_terminal=True, color_system="standard", _environ={})
    monkeypatch.setattr(command, "Console", lambda: console)
    args = ["--task=chat", f"--train-file={chat_file(tokenizers)}", "--clients=2", "--show=1"]
    assert main(["data", *args, f"--backbone={tokenizers}/chat"]) == 0
    dim, learned = capsys.readouterr().out.splitlines()[1].split("\x1b[0m")
    assert dim.startswith("\x1b[2m")
    assert len(dim) == len("\x1b[2m00")
    assert learned.endswith("ab<|im_end|>")


def test_of_a_classifiers_rows_it_shows_labels(tokenizers, capsys):
    rows = [{"text": f"the film number {'good ' * (i % 4)}", "label": ["no", "yes"][i % 2]}
            for i in range(40)]  # fmt: skip
    rows = [row | {"text": f"{row['text']} {i}"} for i, row in enumerate(rows)]
    train, dev = (
        write(tokenizers / f"{n}.jsonl", part)
        for n, part in (
            ("train", rows),
            ("dev", [row | {"text": f"a {row['text']}"} for row in rows[:9]]),
        )
    )
    args = ["--task=file", f"--train-file={train}", f"--dev-file={dev}", "--clients=2",
            "--label-skew=iid", "--max-length=6"]  # fmt: skip
    assert main(["data", *args, f"--backbone={tokenizers}/tiny"]) == 0
    said = capsys.readouterr().out
    assert "[CLS] the film number" in said
    assert ", label " in said
    assert "36 training rows, 4 for validation, 9 to report on" in said
    assert "longest 9." in said
    (line,) = (line.split() for line in said.splitlines() if line.startswith("all"))
    assert int(line[1]) == sum(map(int, line[3:])) == 36


def test_its_help_fits_and_bad_settings_are_one_line(tokenizers, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["data", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--show" in said
    assert max(map(len, said.splitlines())) <= 80
    args = ["--task=chat", f"--train-file={chat_file(tokenizers)}", f"--backbone={tokenizers}/tiny"]
    assert main(["data", *args]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no EOS" in line
