"""Peers for as long as one likes: does anything grow, while some of them are killed and come back?

    python benchmarks/soak.py --minutes 60

Real processes with mutual TLS on this machine, in very short rounds without end. Of each peer that
was never killed the memory of its own (without files), open descriptors and threads are read every
few seconds; what they are in the last tenth of the time is put beside the second tenth. Ends with 1
if one grew.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from plait.config import Config, Machine
from plait.peers.certificates import init_federation
from plait.peers.federation import Limits, load_peer
from plait.peers.local_federation import start, stop

CONFIG = Config(
    task="trec", topology="ring", rounds=10**6, local_steps=1, batch_size=1, rank=2, top_layers=1,
    eval_every=500, eval_rows=16,
)  # fmt: skip
LIMITS = Limits(round_timeout_s=10, start_timeout_s=120, linger_s=1)
MACHINE = Machine(cache_gib=0.0)
LOOK_S = 5.0
MOST_MIB, MOST_OPEN = 8.0, 2.0
"""What may be more at the end: memory in MiB; descriptors and threads."""


@dataclass(frozen=True)
class Look:
    """A process at one moment."""

    mib: float
    descriptors: int
    threads: int

    @classmethod
    def at(cls, pid: int) -> Look:
        """What Linux says of a process."""
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(int(status["RssAnon"].split()[0]) / 1024, descriptors, int(status["Threads"]))


def rounds_done(file: Path, name: str) -> int:
    """How many rounds a peer of a federation has done."""
    events = load_peer(file, name).out / "events.jsonl"
    return events.read_text().count('{"event": "RoundDone"') if events.exists() else 0


def grown(looks: list[Look], name: str) -> tuple[float, float]:
    """The median in the second tenth, and in the last one."""
    tenth = max(1, len(looks) // 10)
    parts = looks[tenth : 2 * tenth], looks[-tenth:]
    first, last = (statistics.median(getattr(one, name) for one in part) for part in parts)
    return first, last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument(
        "--churn-s", type=float, default=60, help="a quarter of the peers: kill one"
    )
    given = parser.parse_args()
    names = [f"peer-{k}" for k in range(given.peers)]
    killed = names[-(given.peers // 4) :]
    with tempfile.TemporaryDirectory() as folder:
        file = init_federation(Path(folder) / "f", names, CONFIG, limits=LIMITS, machine=MACHINE)
        processes = start(file, names, Path(folder))
        looks: dict[str, list[Look]] = {name: [] for name in names if name not in killed}
        while not all(map(partial(rounds_done, file), names)):
            time.sleep(LOOK_S)
            assert all(process.poll() is None for process in processes.values()), "one ended"
        end, due, rng = time.monotonic() + 60 * given.minutes, given.churn_s, random.Random(0)
        begin = time.monotonic()
        try:
            while time.monotonic() < end:
                time.sleep(LOOK_S)
                for name, seen in looks.items():
                    assert processes[name].poll() is None, f"{name} ended"
                    seen.append(Look.at(processes[name].pid))
                if time.monotonic() - begin > due:
                    due += given.churn_s
                    name = rng.choice(killed)
                    processes[name].send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
                    processes[name].wait(600)
                    processes |= start(file, [name], Path(folder))
        finally:
            stop(processes)
        sizes = {}
        for name in looks:
            out = load_peer(file, name).out
            rounds = rounds_done(file, name)
            written = [(out / kind).stat().st_size for kind in ("events.jsonl", "audit.jsonl")]
            sizes[name] = rounds, *(size / max(1, rounds) / 1024 for size in written)
    bad = False
    print("peer    rounds  KiB/round events, audit   MiB          descriptors  threads")
    for name, seen in looks.items():
        pairs = [grown(seen, kind) for kind in ("mib", "descriptors", "threads")]
        most = (MOST_MIB, MOST_OPEN, MOST_OPEN)
        bad |= any(last - first > limit for (first, last), limit in zip(pairs, most, strict=True))
        rounds, events, audit = sizes[name]
        changes = "   ".join(f"{first:.0f} -> {last:.0f}" for first, last in pairs)
        print(f"{name:8}{rounds:6}  {events:.1f}, {audit:.1f}   {changes}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
