"""What a language model writes: greedy answers to prompts, one after another, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from plait.data.rendering import Row, Template, prompt_tokens


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[str | Row], max_new_tokens: int
) -> list[str]:
    """What a model answers to prompts, in their order; the likeliest token each time.

    Args:
        model: A causal language model of transformers, PEFT or `load`.
        tokenizer: Its tokenizer.
        prompts: What a user says, in the tokenizer's chat template or, if it has none, as it is;
            or `{"prompt": ...}` as conversations.py has it.
        max_new_tokens: An answer ends after so many tokens, or with a special one.

    Raises:
        ValueError: Prompts are conversations, and there is no chat template.
    """
    template = Template(tokenizer)
    return [_answer(model, template, _row(one, tokenizer), max_new_tokens) for one in prompts]


def _row(prompt: str | Row, tokenizer: Any) -> Row:
    if not isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        return {"prompt": prompt}
    return {"prompt": [{"role": "user", "content": prompt}]}


def _answer(model: Any, template: Template, prompt: Row, max_new_tokens: int) -> str:
    ids = torch.tensor([prompt_tokens(prompt, template)], device=model.device)
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(template.special),
        pad_token_id=template.tokenizer.eos_token_id,
    )
    text = template.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text).strip()
