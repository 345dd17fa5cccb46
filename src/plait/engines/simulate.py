"""All clients on one machine, as one stack: nothing needs to be exchanged."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from plait.engines.steps import evaluation, names, train_round
from plait.events import Event, RoundDone
from plait.job import Job
from plait.lora import Stack
from plait.metrics import all_pairs, apart, layer_states, pair_distances
from plait.mixing import neighbour_weights
from plait.privacy import seeded_noise
from plait.topology import rho_of_round


def simulate(job: Job, stack: Stack, first_round: int = 0) -> Iterator[Event]:
    """Run the rounds from `first_round` on, changing `stack` in place.

    Yields `RoundDone` after each round and `Evaluated` where the config asks for it; between two
    events the stack is whole, so it can be saved.

    Raises:
        ValueError: A client's loss is no longer finite.
    """
    config = job.config
    everyone = range(config.clients)
    noise = seeded_noise(config.seed)
    if first_round == 0:
        yield job.started
        yield evaluation(job, stack, -1)
    for round_ in range(first_round, config.rounds):
        begin = time.perf_counter()
        active = job.trained(round_)
        losses = train_round(job, stack, round_, everyone, noise)
        trained = time.perf_counter()
        W = job.schedule(round_)
        weights = neighbour_weights(W)
        before = dict(stack.factors)
        shared = job.shared(round_)
        for factor in stack.factors:
            if factor in shared:
                mine = before[factor]
                stack.factors[factor] = job.method.mix(mine, mine, weights)
        mixed = time.perf_counter()
        states = layer_states(job.backbone.layout, before, stack.factors, W)
        edges = [(int(i), int(j), float(W[i, j])) for i, j in np.argwhere(weights)]
        row_bytes = sum(4 * job.backbone.layout.size(f) for f in stack.factors if f in shared)
        yield RoundDone(
            round=round_,
            active=names(active),
            shared=names(shared),
            train_losses=losses.tolist(),
            edges=edges,
            rho=rho_of_round(W),
            sent_bytes=row_bytes * len(edges),
            before=states[0],
            after=states[1],
            apart=apart(job.backbone.layout, stack.factors),
            pairs_apart=all_pairs(pair_distances(job.backbone.layout, before)),
            train_seconds=trained - begin,
            mix_seconds=mixed - trained,
        )
        if config.evaluates_after(round_):
            yield evaluation(job, stack, round_)
