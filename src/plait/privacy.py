"""Differential privacy of what a client sends: its change of a round clipped, and Gaussian noise.

After local training, and before anything else sees it, a client's change of the slots that ever
travel is scaled down to an L2 norm C (`dp_clip`) and gets noise of standard deviation z C
(`dp_noise` times `dp_clip`) in every coordinate. What leaves a client later, mixed states
included, is made of such changes and of what others sent, so only the changes count.

Whoever hears a client sees each of them, so this is local privacy: the bound is for all of a
client's data against any other data in its place, where two clipped changes may be 2 C apart.
docs/privacy.md says what is promised and what is not.

Sources: Gaussian mechanism, adaptive composition (Dong, Roth, Su 2019, arXiv 1905.02383).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import ndtri
from torch import Tensor

from plait.config import Config
from plait.factors import Slot
from plait.rng import stream

Noise = Callable[[int, int, np.ndarray], np.ndarray]
"""(client, round, its clipped change (P,) float64) -> independent standard normals (P,) float64."""


def seeded_noise(seed: int) -> Noise:
    """Noise that belongs to client and round, for simulations: whoever has the seed can redo it."""
    return lambda client, round_, change: stream(seed, "privacy", client, round_).standard_normal(
        len(change)
    )


def secret_noise(key: bytes) -> Noise:
    """Noise that nobody can tell from random without the key.

    It is a function of the change too. A peer that was killed does its round again and sends the
    same message again, which tells nothing new. Should the change differ, after an edit of the data
    or by a GPU's rounding, the noise differs too, or the difference of two messages would be bare.

    Args:
        key: Up to 64 bytes from the operating system, known to this peer only.
    """

    def noise(client: int, round_: int, change: np.ndarray) -> np.ndarray:
        address = f"{client}:{round_}:".encode()
        seed = hashlib.blake2b(address + change.tobytes(), key=key).digest()
        words = np.frombuffer(hashlib.shake_256(seed).digest(8 * len(change)), "<u8")
        return np.asarray(ndtri(((words >> 12) + 0.5) * 2.0**-52))

    return noise


def clipped(change: np.ndarray, norm: float) -> np.ndarray:
    """A change (P,) scaled down to an L2 norm; one that is not finite counts as none."""
    if not np.isfinite(change).all():
        return np.zeros_like(change)
    return np.asarray(change * (norm / max(float(np.linalg.norm(change)), norm)))


def privatise(
    before: Mapping[Slot, Tensor],
    after: Mapping[Slot, Tensor],
    round_: int,
    clients: Sequence[int],
    config: Config,
    noise: Noise,
) -> None:
    """Clip each client's change and add noise, in place. All is done in float64 and then rounded.

    Args:
        before: Slot -> (n, P) before local training, of the slots to protect.
        after: Slot -> (n, P) after it; changed where `before` has the slot.
        round_: The round's number.
        clients: Which clients these are.
        config: With `dp_clip` and `dp_noise`.
        noise: Where the noise comes from.
    """
    assert config.dp_clip is not None
    assert config.dp_noise is not None
    sizes = [value.shape[1] for value in before.values()]
    for row, client in enumerate(clients):
        start = _row(before, list(before), row)
        change = clipped(_row(after, list(before), row) - start, config.dp_clip)
        deviation = config.dp_noise * config.dp_clip
        sent = torch.from_numpy(start + change + deviation * noise(client, round_, change))
        for slot, part in zip(before, sent.split(sizes), strict=True):
            own = after[slot]
            own[row] = part.to(own.dtype).to(own.device)


def _row(state: Mapping[Slot, Tensor], which: Iterable[Slot], row: int) -> np.ndarray:
    parts = torch.cat([state[slot][row] for slot in which])
    return np.asarray(parts.cpu().double().numpy())


# -- accounting


def epsilon(noise: float, releases: int, delta: float) -> float:
    """What so many changes with noise tell about all of a client's data, at most.

    A composition of k Gaussian mechanisms of one noise is one with 1/sqrt(k) of it, also where each
    depends on what came out before; dp-accounting has the exact delta of one.

    Args:
        noise: Standard deviation in units of the clipping norm, z.
        releases: How many changes were sent.
        delta: Probability with which the bound may fail.

    Raises:
        ValueError: dp-accounting is not installed.

    Example:
        >>> round(epsilon(noise=2.0, releases=1, delta=1e-5), 3)
        4.377
    """
    mechanism_of = _mechanism()
    if releases == 0:
        return 0.0
    mechanism = mechanism_of(noise / 2 / math.sqrt(releases))

    def too_likely(value: float) -> float:
        return float(mechanism.get_delta_for_epsilon(value)) - delta

    high = 1.0
    while too_likely(high) > 0:
        high *= 2
    return float(brentq(too_likely, 0.0, high)) if too_likely(0.0) > 0 else 0.0


def check_accounting(config: Config) -> None:
    """Refuse a run with differential privacy whose epsilon could not be told at its end.

    Raises:
        ValueError: dp-accounting is not installed.
    """
    if config.dp_clip is not None:
        _mechanism()


def spent(config: Config, releases: int) -> dict[str, float]:
    """The figures of a summary after so many changes that were sent; none without privacy."""
    if config.dp_noise is None:
        return {}
    return {
        "dp_epsilon": epsilon(config.dp_noise, releases, config.dp_delta),
        "dp_delta": config.dp_delta,
    }


def _mechanism() -> Callable[[float], Any]:
    try:
        from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
    except ImportError as error:
        raise ValueError(
            "Differential privacy needs a library that counts: pip install 'plait[dp]'."
        ) from error
    kind: Callable[[float], Any] = GaussianPrivacyLoss
    return kind
