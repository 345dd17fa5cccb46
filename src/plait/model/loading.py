"""Loading the frozen model: from the embedded package, a local folder, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from plait.config import Config
from plait.data.objectives import LANGUAGE, Objective
from plait.data.sources import check_folder, say
from plait.model.embedded import EMBEDDED
from plait.model.heads import MeanPooledClassifier
from plait.rng import torch_stream


@dataclass(frozen=True)
class Loaded:
    """A model as PEFT would load an adapter onto it.

    Attributes:
        model: A sequence classification or causal language model of transformers, or
            `MeanPooledClassifier`.
        tokenizer: Its tokenizer.
        fresh: Modules that the checkpoint had no weights for, drawn from the run's seed. They go
            into the adapter folder, trained or not: elsewhere they would be drawn differently.
    """

    model: Any
    tokenizer: Any
    fresh: tuple[str, ...]

    @property
    def drawn(self) -> tuple[str, ...]:
        """The modules whose weights are no checkpoint's."""
        return ("classifier",) if isinstance(self.model, MeanPooledClassifier) else self.fresh

    @property
    def weights_hash(self) -> str:
        """`hash_of_weights` of what was loaded; what was drawn here doesn't count."""
        return hash_of_weights(
            value
            for name, value in self.model.named_parameters()
            if name.rpartition(".")[0] not in self.drawn
        )


def hash_of_weights(values: Iterable[Tensor]) -> str:
    """Sixteen hex digits that are equal for equal weights, in whatever files and precision.

    Every entry counts, rounded to bfloat16.
    """
    found = hashlib.sha256()
    for value in values:
        rounded = value.detach().cpu().to(torch.bfloat16).flatten()
        found.update(rounded.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def load_for(config: Config, objective: Objective, label_names: tuple[str, ...] = ()) -> Loaded:
    """Load the model that `config.backbone` names, with the head that an objective needs.

    Raises:
        ValueError: As `load_model`.
    """
    if objective is LANGUAGE:
        return load_language_model(config)
    loaded = load_model(config, objective.num_outputs(label_names), label_names)
    with_labels(loaded.model, objective, label_names)
    return loaded


def load_language_model(config: Config) -> Loaded:
    """Load the causal language model that `config.backbone` names.

    Raises:
        ValueError: The folder or the name on the hub can't be loaded, with what to do.
    """
    tokenizer, model, report = _loaded(config, AutoModelForCausalLM)
    _check_whole(config.backbone, report, model)
    if report["missing_keys"]:
        raise ValueError(
            f"The backbone {config.backbone!r} is no language model: its checkpoint has no "
            f"{min(report['missing_keys'])}. Give a model that writes text, such as `smollm2` "
            "or another instruct model."
        )
    return Loaded(model, tokenizer, ())


def load_model(config: Config, num_labels: int, label_names: Sequence[str] = ()) -> Loaded:
    """Load the model that `config.backbone` names.

    Args:
        config: Backbone, pooling, and the seed that what is missing is drawn from.
        num_labels: The outputs that are needed.
        label_names: The classes in the data's order: a checkpoint that has outputs of the same
            names gets them in this order, one with other classes a new output layer.

    Raises:
        ValueError: The folder or the name on the hub can't be loaded, with what to do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_stream(config.seed, "head").initial_seed())
        if draws_head(config):
            tokenizer, model, report = _loaded(
                config,
                AutoModelForSequenceClassification,
                num_labels=num_labels,
                ignore_mismatched_sizes=True,
            )
        else:
            tokenizer, model, report = _loaded(config, AutoModel)
        _check_whole(config.backbone, report, model)
        if not draws_head(config):
            return Loaded(MeanPooledClassifier(model, num_labels), tokenizer, ())
        own = AutoConfig.from_pretrained(source_of(config.backbone))
        if {key for key, *_ in report["mismatched_keys"]}:
            _say_new_head(config.backbone, own)
        elif not report["missing_keys"]:
            match_outputs(config.backbone, model, own, label_names)
    fresh = {name.rpartition(".")[0] for name in report["missing_keys"]}
    return Loaded(model, tokenizer, tuple(sorted(fresh)))


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of the model that `config.backbone` names.

    Raises:
        ValueError: As `load_model`.
    """
    tokenizer = _asked_for(config, AutoTokenizer)
    _check_tokenizer(config.backbone, tokenizer)
    return tokenizer


def _loaded(config: Config, kind: Any, **settings: Any) -> tuple[Any, Any, Any]:
    """Tokenizer, model, and which weights the checkpoint had and hadn't."""
    tokenizer = load_tokenizer(config)
    # Weights that are kept in few bits needn't be float32 before that.
    dtype = "auto" if config.load_in else torch.float32
    how = {"dtype": dtype, "return_dict": True, "output_loading_info": True, **settings}
    model, report = _asked_for(config, kind, **how)
    return tokenizer, model, report


def _asked_for(config: Config, kind: Any, **settings: Any) -> Any:
    """What transformers loads for the backbone."""
    source = source_of(config.backbone)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # Without a word on it transformers would ask whether to run code of the folder's.
        return kind.from_pretrained(source, trust_remote_code=False, **settings)
    except Exception as error:  # whatever a library raises for a broken folder
        if pointers := _pointers(Path(source)):
            raise ValueError(
                f"The backbone {config.backbone!r} has pointers of Git LFS in the place of "
                f"{', '.join(pointers)}: run `git lfs pull` in it, or download the files."
            ) from error
        raise ValueError(
            f"The backbone {config.backbone!r} can't be loaded: {telling_line(error)} "
            "Give a local model folder, a name on the hub, `minilm`, or `smollm2`."
        ) from error


def _pointers(folder: Path) -> list[str]:
    """The files of a folder that Git LFS has not fetched."""
    small = (file for file in folder.glob("*") if file.is_file() and file.stat().st_size < 1000)
    return sorted(
        file.name for file in small if file.read_bytes().startswith(b"version https://git-lfs")
    )


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


def telling_line(error: Exception) -> str:
    """The first line of a library's message that says something, after the kind of error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else "no message"
    if line.endswith(":") and len(lines) > 1:
        line = f"{line} {lines[1]}"
    line = line if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"
    return line if line.endswith((".", "!", "?")) else f"{line}."


def match_outputs(backbone: str, model: Any, own: Any, label_names: Sequence[str]) -> None:
    """Put the outputs of a finished classifier into the data's order, by their names.

    Names such as LABEL_0 say nothing, and leave the outputs as they are. Other classes than the
    data's get a new output layer.
    """
    names = [str(name) for _, name in sorted(own.id2label.items())]
    theirs, ours = ([_plain(name) for name in some] for some in (names, label_names))
    matched = set(theirs) == set(ours) and len(theirs) == len(set(theirs))
    unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    if not label_names or (unnamed and not matched):
        return
    layers = _output_layers(model, len(ours))
    with torch.no_grad():
        if matched:
            order = [theirs.index(name) for name in ours]
            for parameter in (p for layer in layers for p in layer.parameters()):
                parameter.copy_(parameter[order].clone())
            return
        _say_new_head(backbone, own)
        for layer in layers:
            layer.weight.normal_(std=getattr(own, "initializer_range", 0.02))
            if layer.bias is not None:
                layer.bias.zero_()


def _plain(name: str) -> str:
    return " ".join(re.sub("[_-]", " ", name).casefold().split())


def _output_layers(model: Any, num_labels: int) -> list[Any]:
    """The last linear layer outside the encoder, which makes the outputs."""
    inside = f"{model.base_model_prefix}."
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == num_labels
        and not name.startswith(inside)
    ]
    return linear[-1:]


def _say_new_head(backbone: str, own: Any) -> None:
    names = ", ".join(str(name) for _, name in sorted(own.id2label.items())[:6])
    say(
        f"the backbone {backbone} is a classifier of other classes ({names}; id2label in its "
        "config.json) than the data's: its output layer is drawn anew."
    )


def _check_tokenizer(backbone: str, tokenizer: Any) -> None:
    """That the tokenizer knows words: without its files transformers makes one that knows none."""
    special = set(tokenizer.all_special_tokens)
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values()}
    known = tokenizer.get_vocab().keys() - special
    if not any(character.isalnum() for token in known for character in str(token)):
        raise ValueError(
            f"The backbone {backbone!r} has no tokenizer: without a vocabulary every text would be "
            "unknown words. Put its tokenizer.json (or vocab.txt) into the folder."
        )


def _check_whole(backbone: str, report: Any, model: Any) -> None:
    """That nothing of the encoder has to be drawn but a pooler, which pretraining may leave out."""
    heads = {name for name, _ in model.named_children()} - {model.base_model_prefix}
    heads = heads if hasattr(model, model.base_model_prefix) else set()
    missing = [key for key, *_ in report["mismatched_keys"]] + sorted(report["missing_keys"])
    paths = [key.split(".") for key in missing]
    torn = [path for path in paths if path[0] not in heads and not any("pool" in x for x in path)]
    if torn:
        raise ValueError(
            f"The backbone {backbone!r} is torn: its checkpoint has no weights that fit for "
            f"{'.'.join(torn[0])} ({len(torn)} such). Copy the folder again, or mend its "
            "config.json."
        )


def draws_head(config: Config) -> bool:
    """Whether the model is loaded with its own head, which may have to be drawn from the seed.

    The linear layer of mean pooling starts at zero.
    """
    if config.pooling == "auto":
        return not is_sentence_encoder(source_of(config.backbone))
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
    source = source_of(backbone)
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
    return str(path.resolve()) if backbone not in EMBEDDED and path.is_dir() else backbone


def source_of(backbone: str) -> str:
    """What transformers is asked to load."""
    if backbone in EMBEDDED:
        return str(EMBEDDED[backbone]())
    path = Path(backbone).expanduser()
    if (path / "adapter_config.json").is_file():
        raise ValueError(_names_its_base(path))
    if path.is_dir():
        return str(path)
    check_folder(backbone)
    return backbone


def _names_its_base(folder: Path) -> str:
    """What to do with an adapter's folder."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, OSError):
        base = "the model that it was trained on"
    return (
        f"{folder} is a PEFT adapter, not a model; a run starts from its base: --backbone {base}. "
        "To start from the adapter itself, merge it into its base (merge_and_unload) and save that."
    )
