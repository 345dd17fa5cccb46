"""What the round slider moves: who met whom in a round, and who disagreed with whom.

The page (templates/page.js) draws it. So that it stays small, a run has at most `MOST_PAIRS`
meetings and `MOST_CELLS` distances of pairs; of more, every k-th round is left.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np

from plait.events import RoundDone
from plait.report import charts
from plait.report.recorded_run import MOST_DRAWN, Meetings, Track
from plait.report.series import FLOOR, Series

MOST_PAIRS = 30_000
MOST_CELLS = 300_000


def topology(track: Track) -> charts.Chart:
    """Who met whom in each round, who disagreed with whom, and each client's distance and score.

    `pairs` has uint16 numbers in base64, two for each meeting, and `weights` a byte for each, 255
    for the run's largest; a round names its entry in `drawn`. `between` has the distances of all
    pairs of a round: see `_between`.
    """
    rounds = track.rounds
    clients = min(track.config.clients, MOST_DRAWN)
    chosen = _chosen_rounds(track)
    met = [track.meetings[i] for i in chosen]
    heaviest = max((float(one.weights.max()) for one in met if len(one.weights)), default=1.0)
    codes = [(_base64(one.pairs), _base64(_bytes(255 * one.weights / heaviest))) for one in met]
    # Graphs that stay the same, or come again, are kept once.
    unique = {code: number for number, code in enumerate(dict.fromkeys(codes))}
    scores = {
        one.round: _placed(one.scores, scored, clients)
        for one, scored in zip(track.evaluations, track.scored, strict=True)
    }
    latest = [max((r for r in scores if r <= rounds[i].round), default=-1) for i in chosen]
    return {
        "clients": clients,
        "names": track.names[:clients],
        "all_clients": track.config.clients,
        "step": chosen[1] - chosen[0] if len(chosen) > 2 else 1,
        "pairs": [pairs for pairs, _ in unique],
        "weights": [weights for _, weights in unique],
        "heaviest": float(f"{heaviest:.3g}"),
        "rounds": [rounds[i].round + 1 for i in chosen],
        "drawn": [unique[code] for code in codes],
        "count": [one.count for one in met],
        "trains": [rounds[i].active for i in chosen],
        "apart": [charts.plain_numbers(_distances(rounds[i])[:clients]) for i in chosen],
        "scores": [scores.get(r, [None] * clients) for r in latest],
        **_between(met),
    }


def _placed(scores: Sequence[float], of: Sequence[int], clients: int) -> list[float | None]:
    """The scores of some clients in the places of these; None for the others."""
    placed = dict(zip(of, scores, strict=True))
    return charts.plain_numbers(placed.get(client, math.nan) for client in range(clients))


def _chosen_rounds(track: Track) -> list[int]:
    """Which rounds are drawn: every one, or every k-th and the last."""
    count = len(track.meetings)
    known = sum(bool(np.isfinite(one.apart).any()) for one in track.meetings)
    cells = known * min(track.config.clients, MOST_DRAWN) ** 2 // 2
    step = max(
        1,
        math.ceil(sum(len(one.pairs) for one in track.meetings) / MOST_PAIRS),
        math.ceil(cells / MOST_CELLS),
        math.ceil(count / charts.MOST_POINTS),
    )
    chosen = list(range(0, count, step))
    return chosen if not count or chosen[-1] == count - 1 else [*chosen, count - 1]


def _between(met: Sequence[Meetings]) -> charts.Chart:
    """The distances of all pairs i < j of each round, on one logarithmic scale for the whole run.

    A byte for each pair, (0, 1), (0, 2), ..., in base64: 0 is not known, 1 no distance but
    rounding, and from 2 to 255 the steps from the smallest to the largest, `least` to `most`.
    """
    above = [one.apart[np.triu_indices(len(one.apart), 1)] for one in met]
    squared = np.stack(above) if above else np.zeros((0, 0))
    with np.errstate(invalid="ignore"):
        apart = squared >= FLOOR
    if not apart.any():
        return {"between": [""] * len(met), "least": None, "most": None}
    logs = np.log10(np.where(apart, squared, 1)) / 2
    low, high = float(logs[apart].min()), float(logs[apart].max())
    steps = 2 + 253 * (logs - low) / ((high - low) or 1)
    levels = np.where(apart, steps, np.where(np.isnan(squared), 0, 1))
    codes = [_base64(_bytes(row)) if row.any() else "" for row in levels]
    return {"between": codes, "least": 10**low, "most": 10**high}


def _bytes(values: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.rint(values).astype(np.uint8)
    return rounded


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _distances(done: RoundDone) -> Series:
    """(N,) each client's distance from the mean; what is rounding is 0."""
    squared = np.array(done.apart)
    return np.sqrt(np.where(squared < FLOOR, 0.0, squared))
