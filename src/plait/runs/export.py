"""Adapters out of a run folder, and the model that they belong on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from plait.config import Config
from plait.data.objectives import OBJECTIVES
from plait.events import Started, from_line
from plait.model.loading import load_model


def export(run: Path, client: int | None, out: Path) -> None:
    """Copy an adapter out of a finished run.

    Args:
        run: The run folder.
        client: Whose adapter; the averaged one for None.
        out: The PEFT folder to write.

    Raises:
        ValueError: The run has no such adapter, or `out` exists.
    """
    name = "mean" if client is None else f"client-{client}"
    source = run / "adapters" / name
    if not source.is_dir():
        there = ", ".join(sorted(path.name for path in (run / "adapters").glob("*")))
        raise ValueError(f"{run} has no adapter {name}; it has: {there or 'none'}.")
    if out.exists():
        raise ValueError(f"{out} already exists; take another --out.")
    shutil.copytree(source, out)


def load_base(run: Path | str) -> Any:
    """The model of a run without any adapter: what `PeftModel.from_pretrained` takes as its base.

    Raises:
        ValueError: The folder holds no run, or its backbone can't be loaded.

    Example:
        >>> base = load_base("runs/demo")  # doctest: +SKIP
        >>> model = PeftModel.from_pretrained(base, "runs/demo/adapters/mean")  # doctest: +SKIP
    """
    try:
        config = Config.from_json(json.loads((Path(run) / "config.json").read_text()))
        with (Path(run) / "events.jsonl").open() as file:
            started = from_line(file.readline())
    except OSError as error:
        raise ValueError(f"{run} is not a run folder: {error.filename} is missing.") from error
    assert isinstance(started, Started)
    outputs = OBJECTIVES[started.objective].num_outputs(started.label_names)
    return load_model(config, outputs, started.label_names).model.eval()
