"""The figures of the explanation, computed by plait: `python docs/figures.py` draws all.

Nothing here is typed in from elsewhere: mixing matrices, norms and runs are those of the package.
Legend: N clients, P parameters of a factor, Xi the mean squared distance from the mean client.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from transformers import BertConfig, BertForSequenceClassification

import plait
from plait.config import Config
from plait.events import RoundDone
from plait.figures import FIGURES
from plait.metrics import consensus, mixing_errors
from plait.mixing import average, neighbour_weights
from plait.topology import build_schedule, rho_of

FOLDER = Path(__file__).parent / "figures"
COLOURS = {"A": "#0072B2", "B": "#D55E00", "grey": "#777777", "C": "#009E73", "D": "#CC79A7"}
"""Okabe and Ito's, which colour-blind readers can tell apart."""
BY_METHOD = {"adf": "B", "dec-lora": "A", "ffa": "C", "rolora": "D"}


def rho_by_topology() -> Figure:
    """How much of the disagreement a round leaves, for ten clients (eight on the hypercube)."""
    configs = {
        "complete": Config(topology="complete"),
        "random graph, p = .5": Config(topology="erdos_renyi", p=0.5),
        "exponential": Config(topology="exponential"),
        "torus": Config(topology="torus"),
        "one-peer exponential": Config(topology="one_peer_exponential"),
        "hypercube, N = 8": Config(topology="hypercube", clients=8),
        "Base-2": Config(topology="base"),
        "random regular": Config(topology="regular"),
        "small world": Config(topology="small_world"),
        "pairs, p = .1": Config(topology="pairs", p=0.1),
        "ring": Config(topology="ring"),
        "star": Config(topology="star"),
        "pairs, p = .02": Config(topology="pairs", p=0.02),
    }
    rho = {name: rho_of(config) for name, config in configs.items()}
    names = sorted(rho, key=lambda name: -rho[name])
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    bars = axes.barh(names, [rho[name] for name in names], color=COLOURS["A"])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set(xlabel="rho: disagreement left after a round", xlim=(0, 1.12))
    return figure


def contraction() -> Figure:
    """Xi of random states under gossip alone, and the rate that rho promises."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    rounds = np.arange(31)
    start = torch.randn(10, 1000, generator=torch.Generator().manual_seed(0)).double()
    shown = [("ring", {}, "A"), ("pairs", {"p": 0.1}, "B"), ("exponential", {}, "C")]
    for topology, settings, colour in shown:
        config = Config(topology=topology, **settings)
        schedule, rho, X = build_schedule(config), rho_of(config), start
        distances = [consensus(X)]
        for t in rounds[:-1]:
            X = average(X, X, neighbour_weights(schedule(int(t))))
            distances.append(consensus(X))
        label = f"{topology}, rho = {rho:.2f}"
        axes.semilogy(rounds, distances, color=COLOURS[colour], label=label)
        axes.semilogy(rounds, distances[0] * rho ** (2 * rounds), ":", color=COLOURS[colour])
    axes.set(xlabel="rounds of gossip", ylabel="Xi", ylim=(1e-6 * distances[0], 3 * distances[0]))
    axes.legend(title="dotted: Xi times rho to the power 2t")
    return figure


def mixing_error_orders() -> Figure:
    """Mean ||E_i|| by the clients' disagreement: of mixing both factors, and of mixing only B."""
    N, r, d = 10, 8, 64
    generator = torch.Generator().manual_seed(0)
    mean_A, mean_B = torch.randn(r, d, generator=generator), torch.randn(d, r, generator=generator)
    dA = torch.randn(N, r, d, generator=generator)
    dB = torch.randn(N, d, r, generator=generator)
    W = build_schedule(Config(topology="ring"))(0)
    scales = np.logspace(-3, 0, 10)
    errors: dict[str, list[float]] = {"both factors are mixed": [], "only the active one, B": []}
    for scale in scales:
        A, B = mean_A + scale * dA, mean_B + scale * dB
        A_mixed, B_mixed = (_mixed(X, W) for X in (A, B))
        for name, A_after in zip(errors, (A_mixed, A), strict=True):
            errors[name].append(float(mixing_errors(A, B, A_after, B_mixed, W).mean()))
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for (name, values), colour in zip(errors.items(), ("B", "D"), strict=True):
        order = np.polyfit(np.log(scales[:5]), np.log(values[:5]), 1)[0]
        label = f"{name}: slope {order:.2f}"
        axes.loglog(scales, values, "o-", color=COLOURS[colour], label=label, markersize=4)
    axes.set(xlabel="disagreement of the clients", ylabel="mean norm of E")
    axes.legend()
    return figure


def _mixed(X: torch.Tensor, W: np.ndarray) -> torch.Tensor:
    flat = X.flatten(1)
    return average(flat, flat, neighbour_weights(W)).view_as(X)


# -- runs of a small random model, so that a reader can draw them again in seconds


def _run(method: str) -> list[RoundDone]:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 32,
    }  # fmt: skip
    model = BertForSequenceClassification(BertConfig(num_labels=2, **sizes))
    rng = np.random.default_rng(0)
    # Each client sees words of its own, and the label is whether the first is an even one.
    hands = [[_row(rng, client) for _ in range(64)] for client in range(10)]
    trainer = plait.Trainer(
        model=model,
        tokenizer=None,
        train_dataset=hands,
        eval_dataset=[_row(rng, client) for client in range(10) for _ in range(2)],
        config=Config(
            method=method, rounds=30, switch_every=5, topology="ring", local_steps=4,
            batch_size=16, lr=5e-3, eval_every=30,
        ),
        machine=plait.Machine(device="cpu"),
    )  # fmt: skip
    return [event for event in trainer if isinstance(event, RoundDone)]


def _row(rng: np.random.Generator, client: int) -> dict[str, object]:
    words = rng.integers(2 + 6 * client, 8 + 6 * client, 6)
    return {"input_ids": [1, *words.tolist()], "labels": int(words[0] % 2)}


def phases(rounds: list[RoundDone]) -> Figure:
    """Xi of both factors in a run of ADF-LoRA with T = 5; the phases of B shaded."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    t = [event.round + 1 for event in rounds]
    for factor in "AB":
        values = [FIGURES[f"consensus_{factor}"].value(event) for event in rounds]
        axes.semilogy(t, values, "o-", color=COLOURS[factor], label=f"Xi of {factor}", markersize=3)
    for event in rounds:
        if event.active == "B":
            axes.axvspan(event.round + 0.5, event.round + 1.5, color=COLOURS["B"], alpha=0.1, lw=0)
    axes.set(xlabel="round (shaded: B trains)", ylabel="Xi after mixing")
    axes.legend()
    return figure


def cross_terms(runs: dict[str, list[RoundDone]]) -> Figure:
    """||C|| after mixing, of all layers together, for four methods."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for method, rounds in runs.items():
        values = [FIGURES["cross_term"].value(event) for event in rounds]
        axes.plot([event.round + 1 for event in rounds], values, label=method,
                  color=COLOURS[BY_METHOD[method]])  # fmt: skip
    axes.set(xlabel="round", ylabel="norm of the cross term")
    axes.legend()
    return figure


def main() -> None:
    """Draw all figures."""
    mpl.use("Agg")
    mpl.rcParams.update({
        "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
        "svg.hashsalt": "plait", "font.size": 10,
    })  # fmt: skip
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    runs = {method: _run(method) for method in BY_METHOD}
    figures: dict[str, Callable[[], Figure]] = {
        "rho": rho_by_topology,
        "contraction": contraction,
        "orders": mixing_error_orders,
        "phases": lambda: phases(runs["adf"]),
        "cross-terms": lambda: cross_terms(runs),
    }
    FOLDER.mkdir(exist_ok=True)
    for name, draw in figures.items():
        figure = draw()
        figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
