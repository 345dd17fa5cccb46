"""What a trained model writes, beside the base and the reference, and how alike they are.

`samples.jsonl` has a line for each prompt: `prompt`, `before` (the base), `after` (the averaged
model, or a peer's own) and `reference`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.config import Config
from plait.data.conversations import answer_of
from plait.data.rendering import Row, prompt_of
from plait.data.sources import say
from plait.data.tasks import Task
from plait.engines.evaluation import some_rows
from plait.engines.job import dealt
from plait.machine.extras import installed
from plait.machine.files import write_atomically
from plait.runs.answers import answer
from plait.runs.run_folder import SAMPLES, Sample
from plait.runs.trained import Client, find


def write_samples(
    folder: Path, config: Config, client: Client = "mean", task: Task | None = None
) -> dict[str, float]:
    """Have the base and the averaged or a client's model answer `generate_rows` held-out prompts.

    Args:
        folder: The run folder, its adapters written.
        config: The run's.
        client: Whose model.
        task: Whose held-out rows; those of the config's task for None.

    Returns:
        Figures for the summary; none where nothing is generated.
    """
    prompts, references = _held_out(config, task)
    if not prompts:
        return {}
    model, tokenizer = find(folder, client).load()
    after = answer(model, tokenizer, prompts, config.max_new_tokens)
    with model.disable_adapter():
        before = answer(model, tokenizer, prompts, config.max_new_tokens)
    samples = [
        {"prompt": shown(prompt), "before": old, "after": new, "reference": right}
        for prompt, old, new, right in zip(prompts, before, after, references, strict=True)
    ]
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in samples]
    write_atomically(folder / SAMPLES, "".join(lines))
    return likeness(samples)


def _held_out(config: Config, task: Task | None) -> tuple[list[Row], list[str]]:
    """Some rows' prompts, the same ones in every run, and their answers."""
    if not config.generate_rows:
        return [], []
    texts = (task or dealt(config)[0]).held_out(config.eval_split).texts
    chosen = some_rows(texts, config.generate_rows, "generate_rows")
    rows = [json.loads(texts[i][0]) for i in chosen]
    found = [(prompt_of(row), right) for row in rows if (right := answer_of(row)) is not None]
    if not found:
        say("rows are texts without prompts, so nothing is generated (--generate-rows).")
    return [prompt for prompt, _ in found], [right for _, right in found]


def shown(prompt: Row) -> str:
    """A prompt as one text, the turns of a conversation one under the other."""
    said: Any = prompt["prompt"]
    return said if isinstance(said, str) else "\n\n".join(turn["content"] for turn in said)


# -- how alike an answer and its reference are, each in [0, 1]


def exact_match(answer: str, reference: str) -> float:
    """1 if they are the same text, but for space and case."""
    return float(_plain(answer) == _plain(reference))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The number after `####`, as GSM8K ends its answers, or else the last one.

    Example:
        >>> last_number("9 eggs at $2 make 9 * 2 = 18. #### 18"), last_number("1,000.50 in all")
        (18.0, 1000.5)
    """
    _, mark, tail = text.rpartition("####")
    found = (_NUMBER.findall(tail)[:1] if mark else []) or _NUMBER.findall(text)[-1:]
    return float(found[0].replace(",", "")) if found else None


def numeric_match(answer: str, reference: str) -> float:
    """1 if they end in the same number."""
    number = last_number(answer)
    return float(number is not None and number == last_number(reference))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (rouge-score, with stemming)."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(
        RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure
    )


def likeness(samples: Sequence[Sample]) -> dict[str, float]:
    """Name -> mean over samples, of the averaged model, and with `_base` of the base.

    `numeric_match` only where all references have a number, `rouge_l` only where rouge-score is
    installed.
    """
    kinds: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match}
    if all(last_number(one["reference"]) is not None for one in samples):
        kinds["numeric_match"] = numeric_match
    if installed("rouge_score"):
        kinds["rouge_l"] = rouge_l
    else:
        say("ROUGE-L needs rouge-score: pip install 'plait[llm]'. It is left out.")
    return {
        name + end: float(np.mean([kind(one[said], one["reference"]) for one in samples]))
        for name, kind in kinds.items()
        for end, said in (("", "after"), ("_base", "before"))
    }
