"""What a run read, as hashes: so that it is not resumed, or its old result shown, with other files.

A config names files; what was in them is part of a run as well. Texts, labels and keys are hashed
as they were understood, graphs and label mixtures as files. Of weights, which may be gigabytes,
only the size and some blocks are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from plait.config import Config
from plait.data.objectives import LANGUAGE
from plait.data.tasks import Rows, Task
from plait.engines.job import dealt
from plait.methods import settled
from plait.model.backbone import Backbone
from plait.model.loading import backbone_folder
from plait.plugins import plugin_files

SMALL_BYTES = 4 << 20
BLOCKS, BLOCK_BYTES = 64, 16 << 10
"""A file above `SMALL_BYTES` is hashed by its size and so many blocks, evenly spread."""

MODEL_FILES = (
    "config.json", "modules.json", "tokenizer.json", "tokenizer_config.json", "vocab.*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.safetensors",
    "pytorch_model*.bin", "chat_template*",
)  # fmt: skip
"""What transformers reads of a model folder."""


def fingerprints(config: Config, own: Task | None = None) -> dict[str, str]:
    """What was read -> a hash of it, for all that a config has a run read.

    Args:
        config: The settings.
        own: The rows of a peer that has its own.

    Raises:
        ValueError: Data that is not there or makes no sense, as `prepare` does.
    """
    config = settled(config)
    task, shares = dealt(config, own)
    return of_rows(task, shares) | {
        name: mark for name, of in FILES.items() if (mark := of(config)) is not None
    }


PROBE = "It isn't 1,234.5 cafés, VITAL ﬁne 東京?\n\n\tЩи  def f(x_1): return x**2\r\n🙂"
"""Tokenizers with the same words that read them otherwise, read this otherwise, too."""


def of_model(backbone: Backbone) -> dict[str, str]:
    """The hashes of what computes and reads texts: equal for equal ones, in whatever files."""
    tokenizer = backbone.tokenizer
    words = (f"{number} {word}" for word, number in sorted(tokenizer.get_vocab().items()))
    read = (
        tokenizer(PROBE)["input_ids"],
        tokenizer.eos_token_id,
        sorted(tokenizer.all_special_ids),
    )
    found = {
        "weights_hash": backbone.weights_hash,
        "tokenizer_hash": _hash(map(_encoded, (*words, str(read)))),
    }
    if backbone.objective is LANGUAGE:
        found["chat_template_hash"] = _hash([_encoded(str(tokenizer.chat_template))])
    return found


def of_rows(task: Task, shares: Sequence[np.ndarray]) -> dict[str, str]:
    """The hashes of the splits and of every client's share."""
    return {
        "label names": _hash(name.encode() for name in task.label_names),
        "training rows": _of_split(task.train),
        "validation rows": _of_split(task.validation),
        "test rows": _of_split(task.test),
        "clients' shares": of_arrays(shares),
    }


def of_arrays(arrays: Iterable[np.ndarray]) -> str:
    """The hash of arrays, each with its length."""
    return _hash(np.ascontiguousarray(array).tobytes() for array in arrays)


def of_file(path: Path) -> str:
    """The hash of a file; of a large one, its size and some blocks."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= SMALL_BYTES:
            return _hash([file.read()])
        blocks = []
        for place in np.linspace(0, size - BLOCK_BYTES, BLOCKS).astype(int).tolist():
            file.seek(place)
            blocks.append(file.read(BLOCK_BYTES))
    return _hash([str(size).encode(), *blocks])


def _of_split(rows: Rows) -> str:
    texts = (_encoded(text) for row in rows.texts for text in row)
    keys = map(_encoded, rows.keys or ())
    return _hash([_hash(texts).encode(), rows.labels.tobytes(), _hash(keys).encode()])


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _hash(parts: Iterable[bytes]) -> str:
    """Of parts, each with its length, so that none can run into the next."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:16]


def _mixtures(config: Config) -> str | None:
    skew = config.label_skew or ""
    return of_file(Path(skew)) if skew.endswith(".json") else None


def _edges(config: Config) -> str | None:
    used = config.topology == "file" and config.edges_file
    return of_file(Path(config.edges_file or "")) if used else None


def _backbone(config: Config) -> str | None:
    """Of a model folder; one of the hub's cache is called by its commit."""
    folder = backbone_folder(config.backbone)
    if folder is None:
        return None
    if folder.parent.name == "snapshots":
        return folder.name[:16]
    files = sorted({path for name in MODEL_FILES for path in folder.glob(name)})
    return _hash(part.encode() for path in files for part in (path.name, of_file(path)))


def _plugins(config: Config) -> str | None:
    files = plugin_files(config.plugin)
    return _hash(of_file(path).encode() for path in files) if files else None


FILES: dict[str, Callable[[Config], str | None]] = {
    "label mixtures": _mixtures,
    "edges": _edges,
    "backbone": _backbone,
    "plugins": _plugins,
}
"""What else was read -> its hash; None where the config has none."""
