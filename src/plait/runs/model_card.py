"""The README.md of an adapter that is given away: the model card that hubs and people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from plait.config import Config
from plait.events import Started
from plait.figures import taken
from plait.machine.files import read_json
from plait.methods import METHODS
from plait.model.embedded import EMBEDDED
from plait.runs.run_folder import MADE_BY, load_config, load_finished, load_summary

TEXT = """
# {name}

A LoRA adapter for {base}, trained by {clients} clients that keep
their texts to themselves and exchange factors with their neighbours only. {whose}

| | |
|---|---|
{facts}

## How it does

| | {metric} |
|---|---|
{scores}

On the {split} rows of `{task}`, with one seed ({seed}): another seed deals other rows to the
clients, and may differ by more than methods do.

## How to use it

```python
import plait

model, tokenizer = plait.load("{folder}")
```

PEFT loads it, too: `PeftModel.from_pretrained(base, "{folder}")`.

## What to keep in mind

{privacy} Whatever the base model and the clients' texts are biased towards, this adapter is, too.
"""


SCORES = {
    "accuracy_client_mean": "mean of the clients' own adapters",
    "accuracy_client_min": "worst client",
    "accuracy_averaged_model": "the averaged adapter",
    "accuracy": "this client's own adapter",
}
"""Figure of a summary -> what it is of; a peer knows its own alone."""


def model_card(run: Path, started: Started, whose: str, folder: str, best: bool = False) -> str:
    """The card of a finished run's adapter, as Markdown under YAML that hubs read.

    Args:
        run: The run folder.
        started: Its first event.
        whose: The adapter's name in the run: `client-0`, or `mean` for the averaged one.
        folder: The name of the adapter's folder.
        best: Whether it is the one after the best round of a run that might have stopped early.

    Raises:
        ValueError: The folder holds no finished run.
    """
    config, summary = load_config(run), load_summary(run)
    rounds = summary.get("rounds_done", config.rounds)
    if best:
        rounds = summary["best_round"] + 1
        summary |= taken([one for one in load_finished(run) if getattr(one, "round", -1) < rounds])
    averaged = whose == "mean" and "accuracy_averaged_model" in summary
    data = ModelCardData(
        model_name=folder,
        base_model=config.backbone if _on_hub(config.backbone) else None,
        library_name="peft",
        tags=["lora", "federated-learning", "decentralized", "plait", config.method],
        eval_results=[_averaged(started, summary)] if averaged else None,
    )
    epsilon = summary.get("dp_epsilon")
    privacy = (
        "It was trained without differential privacy: an adapter may tell something of the texts "
        "that it was trained on."
        if epsilon is None
        else f"Differential privacy: epsilon {epsilon:.3g} at delta {summary['dp_delta']:g}."
    )
    text = TEXT.format(
        name=folder, base=_base(config.backbone), clients=config.clients,
        whose="This is the averaged adapter." if whose == "mean" else f"This is {whose}'s own.",
        metric=started.metric, task=started.task, seed=config.seed,
        scores="\n".join(
            f"| {name} | {summary[key]:.3f} |" for key, name in SCORES.items() if key in summary
        ),
        facts="\n".join(
            f"| {name} | {value} |" for name, value in _facts(config, run, rounds).items()
        ),
        split=config.eval_split, folder=folder, privacy=privacy,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n{text}"


def _base(backbone: str) -> str:
    """The base in words, without a path of this machine."""
    if _on_hub(backbone):
        return f"[{backbone}](https://huggingface.co/{backbone})"
    if backbone in EMBEDDED:
        return f"`{backbone}`, a model that plait has from a package"
    name = Path(backbone).expanduser().resolve().name
    return f"`{name}`, a model from a folder of whoever trained it"


def _on_hub(backbone: str) -> bool:
    return backbone not in EMBEDDED and not Path(backbone).expanduser().is_dir()


def _averaged(started: Started, summary: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type=started.objective,
        dataset_type=started.task,
        dataset_name=started.task,
        metric_type=started.metric,
        metric_value=round(summary["accuracy_averaged_model"], 4),
    )


def _facts(config: Config, run: Path, rounds: int) -> dict[str, object]:
    made_by = run / MADE_BY
    version = read_json(made_by).get("version") if made_by.is_file() else "unknown"
    return {
        "method": f"`{config.method}` ({METHODS[config.method](config).source or 'a control'})",
        "topology": f"`{config.topology}`",
        "rows at clients": f"`{config.label_skew or 'as suits the task'}`",
        "rounds": f"{rounds} of {config.local_steps} steps of {config.batch_size} rows",
        "rank, alpha": f"{config.rank}, {config.lora_alpha:g}",
        "learning rate": f"{config.lr:g}",
        "made by": f"plait {version}",
    }
