"""A federation whose members come and go, simulated: one client after another, in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from plait.engines.job import Job
from plait.engines.steps import local_steps, mix, train_round
from plait.lora import Stack
from plait.mixing import neighbour_weights
from plait.peers.membership import Members
from plait.peers.quorum import middle
from plait.privacy import seeded_noise
from plait.topology import build_schedule


def simulated(jobs: Sequence[Job], members: Members) -> list[Stack]:
    """What each peer ends with.

    Whoever joins begins from the middle of its neighbours' states at the end of the round before.

    Args:
        jobs: Of each peer, in the order of the newest list.
        members: The lists.
    """
    stacks = [job.initial_stack([k]) for k, job in enumerate(jobs)]
    noise = seeded_noise(0)
    before: list[int] = []
    for t in range(jobs[0].config.rounds):
        federation = members.at(t)
        here = [k for k, one in enumerate(federation.peers) if one.takes_part(t)]
        W = neighbour_weights(build_schedule(federation.config)(t))
        for k in set(here) - set(before) if t > 0 else ():
            own = {slot: value[0] for slot, value in stacks[k].state.items()}
            states = [
                {s: v[0] for s, v in stacks[j].state.items() if s in jobs[j].travelled(t)}
                for j in here
                if W[k, j] and j != k
            ]
            for slot, row in middle(own, states).items():
                stacks[k].state[slot] = row[None].clone()
        for k in here:
            train_round(jobs[k], stacks[k], t, [k], noise, local_steps)
        sent = {
            k: {slot: stacks[k].state[slot].clone() for slot in jobs[k].shared(t)} for k in here
        }
        for k in here:
            heard = [j for j in here if j != k and W[k, j]]
            theirs = {slot: torch.cat([sent[j][slot] for j in heard]) for slot in sent[k]}
            stacks[k].state |= mix(jobs[k], sent[k], theirs, W[k, heard][None], t, [k])
        before = here
    return stacks
