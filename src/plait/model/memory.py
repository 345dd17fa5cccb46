"""How many tokens local training may hold at once within a stated budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from plait.config import Config
from plait.data.sources import say
from plait.data.tokens import Tokens
from plait.factors import Factor
from plait.lora import Stack
from plait.machine.devices import free_bytes
from plait.model.backbone import Backbone
from plait.model.interface_encoder import InterfaceEncoder


def tokens_at_once(
    backbone: Backbone, stacks: Sequence[Stack], tokens: Tokens, config: Config
) -> float:
    """What `Machine.memory_gib` leaves for activations beside the state of runs, in tokens.

    Without a budget, what half of a graphics card's free memory holds, since the backward pass
    needs some too; on a CPU infinity. The model itself, which every run needs once, isn't counted.

    Raises:
        ValueError: One client's batch doesn't fit.
    """
    given, stack = backbone.machine.memory_gib, stacks[0]
    if given is None:
        free = free_bytes(backbone.device) / 2
        return free if math.isinf(free) else free / activation_bytes(backbone, stack, tokens)
    state = sum(slot.nbytes for one in stacks for slot in one.state.values())
    hidden = 0 if tokens.hidden is None else tokens.hidden.nbytes
    room = given * 2**30 - state - hidden
    needed = config.batch_size * float(tokens.lengths.mean())
    per_token = _least_bytes(backbone, stack, tokens, room / needed)
    fits = room / per_token
    if fits < needed:
        least = (state + hidden + needed * per_token) / 2**30
        clients = sum(len(one.factors[Factor.A]) for one in stacks)
        raise ValueError(
            f"memory_gib is {given:g}, but {clients} clients and one batch need "
            f"{least:.2f} GiB. Give more, or lower clients, rank or batch_size."
        )
    return fits


def _least_bytes(backbone: Backbone, stack: Stack, tokens: Tokens, enough: float) -> float:
    """`activation_bytes`; if that isn't few enough, with layers computed again where they can be.

    Then a token leaves the layers' inputs, and in the backward pass all of one layer at a time.
    """
    encoder = backbone.encoder
    if not isinstance(encoder, InterfaceEncoder):
        return activation_bytes(backbone, stack, tokens)
    encoder.recompute = False
    whole = activation_bytes(backbone, stack, tokens)
    if whole <= enough or not encoder.layers:
        return whole
    encoder.recompute = True
    say("memory_gib holds no batch with all of its activations: layers are computed twice.")
    return activation_bytes(backbone, stack, tokens) + whole / len(encoder.layers)


def activation_bytes(backbone: Backbone, stack: Stack, tokens: Tokens) -> float:
    """What a token leaves in memory until the backward pass, for the longest of the texts."""
    longest = int(tokens.lengths.argmax())
    leaves = {f: value[:1].detach().requires_grad_() for f, value in stack.factors.items()}

    def held(num_texts: int) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # with what made it, it would hold on to itself

        batch = backbone.batch(tokens, np.full((1, num_texts), longest))
        with saved_tensors_hooks(note, lambda tensor: tensor):
            backbone.losses(batch, leaves)
        return sum(sizes.values())

    # The difference leaves out what doesn't grow with the tokens, such as weights.
    length = int(tokens.lengths[longest])
    half = max(1, min(4, 512 // length))  # of long texts few: what is measured must fit, too
    return (held(2 * half) - held(half)) / (half * length)
