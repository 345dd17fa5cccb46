"""What is learned, as a value: how a model's outputs are judged against the targets.

A batch asks the model at Q places, and has a target for each: one place for each text where texts
are classified, and in a language model each token whose next one is to be learned. An `Objective`
makes a loss and an answer of every output; what the metrics of tasks.py compare are answers. Which
hidden states lead to an output, and how, is the head's business (model/heads.py), since it follows
from the checkpoint.

Legend: Q places asked, C outputs at each (a language model has one for each token of its
vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plait.later import Tensor, functional


@dataclass(frozen=True)
class Objective:
    """A way to judge outputs.

    Attributes:
        name: Its key in `OBJECTIVES`.
        loss: (outputs (Q, C), targets (Q,)) -> (Q,) losses.
        answer: Outputs (..., C) -> (...,) answers, what a metric compares with the targets.
        metric: The one that a task is reported by if nothing else is said.
        target_type: Of the targets.
        has_classes: Whether targets are numbers of classes, so that there is an output for each.
        problem_type: What transformers calls it in a model's config.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    answer: Callable[[Tensor], Tensor]
    metric: str
    target_type: type[np.generic]
    has_classes: bool
    problem_type: str

    def num_outputs(self, label_names: tuple[str, ...]) -> int:
        """C, for a task with these classes."""
        return len(label_names) if self.has_classes else 1


CLASSIFICATION = Objective(
    name="classification",
    loss=lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none"),
    answer=lambda outputs: outputs.argmax(dim=-1),
    metric="accuracy",
    target_type=np.int64,
    has_classes=True,
    problem_type="single_label_classification",
)

REGRESSION = Objective(
    name="regression",
    loss=lambda outputs, targets: functional.mse_loss(outputs[:, 0], targets, reduction="none"),
    answer=lambda outputs: outputs[..., 0],
    metric="pearson",
    target_type=np.float32,
    has_classes=False,
    problem_type="regression",
)

LANGUAGE = Objective(
    name="language",
    loss=CLASSIFICATION.loss,
    answer=CLASSIFICATION.answer,
    metric="token-accuracy",
    target_type=np.int64,
    has_classes=False,
    problem_type="causal_lm",
)
"""The next token; what a language model's rows have as labels are groups, to be dealt by."""

OBJECTIVES = {one.name: one for one in (CLASSIFICATION, REGRESSION, LANGUAGE)}
