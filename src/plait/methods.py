"""The methods: what trains in a round, what travels, and how it is mixed.

A method is a value. RoLoRA and ADF-LoRA differ in one word of their rows below, and a new method
is one more row of `METHODS`: the command line, the conformance suite and the docs pick it up.

Sources: ADF-LoRA (arXiv 2511.18291), Dec-LoRA (2501.15361), FFA-LoRA (2403.12313),
RoLoRA (2502.01755), FedIT for federated averaging of both factors (2305.05644), TAD-LoRA
(2602.00451).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from plait.config import Config, Weights
from plait.factors import AB, NONE, VALUE, A, B, Factor
from plait.lookup import lookup
from plait.mixing import AVERAGE, Mix, build_rule, each_factor
from plait.optimizers import ADAMW, Optimizer
from plait.topology import exact_after, rho_of

Schedule = Callable[[int], Factor]


def always(factors: Factor) -> Schedule:
    """The same factors in every round."""
    return lambda _round: factors


def alternate(*factors: Factor, every: int) -> Schedule:
    """Each of `factors` for `every` rounds in turn, by one clock for all clients.

    Example:
        >>> [alternate(Factor.B, Factor.A, every=2)(t).name for t in range(5)]
        ['B', 'B', 'A', 'A', 'B']
    """
    return lambda round_: factors[(round_ // every) % len(factors)]


def with_frozen(config: Config) -> Schedule:
    """Both factors of an alternation, the frozen one only when `frozen_every` has it travel."""
    T, every = config.switch_every, config.frozen_every
    train = alternate(B, A, every=T)
    # Clients of different rank, or a rule that leaves some out, are never all equal.
    plain = config.ranks is None and config.mix == Config.mix

    def rests(round_: int) -> bool:
        start = round_ - round_ % T
        if every:
            return (round_ - start) % every > 0
        if start == 0:
            return config.ranks is None
        # What was trained last is averaged from the round before this phase on.
        rounds = exact_after(config, start - 1) if plain else None
        return rounds is not None and start - 1 + rounds <= round_

    return lambda round_: train(round_) if rests(round_) else AB


@dataclass(frozen=True, kw_only=True)
class Control:
    """What a method is held against beside its rivals: a method and rate that move as far."""

    method: str
    lr_factor: float
    """Its learning rate, in units of the one of the method that it controls."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune together.

    Attributes:
        summary: One line for `plait methods`.
        train: Which of A and B take local steps in a round.
        share: Which of A and B travel in a round.
        kinds: Which slots of a factor that travels do; with `share` this fixes the bytes on the
            wire, and what differential privacy covers.
        optimizer: How a factor takes a step, and what is kept beside it.
        mix: What a client makes of its own slots and its neighbours'; where a row says nothing, the
            rule that the config names, for each factor.
        conserves: Whether averaging leaves the mean of the shared factors over clients unchanged.
        topology: The topology that the method is defined on, when it isn't the user's choice.
        weights: The mixing weights, likewise.
        control: What a comparison runs beside it, where there is a gain that it doesn't own.
    """

    summary: str
    train: Schedule
    share: Schedule
    kinds: tuple[str, ...] = (VALUE,)
    optimizer: Optimizer = ADAMW
    mix: Mix = AVERAGE
    conserves: Literal["factors", "nothing"] = "factors"
    topology: str | None = None
    weights: Weights | None = None
    control: Control | None = None


@lru_cache(maxsize=8)
def interval_of(config: Config) -> int:
    """TAD-LoRA's T, c / sqrt(1 - rho) in whole rounds; all rounds where some never hear of others.

    The paper leaves c open. With c = 1 (`switch_scale`) exact averaging gives T = 1, as in RoLoRA.

    Example:
        >>> interval_of(Config(topology="ring", clients=10))
        3
    """
    gap = 1 - round(rho_of(config), 9)  # the last digits may differ from machine to machine
    return max(1, round(config.switch_scale / math.sqrt(gap))) if gap > 0 else config.rounds


METHODS: dict[str, Callable[[Config], Method]] = {
    # B goes first: B starts at zero, where the gradient of A is zero.
    "adf": lambda config: Method(
        summary="ADF-LoRA: one factor trains for T rounds, then the other; both are mixed",
        train=alternate(B, A, every=config.switch_every),
        share=with_frozen(config),
        # Each of ADF's factors moves half as often.
        control=Control(method="dec-lora", lr_factor=0.5),
    ),
    "tad": lambda config: replace(
        METHODS["adf"](replace(config, switch_every=interval_of(config))),
        summary="TAD-LoRA: ADF-LoRA whose T follows from rho of the topology; "
        f"T = {interval_of(config)} on {config.topology}",
    ),
    "dec-lora": lambda _: Method(
        summary="Dec-LoRA: both factors train, both are mixed",
        train=always(AB),
        share=always(AB),
    ),
    "ffa": lambda _: Method(
        summary="FFA-LoRA: only B trains and is mixed; A stays at the common start",
        train=always(B),
        share=always(B),
    ),
    "rolora": lambda _: Method(
        summary="RoLoRA without a server: the factors alternate each round, the active one mixes",
        train=alternate(B, A, every=1),
        share=alternate(B, A, every=1),
    ),
    "fedavg": lambda _: Method(
        summary="FedAvg of both factors (FedIT): Dec-LoRA on the complete graph",
        train=always(AB),
        share=always(AB),
        topology="complete",
        weights="metropolis",
    ),
    "local": lambda _: Method(
        summary="No exchange at all: the control",
        train=always(AB),
        share=always(NONE),
    ),
}


def build_method(config: Config) -> Method:
    """The method that `config` names, with the rule for mixing that it names.

    Raises:
        ValueError: There is no such method or rule, the method has a mix of its own, or it can't
            work with what it says itself.
    """
    method = lookup(METHODS, config.method, "method")(config)
    _check(method, config)
    if config.mix != Config.mix:
        rule = build_rule(config.mix)
        if method.mix is not AVERAGE:
            raise ValueError(f"{config.method} mixes in a way of its own; leave out --mix.")
        method = replace(method, mix=each_factor(rule))
    if config.ranks and not method.mix.any_rank:
        how = config.method if config.mix == Config.mix else f"mix {config.mix}"
        raise ValueError(f"{how} needs clients of one rank: give --rank instead of --ranks.")
    return method


def settled(config: Config) -> Config:
    """The config with the topology and the weights that its method is defined on.

    Example:
        >>> settled(Config(method="fedavg", weights="laplacian")).weights
        'metropolis'
    """
    method = build_method(config)
    topology, weights = method.topology or config.topology, method.weights or config.weights
    return replace(config, topology=topology, weights=weights)


def _check(method: Method, config: Config) -> None:
    """Refuse a method that shares what it doesn't have, or mixes together what travels apart."""
    if unknown := set(method.kinds) - {VALUE, *method.optimizer.kinds}:
        raise ValueError(f"{config.method} shares slots that it doesn't keep: {sorted(unknown)}.")
    together = method.mix.together
    for round_ in range(config.rounds if together else 0):
        if (part := method.share(round_) & together) not in (NONE, together):
            raise ValueError(
                f"{config.method} mixes {together.name} together and shares only {part.name} in "
                f"round {round_}: let them travel in the same rounds, or mix with each_factor."
            )
