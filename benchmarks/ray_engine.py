"""A run on a Ray cluster beside the simulation: seconds per client-step, and bytes per round.

    python benchmarks/ray_engine.py --workers 2

The same run by both, round by round in turn, each with all cores of this machine; medians over the
rounds. The ratio says how much slower the cluster is for each client-step: whole rounds, with
exchange, mixing and diagnostics, without evaluation. The first round of each counts for nothing.

The other figures are what docs/scaling.md reckons with: seconds to load the model, seconds of a
checkpoint, bytes that the workers hand each other, and the rate of Ray's object store.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch

from plait.config import Config, Machine
from plait.engines.cluster import Cluster
from plait.engines.job import prepare
from plait.engines.simulate import Simulation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--local-steps", type=int, default=8)
    parser.add_argument("--topology", default="ring")
    parser.add_argument("--task", default="movies")
    args = parser.parse_args()
    config = Config(
        task=args.task, clients=args.clients, rounds=args.rounds + 1, topology=args.topology,
        local_steps=args.local_steps, eval_every=args.rounds + 2, eval_rows=16,
    )  # fmt: skip
    machine = Machine(device="cpu", engine="ray", workers=args.workers)
    torch.set_num_threads(os.cpu_count() or 1)
    job = prepare(config, machine)
    begin = time.perf_counter()
    with (
        Cluster(config, machine, partial(prepare, machine=machine)) as cluster,
        tempfile.TemporaryDirectory() as folder,
    ):
        figures: dict[str, Any] = {"start_seconds": time.perf_counter() - begin}
        figures |= race(config, Simulation(job, job.initial_stack()), cluster)
        begin = time.perf_counter()
        cluster.save(Path(folder) / "checkpoint.safetensors", config.rounds - 1)
        figures["save_seconds"] = time.perf_counter() - begin
        figures["store_bytes_per_second"] = store_rate()
    print(json.dumps(vars(args) | figures, indent=2))


def race(config: Config, simulation: Simulation, cluster: Cluster) -> dict[str, float]:
    """Seconds per client-step of both, a round of the one and then a round of the other."""
    engines = {"simulate": simulation, "ray": cluster}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    sent: dict[str, list[int]] = {"sent_bytes": [], "worker_bytes": []}
    for number in range(config.rounds - 1):
        for name, engine in engines.items():
            begin = time.perf_counter()
            done = engine.round(number)
            # The first round warms up.
            seconds[name] += [time.perf_counter() - begin] if number else []
        for key, values in sent.items():
            values.append(getattr(done, key))
    steps = config.clients * config.local_steps
    each = {name: median(values) / steps for name, values in seconds.items()}
    return {
        "simulate_seconds_per_client_step": each["simulate"],
        "ray_seconds_per_client_step": each["ray"],
        "ratio": each["ray"] / each["simulate"],
    } | {f"{key}_per_round": median(values) for key, values in sent.items()}


def store_rate(size: int = 64 << 20) -> float:
    """Bytes per second of Ray's object store: put in one worker, read in another."""
    bytes_of = ray.remote(num_cpus=0)(lambda array: int(array.sum(dtype=np.int64)))
    make = ray.remote(num_cpus=0)(lambda: np.ones(size, dtype=np.uint8))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        assert ray.get(bytes_of.remote(make.remote())) == size
        times.append(time.perf_counter() - begin)
    return size / median(times)


if __name__ == "__main__":
    main()
