"""The command `plait benchmark`: fixed sweeps, and what they say of the papers' claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from plait.cli.arguments import Names, parse, parts
from plait.machine.extras import installed, need

if TYPE_CHECKING:
    from plait.experiments.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Run the benchmark of decentralized LoRA, or go on with it; it ends with a page.

    `plait benchmark --size S` runs what this machine has installed, in minutes.
    `plait benchmark page --size S` writes the table and the page anew, from recorded runs alone.
    `plait benchmark verify --size S --out DIR` checks a folder that somebody hands in.
    """

    action: tyro.conf.Positional[Literal["run", "page", "verify"]] = "run"
    """What to do."""
    size: Literal["S", "M", "L"] = "S"
    """S: minutes, with what is installed. M: hours of two cores, and the GLUE archive. L: the
    published protocol, with a card and the hub."""
    out: Path | None = None
    """The folder of the benchmark; `runs/benchmark-SIZE` if not given."""
    only: Names = ()
    """Some of its parts alone, such as `main`; several with commas."""
    until: float | None = None
    """Add seeds until the intervals of differences reach no further than this to either side, in
    the place of what the parts say."""
    at_most: int | None = None
    """But no more seeds than these."""
    glue_dir: str | None = None
    """The unpacked GLUE archive; the Hugging Face hub if not given. For sizes M and L."""
    jobs: int = 0
    """Runs at a time, each in a process of its own, on a graphics card all in one stack; 1 for one
    by one in this process, 0 for as many as there are cores, or sixteen on a card."""


def benchmark(args: list[str]) -> int:
    """`plait benchmark`: 1 if runs failed, or a folder that is verified isn't as it should be."""
    given = parse(Benchmark, "benchmark", args)
    need("pyarrow", "sweep", "A benchmark's table of results")
    from plait.experiments.benchmark import parts_of

    out = given.out or Path("runs") / f"benchmark-{given.size}"
    found = parts_of(given.size, out, parts(given.only), given.until, given.at_most, given.glue_dir)
    return ACTIONS[given.action](given, out, found)


def _run(given: Benchmark, out: Path, found: dict[str, Sweep]) -> int:
    from plait.cli.sweep import carry_out
    from plait.experiments.claims import SUITES

    print(f"preparing {out}: size {given.size}, parts {', '.join(found)} ...", flush=True)
    failed = False
    for name, sweep in found.items():
        print(f"\n{name}", flush=True)
        failed |= carry_out(sweep, SUITES / given.size / f"{name}.toml", given.jobs)
    _page(given, out, found)
    return int(failed)


def _page(given: Benchmark, out: Path, found: dict[str, Sweep]) -> int:
    from plait.experiments import benchmark as suite
    from plait.experiments import claims, results
    from plait.machine.files import write_atomically
    from plait.report import benchmark_page as page

    frame = suite.collect(found, given.size, out)
    judged = claims.judged(frame)
    draws = installed("matplotlib")
    if draws:
        page.draw(judged, out / page.PICTURE)
    results.save(frame, out)
    write_atomically(out / page.PAGE, page.benchmark_page(given.size, frame, judged, draws))
    print()
    for one in judged:
        print(f"{one.name} {one.verdict}: {one.apart.shown('+')}, {len(one.values)} seeds")
    print(f"{out}: {page.PAGE}, {results.RESULTS}{f', {page.PICTURE}' if draws else ''}")
    return 0


def _verify(given: Benchmark, out: Path, found: dict[str, Sweep]) -> int:
    from plait.experiments.benchmark import faults

    wrong = faults(found, given.size, out)
    for line in wrong:
        print(line)
    print(f"{out}: {len(wrong)} faults" if wrong else f"{out}: all runs are as they should be")
    return int(bool(wrong))


ACTIONS: dict[str, Callable[[Benchmark, Path, dict[str, Sweep]], int]] = {
    "run": _run,
    "page": _page,
    "verify": _verify,
}
