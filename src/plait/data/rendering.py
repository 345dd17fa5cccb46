"""What a language model reads of a row, and which of its tokens it learns.

A conversation is what the tokenizer's chat template makes of it, and what the assistant says in it
is learned, with the token that ends its turn. A prompt and a completion that are strings are one
text with nothing between them, as in TRL, whether or not there is a chat template, and the
completion is learned. Of a plain text all is learned. Each row ends with the last token that is
learned: from what would follow nothing can be. That is an end token: the template's, or else EOS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from plait.config import Config
from plait.data.objectives import LANGUAGE, Objective
from plait.data.sources import say
from plait.data.tasks import Rows
from plait.data.tokens import Tokens, tokenize

Row = dict[str, Any]
"""What is learned, as conversations.py has it."""
Turns = list[dict[str, str]]
Spans = list[tuple[int, int]]
"""Where in a text what is learned begins and ends, in characters."""

_ROWS = 500
"""So many rows have the places of their tokens in memory at once."""

_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""Before a template that writes the date: tomorrow, the same rows are to have the same tokens."""


Made = Callable[..., Tokens]
"""Calls what makes tokens with its arguments: `stored_tokens`, or `operator.call`, at once."""


def tokens_of(
    objective: Objective, rows: Rows, tokenizer: Any, config: Config, made: Made
) -> Tokens:
    """The tokens of a split as an objective needs them, cut to `config.most_tokens`.

    Raises:
        ValueError: As `render` and `cut`.
    """
    if objective is LANGUAGE:
        return cut(made(render, rows.texts, rows.labels, tokenizer), rows.texts, config)
    return made(tokenize, rows.texts, rows.labels, tokenizer, config.most_tokens)


def render(texts: Sequence[tuple[str, ...]], labels: np.ndarray, tokenizer: Any) -> Tokens:
    """The tokens of rows as conversations.py has them, whole, with what is learned of them.

    Args:
        texts: One string of JSON for each row.
        labels: (texts,) the groups.
        tokenizer: Of transformers; a fast one, with an EOS, and with a chat template if rows are
            conversations.

    Raises:
        ValueError: It lacks one of these, or its template can't tell what is learned.
    """
    _check(tokenizer)
    template = Template(tokenizer)
    rows = [json.loads(text) for (text,) in texts]
    parts = [part for some in _batches(rows) for part in _tokens_of(some, template)]
    ids = np.concatenate([part for part, _ in parts])
    return Tokens(
        ids=ids,
        types=np.zeros_like(ids),
        offsets=np.concatenate([[0], np.cumsum([len(part) for part, _ in parts])]).astype(np.int64),
        labels=labels,
        asked=np.concatenate([asked for _, asked in parts]),
    )


def cut(tokens: Tokens, texts: Sequence[tuple[str, ...]], config: Config) -> Tokens:
    """The first `most_tokens` tokens of each row; a line says how many rows are longer.

    Raises:
        ValueError: Rows of which nothing is left to be learned, unless `skip_bad_rows`: then no
            token of theirs is asked.
    """
    most = config.most_tokens
    long = int((tokens.lengths > most).sum())
    if long:
        say(f"{long} of {len(tokens)} rows are cut to {most} tokens; --max-length says how many.")
        places = np.arange(len(tokens.ids)) - np.repeat(tokens.offsets[:-1], tokens.lengths)
        kept = places < most
        assert tokens.asked is not None
        tokens = Tokens(
            ids=tokens.ids[kept],
            types=tokens.types[kept],
            offsets=np.concatenate([[0], np.cumsum(np.minimum(tokens.lengths, most))]),
            labels=tokens.labels,
            asked=(tokens.asked & (places < most - 1))[kept],
        )
    _refuse_unasked(tokens, texts, config)
    return tokens


def _refuse_unasked(tokens: Tokens, texts: Sequence[tuple[str, ...]], config: Config) -> None:
    empty = np.flatnonzero(np.diff(tokens.asked_offsets) == 0)
    if len(empty) == 0:
        return
    line = (
        f"{len(empty)} of {len(tokens)} rows have a prompt of {config.most_tokens} tokens or more, "
        f"which leaves nothing to learn: the first begins {_beginning(texts[empty[0]][0])!r}."
    )
    if not config.skip_bad_rows:
        raise ValueError(f"{line} Raise --max-length, or leave them out with --skip-bad-rows.")
    say(f"{line} They are left out.")


def _beginning(text: str) -> str:
    row = json.loads(text)
    turns = _turns(row)
    return str(turns[0]["content"] if turns else row.get("prompt", ""))[:60]


def _check(tokenizer: Any) -> None:
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of {name} is a slow one; take a model with tokenizer.json."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {name} has no EOS, and a model that never sees one never learns to "
            "stop. Name one as eos_token in its tokenizer_config.json, or take another model."
        )


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows in their order, conversations apart from texts, not too many at once."""
    for _, some in groupby(enumerate(rows), lambda x: (x[0] // _ROWS, bool(_turns(x[1])))):
        yield [row for _, row in some]


def _turns(row: Row) -> Turns:
    """The turns of a conversation; none of texts."""
    parts = [row.get(name) for name in ("messages", "prompt", "completion")]
    return [turn for part in parts if isinstance(part, list) for turn in part]


def _tokens_of(rows: Sequence[Row], template: Template) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row's tokens, and which of them ask for their next one."""
    chat = bool(_turns(rows[0]))
    read = [template.conversation(row) if chat else _plain(row) for row in rows]
    encoded = template.tokenizer(
        [text for text, _ in read],
        add_special_tokens=not chat,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for ids, places, (_, spans) in zip(
        encoded["input_ids"], encoded["offset_mapping"], read, strict=True
    ):
        begins, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
        learned = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            learned |= (begins < end) & (ends > begin)
        size = int(np.flatnonzero(learned)[-1]) + 1 if learned.any() else len(ids)
        yield template.ended(ids[:size], learned[:size])


def _plain(row: Row) -> tuple[str, Spans]:
    prompt = row.get("prompt", "")
    text = prompt + (row["text"] if "text" in row else row["completion"])
    return text, [(len(prompt), len(text))]


def prompt_of(row: Row) -> Row:
    """What a model is given that is to answer a row: all before its last answer."""
    if isinstance(row.get("completion"), str) or "text" in row:
        return {"prompt": row.get("prompt", "")}
    turns = list(row["prompt"]) if "prompt" in row else list(row["messages"])
    while "prompt" not in row and turns[-1]["role"] != "user":
        turns.pop()
    return {"prompt": turns}


def prompt_tokens(prompt: Row, template: Template) -> list[int]:
    """The tokens of a prompt, as it begins what is learned: a conversation is the model's to go on.

    Raises:
        ValueError: As `render`.
    """
    turns = _turns(prompt)
    text = template.render(turns, opened=True) if turns else prompt["prompt"]
    ids: list[int] = template.tokenizer(text, add_special_tokens=not turns)["input_ids"]
    if not turns and ids and ids[-1] == template.tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids or [template.tokenizer.bos_token_id or template.tokenizer.eos_token_id]


# -- conversations


class Template:
    """A tokenizer's chat template, and how a turn ends in it: with one of the `special` tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """Read the tokenizer; one without a template will do for rows that are texts."""
        special = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.tokenizer = tokenizer
        self.special = {*special, tokenizer.eos_token_id}
        names = sorted((token.content for token in special.values()), key=len, reverse=True)
        eos = re.escape(tokenizer.eos_token)  # in Cohere's after the end of the answer
        self._end = re.compile(rf"\s*(?:{'|'.join(map(re.escape, names))})(?:{eos})?")

    def ended(self, ids: list[int], learned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A row's tokens with an end token, and which of them ask for their next one."""
        if not ids or ids[-1] not in self.special:
            ids, learned = [*ids, self.tokenizer.eos_token_id], np.append(learned, True)
        return np.array(ids, dtype=np.int32), np.append(learned[1:], False)

    def conversation(self, row: Row) -> tuple[str, Spans]:
        """The text of a conversation, and where the assistant says in it what is learned."""
        turns, first = _turns(row), len(row.get("prompt", ()))
        answers = [i for i in range(first, len(turns)) if turns[i]["role"] == "assistant"]
        text = self.render(turns)
        begins = [self._begin(turns[:i], text) for i in answers]
        ends = [*begins[1:], len(text)]
        said = [turns[i]["content"].strip() for i in answers]
        return text, [
            (begin, self._end_of(words, text, begin, end))
            for words, begin, end in zip(said, begins, ends, strict=True)
        ]

    @cached_property
    def _text(self) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no chat template, and rows "
                "are conversations: take an instruct model, or rows with text, or with prompt and "
                "completion as strings."
            )
        return _DATE + str(self.tokenizer.get_chat_template())

    def render(self, turns: Turns, *, opened: bool = False) -> str:
        """A conversation as text; `opened` has the beginning of the assistant's turn after it."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, chat_template=self._text, tokenize=False, add_generation_prompt=opened
                )
            )
        except Exception as error:  # what a template raises is its own
            raise ValueError(
                f"The chat template of {self.tokenizer.name_or_path} refuses a row ({error}); it "
                f"begins {turns[0]['content'][:60]!r}."
            ) from error

    def _begin(self, before: Turns, text: str) -> int:
        """Where an answer begins: after what a model is given that is to answer."""
        prompt = self.render(before, opened=True)
        if not text.startswith(prompt):
            raise ValueError(self._unclear())
        return len(prompt)

    def _end_of(self, words: str, text: str, begin: int, end: int) -> int:
        """Where an answer ends that is between `begin` and `end`, its end token included."""
        at = text.find(words, begin, end)
        if at < 0:
            raise ValueError(self._unclear())
        found = self._end.match(text, at + len(words))
        return found.end() if found else at + len(words)

    def _unclear(self) -> str:
        return (
            f"The chat template of {self.tokenizer.name_or_path} writes a conversation otherwise "
            "when it goes on or is answered, so what the assistant says in it can't be told. Give "
            "rows with one answer, or the tokenizer a template that keeps to what it wrote."
        )
