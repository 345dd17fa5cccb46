"""A task of one's own: is a number even? Any function that returns three splits will do."""

import dataclasses

import numpy as np

import plait

# --8<-- [start:row]
from plait.data.tasks import TASKS, Rows, Task, TaskRow


def parity(config):
    """Numbers from 0 to 599, the last 200 held out."""
    numbers = [np.arange(start, start + 200) for start in (0, 200, 400)]
    splits = [Rows(tuple((f"number {n}",) for n in part), part % 2) for part in numbers]
    return Task("parity", *splits, label_names=("even", "odd"), metric="accuracy")


TASKS["parity"] = TaskRow(parity, "Is a number even?")
# --8<-- [end:row]

config = dataclasses.replace(plait.build_preset("smoke"), task="parity")
started, *_, last_evaluation = plait.Run(config)
print(f"{started.task}: {started.label_names}, majority {started.majority:.3f}")
print(f"accuracy {sum(last_evaluation.scores) / config.clients:.3f}")
