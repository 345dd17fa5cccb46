"""The local phase: K optimizer steps of every client on its own rows, before anyone exchanges.

Clients are computed in chunks, all K steps of one together, so that its factors and activations
stay in cache. On the CPU each core has a chunk of its own: cores that share every product would
wait for one another after each. The result does not depend on how the clients are cut.

Legend: n clients of a chunk, b texts of each in a step, P parameters of a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from heapq import heappop, heappush
from operator import or_
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from plait.config import Config
from plait.data.objectives import Objective
from plait.data.tokens import Batch, Tokens
from plait.factors import VALUE, Factor, Slot
from plait.learning_rates import lr_factor
from plait.lora import Dropout, Stack
from plait.machine.devices import moved
from plait.model.backbone import Backbone
from plait.model.memory import tokens_at_once
from plait.optimizers import ADAMW, Optimizer
from plait.rng import stream, torch_stream

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """The local phase of some clients of a run.

    Attributes:
        stack: Their state, changed in place; row k belongs to client `clients[k]`. All have taken
            as many steps.
        turns: Which factors take each of the K steps.
        round_: The round's number.
        shares: Client -> its rows of the training split.
        clients: Their numbers.
        config: Steps, batch size, learning rates and their schedule.
    """

    stack: Stack
    turns: Sequence[Factor]
    round_: int
    shares: Sequence[np.ndarray]
    clients: Sequence[int]
    config: Config

    @property
    def positions(self) -> range:
        """The K steps, counted from the first round on."""
        steps = self.config.local_steps
        return range(self.round_ * steps, (self.round_ + 1) * steps)

    @property
    def texts(self) -> np.ndarray:
        """(n, K, b) the rows of each client's steps."""
        positions, config = self.positions, self.config
        rows = [batch_rows(self.shares[i], i, positions, config) for i in self.clients]
        return np.array(rows)


def local_phase(
    backbone: Backbone,
    stack: Stack,
    train: Factor,
    round_: int,
    tokens: Tokens,
    shares: Sequence[np.ndarray],
    clients: Sequence[int],
    config: Config,
    optimizer: Optimizer = ADAMW,
    turns: Sequence[Factor] = (),
) -> np.ndarray:
    """Train the active factors of a stack in place.

    Args:
        backbone: The frozen model.
        stack: The state of these clients, who have taken as many steps on a factor that is active;
            row k belongs to client `clients[k]`.
        train: The active factors.
        round_: The round's number.
        tokens: The training split.
        shares: Client -> its rows of the split.
        clients: Which clients the stack holds.
        config: Steps, batch size, learning rates and their schedule.
        optimizer: How a factor takes a step.
        turns: Which of the active factors take each of the K steps; all of them if not given.

    Returns:
        (n, K) float64, each client's loss at each step, before the step.
    """
    work = Work(stack, turns or [train] * config.local_steps, round_, shares, clients, config)
    (losses,) = local_phases(backbone, tokens, [work], optimizer)
    return losses


def local_phases(
    backbone: Backbone, tokens: Tokens, works: Sequence[Work], optimizer: Optimizer
) -> list[np.ndarray]:
    """The local phases of several runs as one: no client's numbers depend on the others'.

    Args:
        backbone: The frozen model of all.
        tokens: The training split of all.
        works: With equal turns, batch size and dropout.
        optimizer: How a factor takes a step.

    Returns:
        For each work (n, K) float64, as `local_phase`.
    """
    phase = _Phase(backbone, tokens, works, optimizer)
    losses = np.empty(phase.texts.shape[:2])

    def train_chunk(chunk: list[int]) -> None:
        losses[chunk] = phase.train(chunk)

    tokens_each = tokens.lengths[phase.texts].sum(axis=2).mean(axis=1)
    most = tokens_at_once(backbone, [one.stack for one in works], tokens, works[0].config)
    workers = int(min(backbone.backend.workers(), len(losses), max(1, most / tokens_each.mean())))
    at_once = min(backbone.chunk_tokens, most / workers)
    on_cores(train_chunk, chunks(tokens_each, at_once, workers), workers)
    for work in works:
        for factor in phase.active:
            work.stack.steps[factor] += sum(factor in turn for turn in work.turns)
    return np.split(losses, phase.ends[:-1])


@dataclass(frozen=True)
class _Part:
    """What a chunk has of one work: clients, their rows of its stack, their place in the chunk."""

    work: Work
    clients: list[int]
    rows: Tensor
    place: slice


class _Phase:
    """What all chunks of a local phase share; the clients of all works are numbered through."""

    def __init__(
        self, backbone: Backbone, tokens: Tokens, works: Sequence[Work], optimizer: Optimizer
    ) -> None:
        self.backbone, self.tokens = backbone, tokens
        self.works, self.optimizer = works, optimizer
        self.texts = np.concatenate([work.texts for work in works])  # (n, K, b)
        self.ends = np.cumsum([len(work.clients) for work in works])
        self.turns = works[0].turns
        train = reduce(or_, self.turns)
        self.active = [factor for factor in works[0].stack.factors if factor in train]

    def train(self, chunk: list[int]) -> np.ndarray:
        """All steps of some clients, in place; their losses (n, K) float64."""
        # Those of a work lie side by side.
        whose = np.searchsorted(self.ends, chunk, side="right")
        order = np.argsort(whose, kind="stable")
        losses = np.empty((len(chunk), len(self.turns)))
        losses[order] = self._train([chunk[k] for k in order], whose[order])
        return losses

    def _train(self, chunk: list[int], whose: np.ndarray) -> np.ndarray:
        parts = [*self._parts(chunk, whose)]
        leaves = {factor: _rows(parts, (VALUE, factor)) for factor in parts[0].work.stack.factors}
        kept = {(k, f): _rows(parts, (k, f)) for f in self.active for k in self.optimizer.kinds}
        of_steps = []
        for step, turn in enumerate(self.turns):
            for factor, leaf in leaves.items():
                leaf.requires_grad_(factor in turn)
            batch = self.backbone.batch(self.tokens, self.texts[chunk, step])
            dropout = self._dropout(batch, parts, step)
            losses = _means(self.backbone.losses(batch, leaves, dropout), batch.asked_counts)
            losses.sum().backward()
            of_steps.append(losses.detach())
            for part in parts:
                self._step(part, step, leaves, kept)
            for factor in self.active:
                leaves[factor].grad = None
        kept |= {(VALUE, factor): leaves[factor].detach() for factor in self.active}
        for slot, value in kept.items():
            for part in parts:
                part.work.stack.state[slot][part.rows] = value[part.place]
        return torch.stack(of_steps, dim=1).cpu().double().numpy()

    def _parts(self, chunk: list[int], whose: np.ndarray) -> Iterator[_Part]:
        """The works that have clients in a chunk, ascending."""
        for number in np.unique(whose):
            place, work = np.flatnonzero(whose == number), self.works[number]
            first = self.ends[number] - len(work.clients)
            rows = [int(chunk[k] - first) for k in place]
            yield _Part(
                work,
                [work.clients[row] for row in rows],
                moved(torch.tensor(rows), self.backbone.device),
                slice(place[0], place[-1] + 1),
            )

    def _dropout(self, batch: Batch, parts: Sequence[_Part], step: int) -> Dropout | None:
        rate = parts[0].work.config.lora_dropout
        if not rate:
            return None
        streams = [
            (part.work.config.seed, client, part.work.positions[step])
            for part in parts
            for client in part.clients
        ]
        return lora_dropout(batch, streams, rate)

    def _step(
        self, part: _Part, step: int, leaves: dict[Factor, Tensor], kept: dict[Slot, Tensor]
    ) -> None:
        """A step on each factor (n, P) in turn and what is kept beside it, in place."""
        work, config = part.work, part.work.config
        factor_of_rate, rows = lr_factor(config, work.round_), self.backbone.backend.optimizer_rows
        turn = [factor for factor in self.active if factor in self.turns[step]]
        grads = {factor: _gradient(leaves[factor])[part.place] for factor in turn}
        _clip([*grads.values()], config.clip_norm)
        for factor, grad in grads.items():
            lr = factor_of_rate * (config.head_lr if factor is Factor.HEAD else config.lr)
            beside = {kind: rows(kept[kind, factor][part.place]) for kind in self.optimizer.kinds}
            taken = int(work.stack.steps[factor][0])
            taken += sum(factor in turn for turn in self.turns[:step])
            value = leaves[factor].detach()[part.place]
            self.optimizer.update(rows(value), rows(grad), beside, taken, lr, config.weight_decay)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _rows(parts: Sequence[_Part], slot: Slot) -> Tensor:
    """A slot's rows of all parts of a chunk, in new memory."""
    found = [part.work.stack.state[slot][part.rows] for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


def chunks(tokens_each: np.ndarray, chunk_tokens: float, workers: int = 1) -> list[list[int]]:
    """Clients in chunks of about as many tokens each, at most about `chunk_tokens`.

    Where there are clients enough, the number of chunks is a multiple of `workers`: as all take
    equally long, no worker waits for another. The clients go one by one, those with the most tokens
    first, to the chunk that has the fewest (Graham 1969, longest processing time first); then the
    fullest chunk and the emptiest one exchange clients for as long as that evens them out.

    Args:
        tokens_each: (n,) tokens of each client's step.
        chunk_tokens: Tokens of a chunk's step.
        workers: Chunks that are computed at once.
    """
    largest = max(1, int(chunk_tokens / tokens_each.mean()))
    rounds = -(-len(tokens_each) // (largest * workers))
    found: list[list[int]] = [[] for _ in range(min(rounds * workers, len(tokens_each)))]
    fewest = [(0.0, number) for number in range(len(found))]
    for client in np.argsort(-tokens_each, kind="stable").tolist():
        count, number = heappop(fewest)
        found[number].append(client)
        heappush(fewest, (count + tokens_each[client], number))
    loads = np.array([tokens_each[chunk].sum() for chunk in found])
    while True:
        most, least = int(loads.argmax()), int(loads.argmin())
        gap = loads[most] - loads[least]
        # Tokens that go over if a client of the fullest is given for one of the other, or for none.
        over = tokens_each[found[most]][:, None] - np.append(tokens_each[found[least]], 0)
        i, j = np.unravel_index(np.abs(gap - 2 * over).argmin(), over.shape)
        if abs(gap - 2 * over[i, j]) >= 0.999 * gap:
            return found
        back = found[least][j : j + 1]
        found[least][j : j + 1] = [found[most][i]]
        found[most][i : i + 1] = back
        loads[most] -= over[i, j]
        loads[least] += over[i, j]


def on_cores(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], workers: int
) -> list[Result]:
    """`work` of each piece, in order, so many at once, each with its share of the cores."""
    workers = min(workers, len(pieces))
    if workers == 1:
        return [work(piece) for piece in pieces]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // workers)  # what new threads begin with
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(threads)


def batch_rows(share: np.ndarray, client: int, positions: range, config: Config) -> np.ndarray:
    """(K, b) the rows of some consecutive steps of a client, counted from the first round on.

    A client goes through its rows in an order drawn anew for each pass, one pass after another
    without a gap, so every batch is full.
    """
    first, end = (place * config.batch_size for place in (positions.start, positions.stop))
    passes = range(first // len(share), -(-end // len(share)))
    orders = [stream(config.seed, "batches", client, k).permutation(len(share)) for k in passes]
    begin = first - passes.start * len(share)
    return share[np.concatenate(orders)[begin : begin + end - first]].reshape(len(positions), -1)


def lora_dropout(batch: Batch, streams: Sequence[tuple[int, int, int]], rate: float) -> Dropout:
    """Dropout whose mask depends on the run's seed, client and step, not on who shares a chunk.

    Args:
        batch: The texts of n clients.
        streams: Of each client (seed, number, step).
        rate: The share of the input that is dropped.
    """

    def keep(name: str, x: Tensor) -> Tensor:
        draws = [
            torch.rand(
                count,
                x.shape[-1],
                generator=torch_stream(seed, f"dropout {name}", client, position),
            )
            for (seed, client, position), count in zip(streams, batch.counts, strict=True)
        ]
        mask = moved((torch.cat(draws) >= rate).to(x.dtype), x.device) / (1 - rate)
        return functional.pad(mask, (0, 0, 0, len(batch.ids) - len(mask)))

    return keep


def _means(losses: Tensor, counts: np.ndarray) -> Tensor:
    """(Q,) -> (n,), the mean of each client's, whose numbers are `counts` (n,)."""
    if len(set(counts.tolist())) == 1:
        return losses.view(len(counts), -1).mean(dim=1)
    return torch.cat([own[None].mean(dim=1) for own in losses.split(counts.tolist())])


def _clip(grads: Sequence[Tensor], norm: float | None) -> None:
    """Scale each client's gradient (a row of all of `grads`) down to `norm`, in place."""
    if norm is None:
        return
    # Row by row, so that a client's norm is the same to the last bit whoever else is here.
    norms = torch.stack([grad.norm(dim=1) for grad in grads], dim=1).norm(dim=1)
    factor = (norm / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor[:, None])


def evaluate(
    backbone: Backbone,
    factors: Mapping[Factor, Tensor],
    tokens: Tokens,
    objective: Objective | None = None,
) -> tuple[Tensor, Tensor]:
    """Every client's model on every text of a split, a few texts of a few clients at a time.

    Args:
        backbone: The frozen model.
        factors: Factor -> (n, P).
        tokens: The split, which asks at Q places.
        objective: How answers are wanted; the backbone's own for None.

    Returns:
        (n, Q) float32 losses and (n, Q) answers, of whatever shape each, both on the CPU, texts in
        the split's order.
    """
    num_clients = len(factors[Factor.A])
    order = np.argsort(tokens.lengths, kind="stable")
    at_once = backbone.chunk_tokens
    texts_at_once = max(1, int(at_once / tokens.lengths.mean() / 8))
    pieces = [
        (texts, chunk)
        for texts in np.split(order, range(texts_at_once, len(order), texts_at_once))
        for chunk in chunks(np.full(num_clients, tokens.lengths[texts].sum()), at_once)
    ]

    def judge(piece: tuple[np.ndarray, list[int]]) -> tuple[Tensor, Tensor]:
        texts, chunk = piece
        batch = backbone.batch(tokens, np.tile(texts, (len(chunk), 1)))
        mine = {factor: value[chunk] for factor, value in factors.items()}
        losses, answers = (found.cpu() for found in backbone.judge(batch, mine, objective))
        return losses.view(len(chunk), -1), answers.unflatten(0, (len(chunk), -1))

    parts = on_cores(judge, pieces, backbone.backend.workers())
    num_places = len(tokens.targets)
    losses, answers = (one.new_empty(num_clients, num_places, *one.shape[2:]) for one in parts[0])
    for (texts, chunk), (some_losses, some_answers) in zip(pieces, parts, strict=True):
        place = torch.tensor(chunk)[:, None], torch.from_numpy(tokens.places(texts))
        losses[place], answers[place] = some_losses, some_answers
    return losses, answers
