"""What a run has trained, put to use: models that are loaded, asked, and handed on.

    export     a client's PEFT folder, complete: plait.json and the tokenizer's files beside it
    load       a run or such a folder -> model and tokenizer
    predict    texts -> labels and probabilities, or scores
    merge      one plain model of transformers, adapter and classifier in it

plait.json (`Card`) says what an adapter alone doesn't: the model that it belongs on, how its
classifier reads, the labels, and how texts were cut.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel

from plait.config import Config, Pooling
from plait.data.objectives import OBJECTIVES
from plait.data.sources import text_columns
from plait.events import Started
from plait.machine.files import read_json, write_atomically
from plait.model.loading import Loaded, draws_head, load_for, resolved, source_of
from plait.runs.model_card import model_card
from plait.runs.run_folder import BEST, load_config, load_start

CARD = "plait.json"
AT_ONCE = 32

Client = int | Literal["mean"]
Text = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What plait.json says of an adapter.

    Attributes:
        backbone: The model that it belongs on: a folder, a name on the hub, or one
            of `EMBEDDED`.
        pooling: `model` for the model's own head, `mean` for `MeanPooledClassifier`.
        objective: A key of `OBJECTIVES`.
        label_names: The classes, in the order of the outputs.
        max_length: Texts are cut to this number of tokens.
        text_columns: The columns of a file that texts are read from.
        seed: From it a head is drawn that the checkpoint doesn't have.
    """

    backbone: str
    pooling: Pooling
    objective: str
    label_names: tuple[str, ...]
    max_length: int
    text_columns: tuple[str, ...]
    seed: int

    @classmethod
    def of(cls, config: Config, started: Started) -> Card:
        """The card of a run's adapters."""
        return cls(
            backbone=resolved(config.backbone),
            pooling="model" if draws_head(config) else "mean",
            objective=started.objective,
            label_names=tuple(started.label_names),
            max_length=config.most_tokens,
            text_columns=text_columns(config),
            seed=config.seed,
        )

    @classmethod
    def read(cls, file: Path) -> Card:
        """The card in a file."""
        values = read_json(file)
        for name in ("label_names", "text_columns"):
            values[name] = tuple(values[name])
        return cls(**values)

    def write(self, file: Path) -> None:
        """Write plait.json."""
        write_atomically(file, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def base(self) -> Loaded:
        """The model without an adapter, its outputs named, and its tokenizer."""
        config = Config(backbone=self.backbone, pooling=self.pooling, seed=self.seed)
        return load_for(config, OBJECTIVES[self.objective], self.label_names)


@dataclass(frozen=True)
class Trained:
    """An adapter that was found: its PEFT folder, and its card."""

    folder: Path
    card: Card

    def load(self) -> tuple[PeftModel, Any]:
        """The model, in evaluation mode, and its tokenizer."""
        loaded = self.card.base()
        model = PeftModel.from_pretrained(loaded.model, str(self.folder)).eval()
        own = (self.folder / "tokenizer_config.json").is_file()
        return model, _tokenizer(self.folder) if own else loaded.tokenizer


def find(path: Path | str, client: Client = "mean") -> Trained:
    """The adapter of a client of a run, or the one that lies in a folder.

    Args:
        path: A run folder, of `plait run` or `plait up`, its `best/`, or a PEFT folder of plait's.
        client: Whose, of a run; the averaged one for `mean`.

    Raises:
        ValueError: It is neither, or the run has no such adapter.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        run = path.absolute().parent.parent
        here = (path / CARD).is_file()
        return Trained(path, Card.read(path / CARD) if here else card_of_run(run))
    inside = (path / "mean" / "adapter_config.json").is_file()
    adapters = path if inside else path / "adapters"
    folder = adapters / (client if client == "mean" else f"client-{client}")
    card = card_of_run(path.absolute().parent if inside else path)
    if not folder.is_dir():
        there = ", ".join(sorted(one.name for one in adapters.glob("*")))
        raise ValueError(f"{path} has no adapter {folder.name}; it has: {there or 'none'}.")
    return Trained(folder, card)


def card_of_run(run: Path) -> Card:
    """The card of a run's adapters, from its config and its first event.

    Raises:
        ValueError: The folder holds no run.
    """
    return Card.of(*_config_and_start(run))


def _config_and_start(run: Path) -> tuple[Config, Started]:
    # What `plait up` leaves has the events of each peer in its own folder.
    places = [run / "events.jsonl", *sorted(run.glob("federation/*/out/events.jsonl"))]
    events = next((place for place in places if place.is_file()), places[0])
    try:
        return load_config(run), load_start(events)
    except OSError as error:
        raise ValueError(f"{run} is not a run folder: {error.filename} is missing.") from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


# -- for Python: plait.load_base, plait.load


def load_base(run: Path | str) -> Any:
    """The model of a run without any adapter: what `PeftModel.from_pretrained` takes as its base.

    Its config names the labels (`id2label`).

    Args:
        run: A run folder, of `plait run` or `plait up`, or an exported adapter's.

    Raises:
        ValueError: The folder holds no run, or its backbone can't be loaded.

    Example:
        >>> base = load_base("runs/demo")  # doctest: +SKIP
        >>> model = PeftModel.from_pretrained(base, "runs/demo/adapters/mean")  # doctest: +SKIP
    """
    path = Path(run)
    alone = (path / "adapter_config.json").is_file()
    card = find(path).card if alone else card_of_run(path)
    return card.base().model.eval()


def load(path: Path | str, client: Client = "mean") -> tuple[PeftModel, Any]:
    """The trained model, ready to use, and its tokenizer.

    Args:
        path: A run folder, its `best/` where it has one, or one that `plait export` wrote.
        client: Whose model, of a run; the averaged one for `mean`.

    Raises:
        ValueError: There is no such adapter, or the model that it belongs on can't be loaded.

    Example:
        >>> model, tokenizer = load("adapters/three")  # doctest: +SKIP
        >>> model(**tokenizer("Who was it?", return_tensors="pt")).logits  # doctest: +SKIP
    """
    return find(path, client).load()


# -- answers


@dataclass(frozen=True)
class Prediction:
    """What a model says of a text.

    Attributes:
        label: The most probable class; empty for a regression.
        score: Its probability, or the score of a regression.
        probabilities: Class -> its probability; empty for a regression.
    """

    label: str
    score: float
    probabilities: dict[str, float]


@torch.no_grad()
def predict(
    model: Any, tokenizer: Any, texts: Sequence[Text], label_names: Sequence[str], max_length: int
) -> list[Prediction]:
    """What a model says of texts, or of pairs of texts; in their order.

    Args:
        model: Of transformers, PEFT or `load`; with one output it gives scores.
        tokenizer: Its tokenizer.
        texts: A string each, or a tuple of two.
        label_names: The classes, in the order of the outputs; none for a regression.
        max_length: Texts are cut to this number of tokens.
    """
    rows = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("Some texts are pairs and some are not; give one or the other.")
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))  # less padding
    outputs = np.zeros((len(rows), len(label_names) or 1))
    for begin in range(0, len(rows), AT_ONCE):
        some = order[begin : begin + AT_ONCE]
        columns = [list(column) for column in zip(*(rows[i] for i in some), strict=True)]
        batch = tokenizer(
            *columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
        )
        logits = model(**batch).logits.float()
        outputs[some] = logits.softmax(dim=-1).numpy() if label_names else logits.numpy()
    return [_prediction(row, label_names) for row in outputs.tolist()]


def _prediction(row: list[float], label_names: Sequence[str]) -> Prediction:
    if not label_names:
        return Prediction("", row[0], {})
    probabilities = dict(zip(label_names, row, strict=True))
    label = max(probabilities, key=probabilities.__getitem__)
    return Prediction(label, probabilities[label], probabilities)


# -- folders for others


def export(run: Path, client: int | None, out: Path) -> None:
    """Write an adapter of a finished run as a folder that `load` reads by itself.

    Args:
        run: The run folder, its `best/`, or the folder of one adapter.
        client: Whose adapter; the averaged one for None.
        out: The PEFT folder to write: the adapter, plait.json, README.md (its model card), and the
            tokenizer's files.

    Raises:
        ValueError: The run has no such adapter, or `out` exists.
    """
    found = find(run, "mean" if client is None else client)
    _need_new(out)
    tokenizer = found.card.base().tokenizer
    shutil.copytree(found.folder, out)
    tokenizer.save_pretrained(str(out))
    found.card.write(out / CARD)
    kind = found.folder.absolute().parent
    if not (found.folder / CARD).is_file() and (kind.parent / "summary.json").is_file():
        _, started = _config_and_start(kind.parent)
        best = kind.name == BEST
        card = model_card(kind.parent, started, found.folder.name, out.name, best)
        write_atomically(out / "README.md", card)
    file = out / "adapter_config.json"
    source = source_of(found.card.backbone)
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": source}
    write_atomically(file, json.dumps(settings, indent=2) + "\n")


def merge(path: Path, client: Client, out: Path) -> None:
    """Write one plain model, which transformers' Auto classes and `pipeline` load.

    Args:
        path: A run folder, or one that `export` wrote.
        client: Whose model, of a run; the averaged one for `mean`.
        out: The folder to write.

    Raises:
        ValueError: There is no such adapter, `out` exists, or the classifier is mean-pooled,
            which no class of transformers computes.
    """
    found = find(path, client)
    if found.card.pooling == "mean":
        raise ValueError(
            "Its classifier reads the mean of the last hidden states, and no class of transformers "
            "computes that. `plait export` writes a folder that plait.load and `plait predict` "
            "read; --pooling model trains the architecture's own head, which can be merged."
        )
    _need_new(out)
    model, tokenizer = found.load()
    model.merge_and_unload().save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


def _need_new(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} already exists; take another --out.")
