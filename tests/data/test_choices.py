"""Options of rows: each is a text, and the likeliest of a row's is chosen by its summed loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import chat_tokenizer
from plait.config import Config
from plait.data.choices import Choices
from plait.data.rendering import render
from plait.data.tasks import Rows, load_task

ROWS = [
    {"prompt": "1+1=", "completion": "2", "options": ["1", "2", "33"]},
    {"prompt": [{"role": "user", "content": "Good?"}],
     "completion": [{"role": "assistant", "content": "yes"}], "options": ["yes", "no"]},
    {"messages": [{"role": "user", "content": "Bad?"}, {"role": "assistant", "content": "no"}],
     "options": ["yes", "no"]},
]  # fmt: skip


def rows_of(rows):
    return Rows(tuple((json.dumps(row),) for row in rows), np.zeros(len(rows), np.int64))


@pytest.fixture
def choices():
    tokenizer = chat_tokenizer()
    return Choices.of(rows_of(ROWS), lambda rows: render(rows.texts, rows.labels, tokenizer))


def test_each_option_is_a_text_that_is_asked_after_its_prompt(choices):
    tokens, tokenizer = choices.tokens, chat_tokenizer()
    said = [tokenizer.decode(tokens.targets[tokens.places(np.array([i]))]) for i in range(7)]
    ends = [one + "<|im_end|>" for one in ("1", "2", "33", "yes", "no", "yes", "no")]
    assert said == ends
    assert choices.right.tolist() == [1, 0, 1]
    texts = [tokenizer.decode(ids) for ids in np.split(tokens.ids, tokens.offsets[1:-1])]
    assert texts[2] == "1+1=33<|im_end|>"
    assert texts[6] == "<|im_start|>user\nBad?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"


def test_the_option_with_the_least_summed_loss_is_chosen(choices):
    sums = torch.tensor([[3.0, 2, 2.5, 1, 2, 1, 2], [1, 2, 3, 2, 1, 2, 1]])
    counts = torch.tensor(np.diff(choices.tokens.asked_offsets))
    losses = torch.stack([torch.cat([s.expand(n) / n for s, n in zip(row, counts, strict=True)])
                          for row in sums])  # fmt: skip
    assert choices.chosen(losses).tolist() == [[1, 0, 0], [0, 1, 1]]
    some = choices.take(np.array([2, 0]))
    assert some.right.tolist() == [1, 1]
    places = choices.tokens.places(np.array([5, 6, 0, 1, 2]))
    assert some.chosen(losses[:, places]).tolist() == [[0, 1], [1, 0]]


def chat(tmp_path, rows, **settings):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_task(Config(task="chat", train_file=str(tmp_path / "rows.jsonl"), **settings))


def test_options_are_named_once_or_by_a_column(tmp_path):
    plain = [{"prompt": f"{i}?", "completion": "ab"[i % 2], "may": ["a", "b"]} for i in range(30)]
    for options in ("a, b", "may"):
        task = chat(tmp_path, plain, options=options)
        assert task.metric == "option-accuracy"
        assert all(json.loads(text)["options"] == ["a", "b"] for (text,) in task.test.texts)
    assert chat(tmp_path, plain).metric == "token-accuracy"


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"prompt": "x", "completion": "c"}, "a,b", "30 rows have an answer that is not among"),
        ({"prompt": "x", "completion": "a", "may": ["a"]}, "may", "have no two options or more"),
        ({"prompt": "x", "completion": "a"}, "may", "no column 'may'"),
        ({"text": "x"}, "a,b", "have an answer that is not among the options a, b"),
    ],
)
def test_rows_without_their_options_are_refused(tmp_path, row, options, said):
    with pytest.raises(ValueError, match=said):
        chat(tmp_path, [row] * 30, options=options)


def test_questions_have_their_class_as_a_word():
    task, classes = load_task(Config(task="trec-chat")), load_task(Config(task="trec"))
    np.testing.assert_array_equal(task.test.labels, classes.test.labels[:100])
    assert task.label_names == classes.label_names
    row = json.loads(task.test.texts[0][0])
    assert row["prompt"][0]["content"].endswith(classes.test.texts[0][0])
    assert row["completion"][0]["content"] == row["options"][task.test.labels[0]]
