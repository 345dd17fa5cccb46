"""The methods: what trains in a round, what travels, and how it is mixed.

A method is a value. RoLoRA and ADF-LoRA differ in one word of their rows below, and a new method
is one more row of `METHODS`: the command line, the conformance suite and the docs pick it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from plait.adaptive_phases import active_of_note, mix_with_notes
from plait.base_mixing import averaged_with_residual, stacked_into_base
from plait.config import Config, TopologySettings, Weights, names_of
from plait.factors import AB, BASE, NONE, NOTE, VALUE, A, B, Factor, public
from plait.later import Tensor
from plait.lookup import lookup
from plait.lora import initial_A
from plait.machine.file_cache import kept
from plait.mixing import AVERAGE, Mix, build_mix, each_factor, each_site, restored, taken
from plait.mixing_matrix import Matrix
from plait.optimizers import ADAMW, Optimizer
from plait.rng import stream
from plait.site_mixing import mean_product, norm_average, rotated_average, slice_average
from plait.topology import MixingSchedule, build_schedule, exact_after, rho_of, topology_row
from plait.wire_types import wire_type

Value = TypeVar("Value")
Schedule = Callable[[int], Value]
"""What holds in a round, or a step, by its number."""


def always(value: Value) -> Schedule[Value]:
    """The same in every round."""
    return lambda _round: value


def alternate(*values: Value, every: int) -> Schedule[Value]:
    """Each of `values` for `every` rounds in turn, by one clock for all clients.

    Example:
        >>> [alternate(Factor.B, Factor.A, every=2)(t).name for t in range(5)]
        ['B', 'B', 'A', 'A', 'B']
    """
    return lambda round_: values[(round_ // every) % len(values)]


def everywhere(_round: int, _client: int) -> Factor:
    """What trains in a round does so at all clients, in a method that says nothing else."""
    return AB


EVERY_STEP = always(AB)
"""When a factor takes local steps that trains in a round, in a method that says nothing else."""

AVERAGED = always(AVERAGE)
"""How a method mixes that says nothing else."""


Correct = Callable[[Tensor, Mapping[str, Tensor]], dict[str, Tensor]]
"""(value (n, P) before local training, kind -> slots after it) -> kind -> slots as they are sent or
kept, of a factor that trained and travels."""


def with_frozen(config: Config) -> Schedule[Factor]:
    """Both factors of an alternation, the frozen one only when `frozen_every` has it travel."""
    T, every = config.switch_every, config.frozen_every
    train = alternate(B, A, every=T)
    # With different ranks, a rule that leaves some out, or rounding, clients are never all equal.
    plain = (config.ranks, config.mix, config.wire) == (None, Config.mix, Config.wire)

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


def with_base(config: Config) -> Factor:
    """What travels of a method that adds to the frozen weights."""
    return AB | BASE if config.base_change == "mixed" else AB


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
        at: Which of these do at a client, by round and client; the others stay as they are there,
            and with none it rests, its head too.
        meets: Who hears whom, and with what weight; as the topology says where a row says nothing.
        picks: Which of these do at a client, by the note that it keeps and sends, if it does
            (adaptive_phases.py).
        turn: Which of these take a local step, by its number, counted from the run's first.
        share: Which of A and B travel in a round.
        kinds: Which slots of a factor that travels do; with `share` this fixes the bytes on the
            wire, and what differential privacy covers.
        optimizer: How a factor takes a step, and what is kept beside it.
        kept: Kinds of slot beside a value that are the method's own: zero at the start, and left
            alone where the optimizer starts anew.
        correct: What becomes of a factor between local training and mixing, if anything; all that
            it returns is made of values and of such slots, so differential privacy covers it.
        mix: What a client makes of its own slots and its neighbours' in a round; where a row says
            nothing, the rule that the config names, for each factor.
        base_rank: Of what the method adds to the frozen weights, R; 0 if nothing.
        conserves: Whether averaging leaves the mean of the shared factors over clients unchanged.
        topology: The topology that the method is defined on, when it isn't the user's choice.
        weights: The mixing weights, likewise.
        control: What a comparison runs beside it, where there is a gain that it doesn't own.
        exact: What holds exactly, and when; the tests hold it to that.
        source: Where it comes from.
    """

    summary: str
    train: Schedule[Factor]
    share: Schedule[Factor]
    at: Callable[[int, int], Factor] = everywhere
    meets: Callable[[Config], MixingSchedule] = build_schedule
    picks: Callable[[Sequence[float]], Factor] | None = None
    turn: Schedule[Factor] = EVERY_STEP
    kinds: tuple[str, ...] = (VALUE,)
    optimizer: Optimizer = ADAMW
    kept: tuple[str, ...] = ()
    correct: Correct | None = None
    mix: Schedule[Mix] = AVERAGED
    base_rank: int = 0
    conserves: Literal["factors", "nothing"] = "factors"
    topology: str | None = None
    weights: Weights | None = None
    control: Control | None = None
    exact: str = ""
    source: str = ""

    def trains(self, round_: int, client: int | None = None) -> Factor:
        """Which factors take local steps in a round, at a client or at any."""
        anywhere = self.train(round_)
        return anywhere if client is None else anywhere & self.at(round_, client)

    def plan(self, round_: int, clients: int) -> tuple[Factor, ...]:
        """What travels in a round, and what trains at each of so many clients."""
        return self.share(round_), *(self.trains(round_, client) for client in range(clients))


def interval_of(config: Config) -> int:
    """TAD-LoRA's T, c / sqrt(1 - rho) in whole rounds; all rounds where some never hear of others.

    The paper leaves c open. With c = 1 (`switch_scale`) exact averaging gives T = 1, as in RoLoRA.
    A graph that is drawn anew in each round has one rho, whatever the seed.

    Example:
        >>> interval_of(Config(topology="ring", clients=10))
        3
    """
    names = names_of(TopologySettings) | {"clients", "rounds", "seed"}
    used = {name: getattr(config, name) for name in names}
    gap = _gap(Config(**used | ({} if topology_row(config).static else {"seed": 0})))
    return max(1, round(config.switch_scale / math.sqrt(gap))) if gap > 0 else config.rounds


@kept(256)
def _gap(config: Config) -> float:
    """1 - rho; the last digits may differ from machine to machine."""
    return 1 - round(rho_of(config), 9)


@kept(8)
def walk(config: Config) -> tuple[int, ...]:
    """Who holds the model in each round, and after the last.

    From client i it goes to j with the probability W[i, j] of the round. With Metropolis weights
    that is a walk by Metropolis-Hastings: in the long run it is as often at each client, however
    many neighbours that has. The draws are the seed's, so that all know them without a word.
    """
    schedule = build_schedule(replace(config, weights="metropolis"))
    holders = [int(stream(config.seed, "walk").integers(config.clients))]
    for round_ in range(config.rounds):
        chances = schedule(round_)[holders[-1]]
        holders.append(int(stream(config.seed, "walk", round_).choice(len(chances), p=chances)))
    return tuple(holders)


def handed_on(config: Config) -> MixingSchedule:
    """The schedule of a walk: who holds the model next hears who holds it, and nobody else does."""

    def schedule(round_: int) -> Matrix:
        W, (holder, following) = np.eye(config.clients), walk(config)[round_ : round_ + 2]
        W[following] = 0
        W[following, holder] = 1
        return W

    return schedule


def tracking(method: Method) -> Method:
    """The method with gradient tracking: a client steps by what all do, as far as it has heard.

    x <- gossip(x + u + c) and c <- gossip(c + u) - u, where u is what local training adds to x, and
    c, whose mean over clients is zero, what a client lacks of the others. Kept are "tracked", which
    is c + u and travels with x, and "update", which is u. In a round where a factor rests it is
    only mixed, and so is "tracked".

    Sources: DIGing (Nedic, Olshevsky, Shi 2017, arXiv 1607.03218).
    """

    def correct(start: Tensor, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        update = now[VALUE] - start
        tracked = now["tracked"] + update - now["update"]
        return {VALUE: start + tracked, "tracked": tracked, "update": update}

    return replace(
        method,
        kinds=(*method.kinds, "tracked"),
        kept=("tracked", "update"),
        correct=correct,
    )


METHODS: dict[str, Callable[[Config], Method]] = {
    # B goes first: B starts at zero, where the gradient of A is zero.
    "adf": lambda config: Method(
        summary="ADF-LoRA: one factor trains for T rounds, then the other; both are mixed",
        train=alternate(B, A, every=config.switch_every),
        share=with_frozen(config),
        # Each of ADF's factors moves half as often.
        control=Control(method="dec-lora", lr_factor=0.5),
        exact="exact averaging: RoLoRA with phases of T; T beyond the run: FFA-LoRA",
        source="arXiv 2511.18291",
    ),
    "adf-offset": lambda config: replace(
        METHODS["adf"](config),
        summary="ADF-LoRA without a common clock: client i's is i rounds ahead, to show why",
        train=always(AB),
        at=lambda round_, client: alternate(B, A, every=config.switch_every)(round_ + client),
        share=always(AB),
        exact="T beyond rounds and clients together: FFA-LoRA",
        source="a control of plait's own",
    ),
    "dec-lora": lambda _: Method(
        summary="Dec-LoRA: both factors train, both are mixed",
        train=always(AB),
        share=always(AB),
        exact="the mean of each factor stays in mixing",
        source="arXiv 2501.15361",
    ),
    "ffa": lambda _: Method(
        summary="FFA-LoRA: only B trains and is mixed; A stays at the common start",
        train=always(B),
        share=always(B),
        exact="one rank: the mean of products is the product of means",
        source="arXiv 2403.12313",
    ),
    "rolora": lambda _: Method(
        summary="RoLoRA without a server: the factors alternate each round, the active one mixes",
        train=alternate(B, A, every=1),
        share=alternate(B, A, every=1),
        exact="exact averaging: the resting factor is equal everywhere",
        source="arXiv 2502.01755",
    ),
    "fedavg": lambda _: Method(
        summary="FedAvg of both factors (FedIT): Dec-LoRA on the complete graph",
        train=always(AB),
        share=always(AB),
        topology="complete",
        weights="metropolis",
        exact="all clients are equal after each round",
        source="arXiv 2305.05644",
    ),
    "local": lambda _: Method(
        summary="No exchange at all: the control",
        train=always(AB),
        share=always(NONE),
    ),
    "tad": lambda config: replace(
        METHODS["adf"](replace(config, switch_every=interval_of(config))),
        summary="TAD-LoRA: ADF-LoRA whose T follows from rho of the topology; "
        f"T = {interval_of(config)} on {config.topology}",
        exact="complete graph: T = 1",
        source="arXiv 2602.00451",
    ),
    "adf-adaptive": lambda config: Method(
        summary="ADF-LoRA whose phase ends when all agree that the frozen factor is nearly equal",
        train=always(AB),
        picks=active_of_note,
        share=always(AB | NOTE),
        mix=mix_with_notes(config),
        control=Control(method="dec-lora", lr_factor=0.5),
        exact="all change the phase in the same round",
        source="plait's own",
    ),
    "fedsa": lambda _: Method(
        summary="FedSA-LoRA: both factors train, only A is mixed; B stays at its client",
        train=always(AB),
        share=always(A),
        exact="the mean of A stays in mixing",
        source="arXiv 2410.01463",
    ),
    "decaf": lambda _: Method(
        summary="DeCAF: both factors train; the mean of products, cut to the rank by an SVD",
        train=always(AB),
        share=always(AB),
        mix=always(each_site(mean_product, any_rank=True)),
        conserves="nothing",
        exact="the mean product, where the rank is that of all who are mixed",
        source="arXiv 2505.21382",
    ),
    "flexlora": lambda config: replace(
        METHODS["decaf"](config),
        summary="FlexLoRA in gossip: DeCAF, with --ranks each client's product cut to its own rank",
        exact="equal ranks: DeCAF",
        source="arXiv 2402.11505",
    ),
    # Its source prunes ranks while it trains, too, and weights by the norm over all layers.
    "hetlora": lambda _: Method(
        summary="HetLoRA in gossip: averaged with weights that grow with the norm of each B A",
        train=always(AB),
        share=always(AB),
        mix=always(each_site(norm_average, any_rank=True, indivisible=False)),
        conserves="nothing",
        exact="equal norms: Dec-LoRA",
        source="arXiv 2401.06432",
    ),
    "raflora": lambda _: Method(
        summary="raFLoRA in gossip: with --ranks each direction averaged over those that have it",
        train=always(AB),
        share=always(AB),
        mix=always(each_site(slice_average, any_rank=True, indivisible=False)),
        exact="equal ranks: Dec-LoRA",
        source="raFLoRA, by its abstract",
    ),
    # The server of its source rotates all to fit the last mean, and tried 1, 0.5, 0.3 and 0.1 for
    # the strength.
    "fedrot": lambda _: Method(
        summary="FedRot-LoRA in gossip: neighbours' factors rotated to fit one's own, then mixed",
        train=always(AB),
        share=always(AB),
        mix=alternate(*(each_site(rotated_average(by, strength=1)) for by in (B, A)), every=1),
        conserves="nothing",
        exact="a rotation leaves the neighbour's B A as it is",
        source="github.com/haoran-zh/FedRot-LoRA",
    ),
    "fedex": lambda config: Method(
        summary="FedEx-LoRA in gossip: averaged, and what that lacks of the mean product is kept",
        train=always(AB),
        share=always(with_base(config)),
        mix=always(averaged_with_residual(config.base_change == "mixed")),
        base_rank=config.base_rank,
        conserves="nothing",
        exact="the mean product, while the base's rank suffices",
        source="arXiv 2410.09432",
    ),
    "flora": lambda config: replace(
        METHODS["fedex"](config),
        summary="FLoRA in gossip: the mean product is added to the model, and LoRA starts again",
        mix=lambda round_: stacked_into_base(
            lambda layout: initial_A(layout, config.seed, round_), config.base_change == "mixed"
        ),
        source="arXiv 2409.05976",
    ),
    # Its source begins each round with B, and can smooth the gradients, which this doesn't.
    "la-lora": lambda _: Method(
        summary="LA-LoRA: B and A take local steps by turns; both are mixed",
        train=always(AB),
        turn=alternate(B, A, every=1),
        share=always(AB),
        exact="one step a round: ADF-LoRA with T = 1",
        source="github.com/junkangLiu0/LA-LORA",
    ),
    "rw-lora": lambda config: Method(
        summary="RW-LoRA: one model walks over the graph; who has it trains it and hands it on",
        train=always(AB),
        at=lambda round_, client: AB if walk(config)[round_] == client else NONE,
        meets=handed_on,
        share=always(AB),
        mix=always(replace(each_factor(taken), restore=None)),
        conserves="nothing",
        weights="metropolis",
        exact="one client's steps after another's; a message a round, or none",
        source="RW-LoRA, by a note on it",
    ),
    "tracking": lambda config: replace(
        tracking(METHODS["dec-lora"](config)),
        summary="Dec-LoRA with gradient tracking, against unequal data; twice the bytes",
        exact="the mean of corrections is 0; complete graph: Dec-LoRA",
        source="DIGing, arXiv 1607.03218, on Dec-LoRA",
    ),
    "adf-tracking": lambda config: replace(
        tracking(replace(METHODS["adf"](config), share=always(AB))),
        summary="ADF-LoRA with gradient tracking of the factor that trains; twice the bytes",
        control=Control(method="tracking", lr_factor=0.5),
        exact="complete graph: ADF-LoRA",
        source="the same, on ADF-LoRA",
    ),
}


def build_method(config: Config) -> Method:
    """The method that `config` names, with the rule for mixing that it names.

    Raises:
        ValueError: There is no such method or rule, the method has a mix of its own, or it can't
            work with what it says itself.
    """
    method, how = lookup(METHODS, config.method, "method")(config), config.method
    by_phase = config.optimizer_state == "reset_each_phase"
    if method.picks and (by_phase or config.wire != Config.wire):
        raise ValueError(
            f"{config.method} sends a count and knows no round before: give --wire float32, and "
            "--optimizer-state reset_each_round or keep."
        )
    if method.base_rank and config.lora_dropout:
        raise ValueError(f"{config.method} adds to the frozen model: leave out --lora-dropout.")
    if config.mix != Config.mix:
        mix, how = build_mix(config.mix), f"mix {config.mix}"
        if method.mix is not AVERAGED:
            raise ValueError(f"{config.method} mixes in a way of its own; leave out --mix.")
        method = replace(method, mix=always(mix))
    if wire_type(config.wire).share is not None:
        method = replace(method, kept=(*method.kept, *map(public, method.kinds)))
    _check(method, config, how)
    if config.ranks and (method.correct or not method.mix(0).any_rank):
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


def _check(method: Method, config: Config, how: str) -> None:
    """Refuse a method that shares what it doesn't have, or mixes together what travels apart.

    Args:
        method: The method.
        config: What it was built of.
        how: What says how it mixes.
    """
    if unknown := set(method.kinds) - {VALUE, *method.optimizer.kinds, *method.kept}:
        raise ValueError(f"{config.method} shares slots that it doesn't keep: {sorted(unknown)}.")
    sparse = wire_type(config.wire).share is not None
    for round_ in range(config.rounds):
        if sparse and method.mix(round_).restore is not restored:
            raise ValueError(
                f"{how} goes on from what is sent, and --wire {config.wire} sends only a part: "
                "take another --wire, or a method that averages."
            )
        together = method.mix(round_).together
        if together and (part := method.share(round_) & together) not in (NONE, together):
            fix = "" if config.frozen_every == 1 else ", or --frozen-every 1 if that is why"
            raise ValueError(
                f"{how} mixes A and B together, and {config.method} shares only {part.name} in "
                f"round {round_}: take a method that shares both in the same rounds, or a mix that "
                f"takes each by itself{fix}."
            )
