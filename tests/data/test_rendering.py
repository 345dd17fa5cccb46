"""What is asked of a row: completions and the assistant's turns, with their ends, or all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conftest import CHATML, chat_tokenizer
from plait.config import Config
from plait.data import sources
from plait.data.rendering import cut, render


@pytest.fixture(autouse=True)
def nothing_said():
    sources._SAID.clear()


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return [{"role": roles[i % len(roles)], "content": c} for i, c in enumerate(contents)]


def rendered(*rows, tokenizer=None):
    texts = [(json.dumps(row),) for row in rows]
    return render(texts, np.zeros(len(rows), np.int64), tokenizer or chat_tokenizer())


def shown(tokens, tokenizer=None):
    """Each row with what is learned of it in brackets."""
    tokenizer = tokenizer or chat_tokenizer()
    texts = []
    for i in range(len(tokens)):
        span = slice(tokens.offsets[i], tokens.offsets[i + 1])
        learned = np.append(False, tokens.asked[span][:-1])
        assert not tokens.asked[span][-1]
        edges = np.flatnonzero(np.diff(learned)) + 1
        pieces = [tokenizer.decode(piece) for piece in np.split(tokens.ids[span], edges)]
        texts.append("".join(f"[{p}]" if k % 2 else p for k, p in enumerate(pieces)))
    return texts


START, END = "<|im_start|>", "<|im_end|>"


def test_only_the_assistants_turns_are_learned_with_their_ends():
    row = {"messages": turns("be", "hi", "yes é", first="system") + turns("and", "no")}
    text = (
        f"{START}system\nbe{END}\n{START}user\nhi{END}\n{START}assistant\n[yes é{END}]\n"
        f"{START}user\nand{END}\n{START}assistant\n[no{END}]"
    )
    tokens = rendered(row)
    assert shown(tokens) == [text]
    whole = chat_tokenizer().apply_chat_template(row["messages"])["input_ids"]
    assert tokens.ids.tolist() == whole[:-1]  # after the last end, ChatML has a new line


def test_of_a_completion_that_is_a_conversation_only_its_own_turns_are_learned():
    row = {"prompt": turns("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}
    (text,) = shown(rendered(row))
    assert text.endswith(f"[d{END}]")
    assert text.count("[") == 1


def test_texts_are_learned_whole_and_completions_alone_and_both_end():
    tokens = rendered({"text": "a film"}, {"prompt": "Q: é\n", "completion": "yes"}, {"text": ""})
    assert shown(tokens) == [f"a[ film{END}]", f"Q: é\n[yes{END}]", END]
    assert tokens.offsets.tolist() == [0, 7, 17, 18]


def test_eos_ends_a_turn_that_the_template_leaves_open():
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "<|end|>",
    )
    tokens = rendered({"messages": turns("hi", " yes ")}, tokenizer=tokenizer)
    assert shown(tokens, tokenizer) == ["user: hi\nassistant: [ yes<|end|>]"]


def test_eos_after_another_end_is_learned_too():
    both = CHATML.replace("<|im_end|>", "<|im_end|><|end|>")
    tokenizer = chat_tokenizer(both, eos="<|end|>")
    (text,) = shown(
        rendered({"messages": turns("a", "b", "c", "d")}, tokenizer=tokenizer), tokenizer
    )
    assert f"[b{END}<|end|>]\n{START}user" in text
    assert text.endswith(f"[d{END}<|end|>]")


QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_thinks_in_the_last_turn_alone_is_understood():
    (text,) = shown(
        rendered({"messages": turns("a", "b", "c", "b")}, tokenizer=chat_tokenizer(QWEN3))
    )
    assert text.count("[") == 2
    assert f"assistant\n[b{END}]\n{START}user" in text
    assert text.endswith(f"assistant\n[<think>\n\n</think>\n\nb{END}]")


BACKWARDS = "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}"
REFUSED = {
    "none": (None, "has no chat template, and rows are conversations: take an instruct"),
    "backwards": (BACKWARDS, "otherwise when it goes on or is answered"),
    "shouting": (
        CHATML.replace("m.content", "m.content | upper"),
        "otherwise when it goes on or is answered",
    ),
    "raising": ("{{ raise_exception('no tools') }}", r"refuses a row \(no tools\); it begins 'hi'"),
}


@pytest.mark.parametrize(("template", "message"), REFUSED.values(), ids=REFUSED)
def test_templates_that_tell_nothing_are_refused(template, message):
    with pytest.raises(ValueError, match=message) as error:
        rendered({"messages": turns("hi", "yes")}, tokenizer=chat_tokenizer(template))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ValueError, match="has no EOS"):
        rendered({"text": "a"}, tokenizer=chat_tokenizer(eos=None))


def test_the_date_is_the_same_tomorrow():
    tokenizer = chat_tokenizer("{{ strftime_now('%d') }} " + CHATML)
    assert shown(rendered({"messages": turns("a", "b")}, tokenizer=tokenizer))[0].startswith(
        "26 Jul 2024 <"
    )


# -- cut to max_length


def test_rows_are_cut_from_the_end_and_counted(caplog):
    rows = [{"text": "abcdef"}, {"text": "abc"}, {"prompt": "abc", "completion": "defgh"}]
    texts = [(json.dumps(row),) for row in rows]
    tokens = cut(rendered(*rows), texts, Config(max_length=4))
    assert shown(tokens) == ["a[bcd]", f"a[bc{END}]", "abc[d]"]
    assert tokens.offsets.tolist() == [0, 4, 8, 12]
    assert "2 of 3 rows are cut to 4 tokens" in caplog.text
    whole = rendered(*rows)
    assert cut(whole, texts, Config(max_length=9)) is whole


def test_a_prompt_that_leaves_nothing_is_refused_or_left_out(caplog):
    rows = [{"text": "abcdef"}, {"prompt": "wxyz", "completion": "defgh"}]
    texts = [(json.dumps(row),) for row in rows]
    with pytest.raises(ValueError, match=r"1 of 2 rows have a prompt of 4 tokens .* begins 'wxyz'"):
        cut(rendered(*rows), texts, Config(max_length=4))
    tokens = cut(rendered(*rows), texts, Config(max_length=4, skip_bad_rows=True))
    assert np.diff(tokens.asked_offsets).tolist() == [3, 0]
    assert "They are left out" in caplog.text
