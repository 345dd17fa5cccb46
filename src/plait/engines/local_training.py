"""The local phase: K optimizer steps of every client on its own rows, before anyone exchanges.

Clients are computed in chunks, all K steps of one together, so that its factors and activations
stay in cache. On the CPU each core has a chunk of its own: cores that share every product would
wait for one another after each. The result does not depend on how the clients are cut.

Legend: n clients of a chunk, b texts of each in a step, P parameters of a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from plait.config import Config
from plait.data.objectives import Objective
from plait.data.tokens import Batch, Tokens
from plait.factors import VALUE, Factor
from plait.learning_rates import lr_factor
from plait.lora import Dropout, Stack
from plait.machine.devices import moved
from plait.model.backbone import Backbone
from plait.model.memory import tokens_at_once
from plait.optimizers import ADAMW, Optimizer
from plait.rng import stream, torch_stream

Piece = TypeVar("Piece")
Result = TypeVar("Result")


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
    positions = range(round_ * config.local_steps, (round_ + 1) * config.local_steps)
    texts = np.array([batch_rows(shares[i], i, positions, config) for i in clients])
    rate = lr_factor(config, round_)
    turns = turns or [train] * config.local_steps
    phase = _Phase(backbone, stack, train, tokens, texts, positions, clients, config, rate, turns)
    losses = np.empty(texts.shape[:2])

    def train_chunk(chunk: list[int]) -> None:
        losses[chunk] = phase.train(chunk, optimizer)

    tokens_each = tokens.lengths[texts].sum(axis=2).mean(axis=1)
    most = tokens_at_once(backbone, stack, tokens, config)
    workers = int(min(backbone.backend.workers(), len(clients), max(1, most / tokens_each.mean())))
    at_once = min(backbone.chunk_tokens, most / workers)
    on_cores(train_chunk, chunks(tokens_each, at_once, workers), workers)
    for factor in phase.active:
        stack.steps[factor] += sum(factor in turn for turn in turns)
    return losses


@dataclass(frozen=True)
class _Phase:
    """What all chunks of a local phase share; `texts` (n, K, b) are the rows of each step."""

    backbone: Backbone
    stack: Stack
    factors: Factor
    tokens: Tokens
    texts: np.ndarray
    positions: range
    clients: Sequence[int]
    config: Config
    lr_factor: float
    turns: Sequence[Factor]

    @property
    def active(self) -> list[Factor]:
        """The factors that train."""
        return [factor for factor in self.stack.factors if factor in self.factors]

    def train(self, chunk: list[int], optimizer: Optimizer) -> np.ndarray:
        """All steps of some clients of the stack, in place; their losses (n, K) float64."""
        stack, rows = self.stack, moved(torch.tensor(chunk), self.backbone.device)
        leaves = {factor: value[rows] for factor, value in stack.factors.items()}
        kept = {f: {k: stack.state[k, f][rows] for k in optimizer.kinds} for f in self.active}
        of_steps = []
        for step, position in enumerate(self.positions):
            for factor, leaf in leaves.items():
                leaf.requires_grad_(factor in self.turns[step])
            batch = self.backbone.batch(self.tokens, self.texts[chunk, step])
            ids = [self.clients[k] for k in chunk]
            dropout = lora_dropout(batch, ids, position, self.config)
            losses = _means(self.backbone.losses(batch, leaves, dropout), batch.asked_counts)
            losses.sum().backward()
            of_steps.append(losses.detach())
            self._step(step, leaves, kept, optimizer)
        for factor in self.active:
            for kind, slot in (kept[factor] | {VALUE: leaves[factor].detach()}).items():
                stack.state[kind, factor][rows] = slot
        return torch.stack(of_steps, dim=1).cpu().double().numpy()

    def _step(
        self,
        step: int,
        leaves: dict[Factor, Tensor],
        kept: dict[Factor, dict[str, Tensor]],
        optimizer: Optimizer,
    ) -> None:
        """A step on each factor (n, P) in turn and what is kept beside it, in place."""
        config, rows = self.config, self.backbone.backend.optimizer_rows
        active = [factor for factor in self.active if factor in self.turns[step]]
        _clip([leaves[factor].grad for factor in active], config.clip_norm)
        for factor in active:
            leaf = leaves[factor]
            assert leaf.grad is not None
            lr = self.lr_factor * (config.head_lr if factor is Factor.HEAD else config.lr)
            beside = {kind: rows(slot) for kind, slot in kept[factor].items()}
            taken = int(self.stack.steps[factor][0])
            taken += sum(factor in turn for turn in self.turns[:step])
            optimizer.update(
                rows(leaf.detach()), rows(leaf.grad), beside, taken, lr, config.weight_decay
            )
            leaf.grad = None


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


def lora_dropout(
    batch: Batch, clients: Sequence[int], position: int, config: Config
) -> Dropout | None:
    """Dropout whose mask depends on client and step only, not on which clients share a chunk."""
    rate = config.lora_dropout
    if rate == 0:
        return None

    def keep(name: str, x: Tensor) -> Tensor:
        draws = [
            torch.rand(
                count,
                x.shape[-1],
                generator=torch_stream(config.seed, f"dropout {name}", client, position),
            )
            for client, count in zip(clients, batch.counts, strict=True)
        ]
        mask = moved((torch.cat(draws) >= rate).to(x.dtype), x.device) / (1 - rate)
        return functional.pad(mask, (0, 0, 0, len(batch.ids) - len(mask)))

    return keep


def _means(losses: Tensor, counts: np.ndarray) -> Tensor:
    """(Q,) -> (n,), the mean of each client's, whose numbers are `counts` (n,)."""
    if len(set(counts.tolist())) == 1:
        return losses.view(len(counts), -1).mean(dim=1)
    return torch.cat([own[None].mean(dim=1) for own in losses.split(counts.tolist())])


def _clip(grads: Sequence[Tensor | None], norm: float | None) -> None:
    """Scale each client's gradient (a row of all of `grads`) down to `norm`, in place."""
    if norm is None:
        return
    present = [grad for grad in grads if grad is not None]
    # Row by row, so that a client's norm is the same to the last bit whoever else is here.
    norms = torch.stack([grad.norm(dim=1) for grad in present], dim=1).norm(dim=1)
    factor = (norm / (norms + 1e-6)).clamp(max=1.0)
    for grad in present:
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
