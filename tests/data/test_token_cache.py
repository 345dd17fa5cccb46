"""The store of tokenised splits gives what the tokenizer gives, and asks it only once."""

import json
from functools import wraps

import numpy as np
import pytest

from conftest import CHATML, WORDS, chat_tokenizer, tiny_tokenizer
from plait.data.rendering import render
from plait.data.token_cache import stored_tokens
from plait.data.tokens import tokenize

TEXTS = [(" ".join(WORDS[i % 9 : i % 9 + 1 + i % 5]), WORDS[i % 7]) for i in range(1200)]
LABELS = np.arange(1200) % 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def counted():
    """`tokenize`, with what it was called with."""
    calls = []

    @wraps(tokenize)
    def made(*args):
        calls.append(args)
        return tokenize(*args)

    made.calls = calls
    return made


def assert_same(tokens, expected):
    for name in ("ids", "types", "offsets", "labels"):
        np.testing.assert_array_equal(getattr(tokens, name), getattr(expected, name))
        assert getattr(tokens, name).dtype == getattr(expected, name).dtype


def test_what_is_stored_is_what_the_tokenizer_gives_and_it_is_asked_once(folder, counted):
    tokenizer = tiny_tokenizer()
    expected = tokenize(TEXTS, LABELS, tokenizer, 6)
    for _ in range(2):
        tokens = stored_tokens(counted, TEXTS, LABELS, tokenizer, 6)
        assert isinstance(tokens.ids, np.memmap)
        assert_same(tokens, expected)
    assert len(counted.calls) == 1
    assert len(list(folder.iterdir())) == 1


def test_other_texts_lengths_and_tokenizers_are_kept_apart(folder, counted):
    stored_tokens(counted, TEXTS, LABELS, tiny_tokenizer(), 6)
    stored_tokens(counted, TEXTS, LABELS, tiny_tokenizer(), 5)
    stored_tokens(counted, TEXTS[::-1], LABELS, tiny_tokenizer(), 6)
    other = tiny_tokenizer()
    other.add_tokens(["zebra"])
    stored_tokens(counted, TEXTS, LABELS, other, 6)
    assert len(counted.calls) == len(list(folder.iterdir())) == 4


def test_labels_are_the_callers_and_not_stored(folder, counted):
    tokenizer = tiny_tokenizer()
    stored_tokens(counted, TEXTS, LABELS, tokenizer, 6)
    assert (
        stored_tokens(counted, TEXTS, 1 - LABELS, tokenizer, 6).labels.tolist()
        == (1 - LABELS).tolist()
    )
    assert len(counted.calls) == 1


def test_few_texts_leave_nothing_on_disk(folder):
    stored_tokens(tokenize, TEXTS[:50], LABELS[:50], tiny_tokenizer(), 6)
    assert not folder.exists()


def test_without_a_place_to_write_texts_are_tokenised_all_the_same(folder):
    folder.parent.write_text("a file where the folder should be")
    tokens = stored_tokens(tokenize, TEXTS, LABELS, tiny_tokenizer(), 6)
    assert_same(tokens, tokenize(TEXTS, LABELS, tiny_tokenizer(), 6))


def test_a_write_that_fails_leaves_nothing_behind(folder, monkeypatch):
    def full(*_args):
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", full)
    tokens = stored_tokens(tokenize, TEXTS, LABELS, tiny_tokenizer(), 6)
    assert_same(tokens, tokenize(TEXTS, LABELS, tiny_tokenizer(), 6))
    assert not list(folder.iterdir())


def test_two_that_store_the_same_at_once_both_get_it(folder):
    tokenizer = tiny_tokenizer()

    @wraps(tokenize)
    def slow(*args):
        tokens = tokenize(*args)
        stored_tokens(tokenize, TEXTS, LABELS, tokenizer, 6)  # another process, in between
        return tokens

    assert_same(
        stored_tokens(slow, TEXTS, LABELS, tokenizer, 6), tokenize(TEXTS, LABELS, tokenizer, 6)
    )
    assert len(list(folder.iterdir())) == 1


def test_what_is_asked_is_stored_and_chat_templates_are_kept_apart(folder):
    texts = [(json.dumps({"prompt": WORDS[i % 9], "completion": "is"}),) for i in range(1200)]
    for template in (CHATML, CHATML, CHATML + " "):
        tokens = stored_tokens(render, texts, LABELS, chat_tokenizer(template))
        assert isinstance(tokens.asked, np.memmap)
    expected = render(texts, LABELS, chat_tokenizer())
    assert_same(tokens, expected)
    np.testing.assert_array_equal(tokens.asked, expected.asked)
    assert len(list(folder.iterdir())) == 2
