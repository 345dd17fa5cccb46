"""Tokenised splits on disk: tokenised once, then mapped into memory by every run and process.

A split's folder is named by a hash of the texts, the tokenizer with its chat template and the cut
length, so nothing in it can be out of date. It holds plain .npy files. Only tasks that a run deals
to its clients come here; a peer's own rows leave no copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.data.tokens import Tokens
from plait.machine.files import make_folder

FORMAT = 2
"""Goes into the hash; another number after a change of what is stored."""

ARRAYS = ("ids", "types", "offsets", "asked")

FEW = 1000
"""Fewer texts are tokenised in the time that reading them takes, and leave nothing on disk."""


def cache_dir() -> Path:
    """`$PLAIT_CACHE`, or `plait` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PLAIT_CACHE") or Path(base) / "plait")


def stored_tokens(
    make: Callable[..., Tokens],
    texts: Sequence[tuple[str, ...]],
    labels: np.ndarray,
    tokenizer: Any,
    *settings: int,
) -> Tokens:
    """As `make`, which is `tokenize` or `render`, from the store, and put there where it isn't.

    Where the store can't be written, the texts are tokenised all the same.
    """
    if len(texts) < FEW or not tokenizer.is_fast:
        return make(texts, labels, tokenizer, *settings)
    folder = cache_dir() / "tokens" / _digest(make, texts, tokenizer, settings)
    if not folder.exists():
        tokens = make(texts, labels, tokenizer, *settings)
        try:
            make_folder(folder, lambda partial: _write(tokens, partial))
        except OSError:
            return tokens
    names = [name for name in ARRAYS if (folder / f"{name}.npy").exists()]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    return Tokens(**arrays, labels=labels)


def _digest(
    make: Callable[..., Tokens],
    texts: Sequence[tuple[str, ...]],
    tokenizer: Any,
    settings: Sequence[int],
) -> str:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    del spec["truncation"], spec["padding"]  # what the last call left there
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    how = [FORMAT, make.__name__, *settings, tokenizer.truncation_side, spec, special]
    digest = hashlib.sha256(json.dumps([*how, tokenizer.chat_template]).encode())
    digest.update(json.dumps(texts).encode())
    return digest.hexdigest()[:32]


def _write(tokens: Tokens, folder: Path) -> None:
    for name in ARRAYS:
        if getattr(tokens, name) is not None:
            np.save(folder / f"{name}.npy", getattr(tokens, name))
