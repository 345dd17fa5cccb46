"""Rows of all shapes are told by their columns, and refused by their line."""

from __future__ import annotations

import json
import sys
import types

import pandas as pd
import pytest

from plait.config import Config
from plait.data import sources
from plait.data.partition import deal
from plait.data.sources import check_files, read_chat
from plait.data.tasks import load_task

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "a film"}
ROWS = {
    "text": ({"text": "a film"}, {"text": "a film"}),
    "messages": ({"messages": [USER, BOT]}, {"messages": [USER, BOT]}),
    "strings": ({"prompt": "a ", "completion": "b"}, {"prompt": "a ", "completion": "b"}),
    "turns": ({"prompt": [USER], "completion": [BOT]}, {"prompt": [USER], "completion": [BOT]}),
}


@pytest.fixture(autouse=True)
def nothing_said():
    sources._SAID.clear()


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def read(path, **settings):
    config = Config(task="chat", train_file=str(path), **settings)
    return [json.loads(example.texts[0]) for example in read_chat(config, "train_file")]


@pytest.mark.parametrize(("row", "expected"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_shapes_are_told_by_their_columns(tmp_path, row, expected, kind):
    file = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="comes with plait[glue]")
        pd.DataFrame([row, row]).to_parquet(file)
    else:
        jsonl(file, [row | {"id": 7}] * 2)
    assert read(file) == [expected] * 2


def test_alpaca_gets_its_preamble(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text('instruction,input,output,text\nSay it,"the\nfilm",good,all\nSay it,,bad,all\n')
    with_input, without = read(file)
    assert with_input["completion"] == "good"
    assert with_input["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay it\n\n### Input:\nthe\nfilm\n\n### Response:\n"
    )
    assert without["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay it\n\n### Response:\n"
    )


def test_columns_of_other_names_are_named(tmp_path):
    file = jsonl(tmp_path / "x.jsonl", [{"question": "hi", "answer": "a film", "body": "b"}] * 2)
    assert read(file, text_columns="question,answer")[0] == {"prompt": [USER], "completion": [BOT]}
    assert read(file, text_columns="body")[0] == {"text": "b"}
    with pytest.raises(
        ValueError, match=r"are 'question', 'answer', 'body'; known are messages; "
    ) as e:
        read(file)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no column 'reply'"):
        check_files(Config(task="chat", train_file=file, text_columns="question,reply"))


def test_named_columns_of_a_shape_are_that_shape(tmp_path):
    file = jsonl(
        tmp_path / "x.jsonl", [{"messages": [USER, BOT], "prompt": "a", "completion": "b"}]
    )
    assert list(read(file)[0]) == ["messages"]
    assert read(file, text_columns="prompt,completion") == [{"prompt": "a", "completion": "b"}]


BAD = {
    "role": ({"messages": [{"role": "bot", "content": "x"}, BOT]}, "have the role 'bot'"),
    "no answer": ({"messages": [USER]}, "have no turn of the assistant in 'messages'"),
    "unasked": ({"messages": [BOT]}, "begin with the assistant in 'messages'"),
    "silent": ({"messages": [USER, BOT | {"content": " "}]}, "have no 'content'"),
    "call": ({"messages": [USER, {"role": "assistant"}]}, "have no 'content'"),
    "no list": ({"messages": "hi"}, "have no list of objects with role and content as 'messages'"),
    "mixed": ({"text": "a"}, "have text, where others have messages"),
    "other": ({"id": 3}, "have no 'messages'"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "fault"), BAD.values(), ids=BAD)
def test_a_bad_row_is_refused_by_its_line_or_left_out(tmp_path, row, fault, caplog):
    good = {"messages": [USER, BOT]}
    file = jsonl(tmp_path / "x.jsonl", [good, good, row, good])
    with pytest.raises(ValueError, match=rf"x.jsonl: 1 of 4 rows {fault}.*: line 3\.") as error:
        read(file)
    assert "\n" not in str(error.value)
    assert read(file, skip_bad_rows=True) == [good] * 3
    assert fault in caplog.text


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": ""}, {"prompt": "a"}])
def test_an_empty_completion_is_refused(tmp_path, row):
    file = jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(ValueError, match=r"1 of 2 rows have no 'completion': line 2"):
        read(file)


# -- the task


def speeches(count: int, start: int = 0):
    return [
        {"text": f"speech {i}", "speaker": f"s{i % 2}", "play": "abc"[i % 3]}
        for i in range(start, start + count)
    ]


def chat(tmp_path, **settings):
    file = jsonl(tmp_path / "train.jsonl", speeches(60))
    return load_task(config := Config(task="chat", train_file=file, **settings)), config


def test_without_dev_file_a_tenth_is_reported_on_and_said(tmp_path, caplog):
    task, config = chat(tmp_path)
    assert "reported on 6 of the training rows" in caplog.text
    assert "has text: all of it is learned" in caplog.text
    assert (len(task.train), len(task.validation), len(task.test)) == (49, 5, 6)
    assert (task.label_names, task.metric) == ((), "token-accuracy")
    assert len({*task.train.texts, *task.validation.texts, *task.test.texts}) == 60
    assert [len(hand) for hand in deal(task, config)] == [5] * 9 + [4]


def test_a_dev_file_needs_neither_key_nor_group(tmp_path):
    dev = jsonl(tmp_path / "dev.jsonl", [{"text": f"dev {i}"} for i in range(7)])
    task, config = chat(
        tmp_path, dev_file=dev, key_column="speaker", label_column="play", clients=2
    )
    check_files(config)
    assert [len(task.test), task.label_names] == [7, ("a", "b", "c")]
    assert task.train.keys is not None
    names = {json.loads(text)["text"].split()[1]: label for (text,), label in
             zip(task.train.texts, task.train.labels, strict=True)}  # fmt: skip
    assert all(int(number) % 3 == label for number, label in names.items())


def test_rows_are_dealt_by_key_if_there_is_one_and_by_group_if_asked(tmp_path):
    task, config = chat(tmp_path, key_column="speaker", clients=2)
    for hand in deal(task, config):
        assert len({task.train.keys[i] for i in hand}) == 1
    with pytest.raises(ValueError, match=r"'paper' needs .* name a column of groups with"):
        deal(task, Config(label_skew="paper"))
    task, config = chat(tmp_path, label_column="play", clients=3)
    assert len(deal(task, config)) == 3
    with pytest.raises(ValueError, match="no column 'genre'"):
        chat(tmp_path, label_column="genre")


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    class Split(list):
        column_names = ("text", "speaker", "play")

    def load_dataset(name, subset):
        assert (name, subset) == ("org/plays", "main")
        return {"train": Split(speeches(60)), "validation": Split(speeches(8, 60))}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    config = Config(task="chat", train_file="org/plays:main", dev_file="org/plays:main")
    check_files(config)
    task = load_task(config)
    assert (len(task.train), len(task.test)) == (54, 8)
    with pytest.raises(ValueError, match=r"There is no file plays/train.jsonl"):
        load_task(Config(task="chat", train_file="plays/train.jsonl"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"org/plays from the hub needs .*plait\[glue\]"):
        load_task(Config(task="chat", train_file="org/plays"))
