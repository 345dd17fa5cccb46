"""A federation on one machine for trying out: real processes, real certificates, loopback.

<out>/federation/    its files (certificates.py); each peer's run folder is <name>/out there
<out>/<name>.log     what each peer said, a line of JSON each
<out>/config.json, summary.json, adapters/    of all peers together, as `plait run` has them
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.config import THIS_MACHINE, Config, Machine
from plait.events import Evaluated, Started, together
from plait.figures import taken
from plait.machine.files import read_json, save_tensors, write_atomically
from plait.methods import build_method, settled
from plait.mixing import mean
from plait.peers.certificates import init_federation
from plait.peers.federation import Limits, load_federation, load_peer
from plait.runs.run_folder import load_finished
from plait.runs.samples import write_samples
from plait.site_mixing import mean_pair
from plait.topology import build_schedule

ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
POLL_S = 0.2
GRACE_S = 20.0


@dataclass(frozen=True)
class Ended:
    """How a peer's process ended: its exit code, and the last line of its log."""

    name: str
    code: int
    last_line: str


def up(
    config: Config,
    num_peers: int,
    out: Path,
    limits: Limits | None = None,
    machine: Machine = THIS_MACHINE,
) -> Iterator[str]:
    """Run a federation of `num_peers` processes on this machine to its end.

    Args:
        config: The settings of the run.
        num_peers: How many peers.
        out: A new folder.
        limits: Sizes and times.
        machine: Where and how fast each peer computes.

    Yields:
        Lines that say how far the peers are.

    Raises:
        ValueError: The config can't run, the folder is in use, or a peer failed.
    """
    config = Config.from_json(config.to_json() | {"clients": num_peers})
    build_schedule(settled(config))  # a typing error shows here, not N times in logs
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; take another --out.")
    names = [f"peer-{k}" for k in range(num_peers)]
    federation_file = init_federation(
        out / "federation", names, config, limits=limits, machine=machine
    )
    with told_to_end():
        processes = start(federation_file, names, out)
        try:
            yield from watch(processes, federation_file)
        finally:
            stop(processes)
    failed = [end for end in ended(processes, out) if end.code]
    if failed:
        raise ValueError(
            "; ".join(f"{end.name} ended with {end.code}: {end.last_line}" for end in failed)
            + f". The logs are {out}/<name>.log."
        )
    merge(federation_file, out)


@contextmanager
def told_to_end() -> Iterator[None]:
    """SIGTERM, of a service manager or a job's time limit, ends the block as Ctrl-C does."""

    def end(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def start(
    federation_file: Path, names: Sequence[str], logs: Path, env: Mapping[str, str] | None = None
) -> dict[str, subprocess.Popen[bytes]]:
    """Start peers as processes of their own, each with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // len(names))
    given = {"OMP_NUM_THREADS": str(threads), **os.environ, **(env or {})}
    processes = {}
    for name in names:
        arguments = ["peer", "--config", str(federation_file), "--name", name]
        with (logs / f"{name}.log").open("ab") as log:
            processes[name] = subprocess.Popen(
                [sys.executable, "-m", "plait", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=given,
            )
    return processes


def watch(processes: Mapping[str, subprocess.Popen[bytes]], federation_file: Path) -> Iterator[str]:
    """Wait until all have ended or one has failed; a line for each round of the slowest."""
    places = {name: load_peer(federation_file, name).out / "events.jsonl" for name in processes}
    rounds = load_federation(federation_file).config.rounds
    said = -1
    while any(process.poll() is None for process in processes.values()):
        if any(process.returncode for process in processes.values()):
            return  # the others would wait for it
        done = {name: _rounds_done(place) for name, place in places.items()}
        if min(done.values()) > said:
            said = min(done.values())
            yield f"round {said}/{rounds}" + (
                f", the fastest is at {max(done.values())}" if max(done.values()) > said else ""
            )
        time.sleep(POLL_S)


def stop(processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """End those that still run, kindly first."""
    for process in processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    for process in processes.values():
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ended(processes: Mapping[str, subprocess.Popen[bytes]], logs: Path) -> list[Ended]:
    """How each process ended."""
    return [
        Ended(name, process.returncode, _last_line(logs / f"{name}.log"))
        for name, process in processes.items()
    ]


def merge(federation_file: Path, out: Path) -> dict[str, Any]:
    """Bring the peers' results together: adapters, their mean, and one summary."""
    federation = load_federation(federation_file)
    folders = [load_peer(federation_file, name).out for name in federation.names]
    summaries = [read_json(folder / "summary.json") for folder in folders]
    adapters = out / "adapters"
    for client, folder in enumerate(folders):
        name = f"client-{client}"
        shutil.copytree(folder / "adapters" / name, adapters / name)
    average_adapters(adapters, federation.config)
    write_atomically(out / "config.json", json.dumps(federation.config.to_json(), indent=2) + "\n")
    said = [load_finished(folder) for folder in folders]
    ends = [[one for one in events if isinstance(one, Evaluated)][-1] for events in said]
    nobody_has: dict[str, Any] = {
        "averaged_score": math.nan,
        "averaged_loss": math.nan,
        "averaged_confusion": [],
    }
    end = replace(together(ends), seconds=math.nan, **nobody_has)
    shared = ("method", "task", "seed", "rounds", "metric", "majority", "config_digest")
    incidents = {
        name: summary["incidents"]
        for name, summary in zip(federation.names, summaries, strict=True)
        if summary["incidents"]
    }
    # What all peers have alike: the first event, and the base before the first round.
    begin = [event for event in said[0] if isinstance(event, Started | Evaluated)][:2]
    summary = {key: summaries[0][key] for key in shared} | {
        "clients": len(folders),
        "topology": federation.config.topology,
        **{key: value for key, value in taken([*begin, end]).items() if not math.isnan(value)},
        "sent_bytes": sum(summary["sent_bytes"] for summary in summaries),
        "incidents": incidents,
    }
    if "dp_epsilon" in summaries[0]:
        summary["dp_epsilon"] = max(one["dp_epsilon"] for one in summaries)
        summary["dp_delta"] = summaries[0]["dp_delta"]
    summary |= write_samples(out, federation.config)
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def average_adapters(adapters: Path, config: Config) -> None:
    """`mean`, the adapter that nobody has in a run between machines: here all are at hand.

    Args:
        adapters: Holds the folders of all clients.
        config: The run's.
    """
    base_rank = build_method(config).base_rank
    rank = config.rank + base_rank
    parts = [load_file(adapters / f"client-{k}" / ADAPTER) for k in range(config.clients)]
    stacks = {
        key: torch.stack([_filled(key, part[key], rank, base_rank) for part in parts])
        for key in parts[0]
    }
    averaged = {
        key: mean(stack.flatten(1))[0].view_as(stack[0]).contiguous()
        for key, stack in stacks.items()
    }
    for key in [key for key in stacks if base_rank and key.endswith(LORA_A)]:
        other = key.removesuffix(LORA_A) + LORA_B
        pair = mean_pair(stacks[key], stacks[other])
        averaged |= {key: pair[0].float().contiguous(), other: pair[1].float().contiguous()}
    (adapters / "mean").mkdir()
    save_tensors(averaged, adapters / "mean" / ADAPTER, {"format": "pt"})
    settings = json.loads((adapters / "client-0" / SETTINGS).read_text())
    settings["lora_alpha"] *= rank / settings["r"]
    settings["r"] = rank
    (adapters / "mean" / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def _filled(key: str, value: Tensor, rank: int, base_rank: int) -> Tensor:
    """A factor of a client of small rank with zeros up to the largest one; other tensors as is.

    The zeros go where a simulation has them, before what is added to the frozen weights: at the end
    of the rows, a decomposition would round otherwise.
    """
    if not key.endswith((LORA_A, LORA_B)):
        return value
    dim = 0 if key.endswith(LORA_A) else 1
    own, base = value.split([value.shape[dim] - base_rank, base_rank], dim=dim)
    shape = list(value.shape)
    shape[dim] = rank - value.shape[dim]
    return torch.cat([own, value.new_zeros(shape), base], dim=dim)


def _rounds_done(events: Path) -> int:
    if not events.exists():
        return 0
    with events.open("rb") as file:
        return sum(line.startswith(b'{"event": "RoundDone"') for line in file)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() or ["no log"]
    try:
        return str(json.loads(lines[-1])["message"])
    except (ValueError, KeyError, TypeError):
        return lines[-1][:500]
