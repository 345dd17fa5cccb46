"""The work of one client as a user of any framework would write it: a PEFT loop over its batches.

It imports nothing of plait, so that it runs in the environment of each framework. A job is a
folder: `model/` as transformers saves it, `start.npz` with the adapters' start, `batches.npz` with
every batch of every client, and `job.json` with the settings.
"""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

Arrays = list[np.ndarray]


class Job:
    """A job's settings and batches, and one model on which any client trains."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "job.json").read_text())
        self.clients, self.rounds = settings["clients"], settings["rounds"]
        self.steps, self.lr = settings["local_steps"], settings["lr"]
        self.clip_norm = settings["clip_norm"]
        with np.load(folder / "batches.npz") as file:
            self.ids, self.labels = file["ids"], file["labels"]
            self.lengths = file["lengths"]  # (clients, rounds K, b); ids the same, and their length
        with np.load(folder / "start.npz") as file:
            self.start = {name: file[name] for name in sorted(file.files)}
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
        lora = LoraConfig(
            r=settings["rank"], lora_alpha=settings["alpha"], target_modules=["query", "value"]
        )
        self.model = get_peft_model(model, lora).eval()
        parameters = dict(self.model.named_parameters())
        self.slots = [parameters[name] for name in self.start]

    def train(self, client: int, round_: int, arrays: Arrays) -> tuple[Arrays, float]:
        """A client's local steps from these adapters: its own after them, and its mean loss."""
        for slot, value in zip(self.slots, arrays, strict=True):
            slot.data = torch.from_numpy(value.copy())
        optimizer = torch.optim.AdamW(self.slots, lr=self.lr, weight_decay=0.0, fused=True)
        losses = []
        for step in range(round_ * self.steps, (round_ + 1) * self.steps):
            loss = self.model(**self._batch(client, step)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.slots, self.clip_norm)
            optimizer.step()
            losses.append(loss.item())
        return [slot.detach().numpy() for slot in self.slots], float(np.mean(losses))

    def _batch(self, client: int, step: int) -> dict[str, torch.Tensor]:
        """A step's texts, padded to the longest of them."""
        lengths = self.lengths[client, step]
        width = int(lengths.max())
        mask = np.arange(width) < lengths[:, None]
        return {
            "input_ids": torch.from_numpy(self.ids[client, step, :, :width].astype(np.int64)),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(self.labels[client, step]),
        }

    def result(self, ends: list[float], losses: list[float], begin: float) -> str:
        """The line that run.py reads; the first round warms up and isn't timed.

        Args:
            ends: When each round ended.
            losses: The mean loss of each round.
            begin: When the program was ready to start.
        """
        timed = self.clients * self.steps * (len(ends) - 1)
        said: dict[str, Any] = {
            "client_steps_per_second": timed / (ends[-1] - ends[0]),
            "first_round_seconds": ends[0] - begin,
            "losses": losses,
        }
        return json.dumps(said)


@cache
def job(folder: str) -> Job:
    """A job, loaded once in a process."""
    return Job(Path(folder))
