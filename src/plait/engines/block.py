"""What a worker of a cluster holds: a block of the clients, as a stack, and its part of a round.

A round has four steps, and what a block makes in one step it hands to the others for the next:

    train      its clients' rows, to the blocks whose clients hear them; the sum of its rows
    mix        the sum of its rows again, of which the mean of all clients follows
    measure    its part of the cross terms, each layer's to the block that adds that layer up
    add_up     the cross terms of some layers

Nothing else is exchanged, and nobody holds the factors of all clients. Who needs which rows every
block works out from W, which is a function of seed and round. Nothing here knows of Ray.

Legend: m clients of the block, k blocks, P parameters of a factor.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from plait.config import Config
from plait.engines.checkpoint import lay_out, load_rows, write_rows
from plait.engines.eval_schedule import EvalSchedule
from plait.engines.evaluation import judge
from plait.engines.job import Job
from plait.engines.steps import active_of, edges_of, mix, publish, round_done, train_round
from plait.events import Evaluated, RoundDone, Started
from plait.factors import AB, BASE, VALUE, A, B, Factor, Slot
from plait.lora import Stack, State, values
from plait.machine.devices import exact_device
from plait.machine.process_settings import configure_process
from plait.metrics import cross_part, factor_views, joined_views, layer_part, norm_of_sum
from plait.mixing import neighbour_weights, total
from plait.model.peft_adapters import save_adapter, save_clients
from plait.privacy import seeded_noise
from plait.site_mixing import mean_client

SlotRows = dict[Slot, np.ndarray]
"""Slot -> rows (n, P) float32."""
Sums = dict[Factor, np.ndarray]
"""Factor -> the sum (1, P) float64 of some rows."""
Cross = list[list[tuple[np.ndarray, ...]]]
"""Before and after mixing, a block's `cross_part` of each of some layers."""

Parcel = TypeVar("Parcel", SlotRows, Sums, Cross)


@dataclass(frozen=True)
class Part:
    """What a block says of a round.

    Attributes:
        done: The event of its clients, without diagnostics.
        layers: (2, S, 5, m), their `layer_part` of each layer before and after mixing.
    """

    done: RoundDone
    layers: np.ndarray


@dataclass
class Round:
    """What a block keeps of a round until it is measured.

    Attributes:
        losses: (m,).
        active: What trained at some of its clients.
        before: Its clients' state before mixing.
        heard: Who is heard by them, themselves included, ascending.
        theirs: The slots of those, before mixing.
        times: Of begin, end of training, end of mixing.
        handed_bytes: What other blocks were handed so far.
    """

    losses: np.ndarray
    active: Factor
    before: State
    times: list[float]
    heard: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    theirs: State = field(default_factory=dict)
    handed_bytes: int = 0


class Block:
    """Some of the clients.

    Attributes:
        clients: Their numbers.
        stack: Their state.
        round: The round that goes on.
    """

    def __init__(
        self,
        make_job: Callable[[Config], Job],
        config: Config,
        bounds: Sequence[range],
        number: int,
        threads: int,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            make_job: Prepares the run.
            config: What to run.
            bounds: The clients of each block.
            number: Which block this is.
            threads: How many CPU threads to compute with.
        """
        self.make_job, self.config = make_job, config
        self.bounds, self.number, self.clients = bounds, number, bounds[number]
        self.stack: Stack
        self.round: Round
        configure_process(threads)

    @cached_property
    def job(self) -> Job:
        """The prepared run."""
        return self.make_job(self.config)

    def begin(self, checkpoint: Path | None) -> tuple[Started, EvalSchedule, list[str]]:
        """Take the clients' common start, or a checkpoint.

        Returns:
            The run's first event, when it is evaluated, and the names of the adapted layers.

        Raises:
            ValueError: The config asks for what can't be.
        """
        self.stack = self.job.initial_stack(self.clients)
        if checkpoint:
            load_rows(self.stack, _in_sight(checkpoint), self.clients.start)
        sites = [site.name for site in self.job.backbone.layout.sites]
        return self.job.started, self.job.evaluations, sites

    # -- a round

    def train(self, round_: int) -> tuple[Sums | SlotRows, ...]:
        """The local phase.

        Returns:
            The sums of the block's rows, then for each block the rows that it needs. All factors
            of a layer travel, even those that the method doesn't share: the mixing error has them.

        Raises:
            ValueError: A client's loss is no longer finite.
        """
        begin = time.perf_counter()
        noise = seeded_noise(self.config.seed)
        active = active_of(self.job, self.stack, round_, self.clients)
        losses = train_round(self.job, self.stack, round_, self.clients, noise)
        publish(self.job, self.stack.state, round_, self.clients)
        times = [begin, time.perf_counter()]
        state = self.stack.state
        self.round = Round(losses, active, dict(state), times)
        handed = dict.fromkeys([*self._of_layers(), *map(self.job.sent, self.job.shared(round_))])
        weights = neighbour_weights(self.job.schedule(round_))
        rows = [
            {slot: _array(state[slot][heard]) for slot in handed}
            for heard in (self._heard_by(k, weights) for k in self.bounds)
        ]
        return self._to_everyone(self.sums()), *self._hand_over(rows)

    def _of_layers(self) -> list[Slot]:
        """What the adapted layers have."""
        factors = self.job.backbone.layout.factors
        return [(VALUE, factor) for factor in factors if factor in AB | BASE]

    def _heard_by(self, others: range, weights: np.ndarray) -> np.ndarray:
        """Which of the block's rows a client of another block gives weight to, ascending."""
        if others == self.clients:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(weights[_slice(others), _slice(self.clients)].any(axis=0))

    def mix(self, round_: int, *rows: SlotRows) -> Sums:
        """Mix with the rows of the others.

        Args:
            round_: The round's number.
            *rows: From each block, what its `train` returned for this one.

        Returns:
            The sums of the block's rows after mixing.
        """
        now, job = self.round, self.job
        weights = neighbour_weights(job.schedule(round_))[_slice(self.clients)]
        # Ascending by client, as in a simulation, so that sums come out the same to the last bit.
        now.heard = np.union1d(np.flatnonzero(weights.any(axis=0)), self.clients)
        for slot in rows[0]:
            pieces = [torch.tensor(part[slot], device=job.backbone.device) for part in rows]
            pieces[self.number] = now.before[slot]
            now.theirs[slot] = torch.cat(pieces)
        self.stack.state |= mix(
            job, now.before, now.theirs, weights[:, now.heard], round_, self.clients
        )
        now.times.append(time.perf_counter())
        return self._to_everyone(self.sums())

    def sums(self) -> Sums:
        """The sums of the block's rows, of each factor whose mean is the mean client's."""
        factors = self.stack.factors.items()
        return {f: _array(total(value)) for f, value in factors if f not in BASE}

    def measure(self, round_: int, *sums: Sums) -> tuple[Part | Cross, ...]:
        """Work out the block's part of the diagnostics.

        Args:
            round_: The round's number.
            *sums: Of every block before mixing, then of every block after it.

        Returns:
            The block's `Part`, then for each block what it needs to add up its cross terms.
        """
        now, layout = self.round, self.job.backbone.layout
        W = self.job.schedule(round_)[_slice(self.clients)][:, now.heard]
        theirs = joined_views(layout, values(now.theirs))
        layers: list[Tensor] = []
        crosses: Cross = []
        half = len(self.bounds)
        moments = (values(now.before), sums[:half]), (self.stack.factors, sums[half:])
        for factors, parts in moments:
            views, means = factor_views(layout, factors), factor_views(layout, self.mean(*parts))
            whole = joined_views(layout, factors)
            crosses.append([])
            for site in views[A]:
                A_of, B_of = views[A][site], views[B][site]
                middle = means[A][site][0], means[B][site][0]
                layers.append(layer_part(A_of, B_of, *middle, whole[site], theirs[site], W))
                part = cross_part(A_of, B_of, *middle, self.config.clients)
                crosses[-1].append(tuple(map(_array, part)))
        # Layer by layer in turn, so that all blocks have as much to add up.
        handed = self._hand_over([[c[k::half] for c in crosses] for k in range(half)])
        edges = edges_of(self.job.schedule(round_), self.clients)
        sent_bytes = self.job.sent_bytes(round_, edges)
        done = round_done(
            self.job, round_, now.losses, edges, sent_bytes, now.active, before=[], after=[],
            train_seconds=now.times[1] - now.times[0],
            mix_seconds=now.times[2] - now.times[1],
            worker_bytes=now.handed_bytes,
        )  # fmt: skip
        return Part(done, torch.stack(layers).unflatten(0, (2, -1)).numpy()), *handed

    def add_up(self, *crosses: Cross) -> list[list[float]]:
        """Before and after mixing, ||C||_F of each layer that is this block's to add up."""
        return [
            [norm_of_sum([tuple(map(torch.tensor, part)) for part in layer])
             for layer in zip(*moment, strict=True)]
            for moment in zip(*crosses, strict=True)
        ]  # fmt: skip

    def mean(self, *sums: Sums) -> dict[Factor, Tensor]:
        """The mean client, factor -> (1, P) float64, of the sums of all blocks."""
        device, count = exact_device(self.job.backbone.device), self.config.clients
        return {
            factor: torch.tensor(sum(part[factor] for part in sums) / count, device=device)
            for factor in sums[0]
        }

    def _hand_over(self, parcels: list[Parcel]) -> list[Parcel]:
        """A parcel for each block; the bytes of those for others are counted."""
        others = parcels[: self.number] + parcels[self.number + 1 :]
        self.round.handed_bytes += sum(map(_bytes, others))
        return parcels

    def _to_everyone(self, parcel: Parcel) -> Parcel:
        return self._hand_over([parcel] * len(self.bounds))[0]

    # -- what isn't done in every round

    def towards_mean(self) -> Sums:
        """What the block contributes to the averaged model: sums, or all rows where those won't do.

        They won't where something is added to the frozen weights: that is averaged as a product.
        """
        if not self.job.backbone.layout.base_rank:
            return self.sums()
        return {factor: _array(value) for factor, value in self.stack.factors.items()}

    def _averaged(self, parts: Sequence[Sums]) -> dict[Factor, Tensor]:
        """The averaged model, factor -> (1, P), of what all blocks contribute."""
        layout, device = self.job.backbone.layout, self.job.backbone.device
        if not layout.base_rank:
            return {factor: value.float().to(device) for factor, value in self.mean(*parts).items()}
        rows = {f: torch.tensor(np.concatenate([part[f] for part in parts])) for f in parts[0]}
        return mean_client(layout, {f: value.to(device) for f, value in rows.items()})

    def evaluate(self, round_: int, *parts: Sums) -> Evaluated:
        """How the block's clients do; with all blocks' `towards_mean`, the averaged model too."""
        models = dict(self.stack.factors)
        if parts:
            mean = self._averaged(parts)
            models = {f: torch.cat([v, mean[f]]) for f, v in models.items()}
        return judge(self.job, models, self.clients, round_)

    def lay_out(self, path: Path, rounds_done: int) -> None:
        """Make a checkpoint of all clients, for `write_rows` of each block to fill."""
        lay_out(self.stack, self.config.clients, _in_sight(path), rounds_done)

    def write_rows(self, path: Path, _laid_out: None) -> None:
        """Put the block's clients into the checkpoint."""
        write_rows(self.stack, self.clients.start, _in_sight(path))

    def save_adapters(self, out: Path, *parts: Sums) -> None:
        """Write a PEFT folder for each client; with all `towards_mean`, for their mean too."""
        backbone, config = self.job.backbone, self.job.config
        save_clients(backbone, self.stack, config, _in_sight(out), self.clients.start)
        if parts:
            mean = {factor: value[0] for factor, value in self._averaged(parts).items()}
            save_adapter(backbone, mean, config, out / "mean")


def _slice(clients: range) -> slice:
    return slice(clients.start, clients.stop)


def _array(value: Tensor) -> np.ndarray:
    array: np.ndarray = value.detach().cpu().numpy()
    return array


def _bytes(parcel: Any) -> int:
    """The bytes of the arrays in a parcel."""
    if isinstance(parcel, np.ndarray):
        return parcel.nbytes
    return sum(map(_bytes, parcel.values() if isinstance(parcel, dict) else parcel))


def _in_sight(path: Path) -> Path:
    """The path, if the folder that it lies in can be seen from here.

    Raises:
        ValueError: It can't.
    """
    if not path.parent.is_dir():
        raise ValueError(
            f"{socket.gethostname()} doesn't see {path.parent}: put --out on a file system that "
            "all machines of the cluster share."
        )
    return path
