"""Optimizer steps, as pairs in optax's manner: what is kept beside a value, and the update.

An optimizer names the kinds of slot that it keeps for each factor that trains; they start at zero
and are reset to it. Who holds a client's state, saves it or sends it knows none of them by heart.

Source: AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from plait.later import Tensor, torch

Update = Callable[
    [Sequence[Tensor], Sequence[Tensor], Mapping[str, Sequence[Tensor]], int, float, float], None
]
"""(values, gradients, kind -> slots, steps taken, learning rate, weight decay): one step in place.
Each sequence holds the rows (n, P) of a factor, whole or one by one."""


@dataclass(frozen=True)
class Optimizer:
    """A kind of step.

    Attributes:
        kinds: Slots that a factor has beside its value.
        update: The step.
    """

    kinds: tuple[str, ...]
    update: Update


def _adamw(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    kept: Mapping[str, Sequence[Tensor]],
    taken: int,
    lr: float,
    weight_decay: float,
) -> None:
    """One AdamW step, with Hugging Face's defaults."""
    from torch.optim.adamw import adamw as step  # a second to import

    with torch.no_grad():
        step(
            list(values),
            list(grads),
            list(kept["m"]),
            list(kept["v"]),
            [],
            list(torch.full((len(values),), float(taken), device=values[0].device)),
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=weight_decay,
            eps=1e-8,
            maximize=False,
        )


ADAMW = Optimizer(kinds=("m", "v"), update=_adamw)
"""First and second moment."""
