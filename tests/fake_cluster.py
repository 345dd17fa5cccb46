"""A cluster in one process: what its blocks hand over is handed over here. Needs Ray's package."""

from __future__ import annotations

from collections.abc import Iterator

from conftest import tiny_job
from plait.config import Config
from plait.engines.block import Block
from plait.engines.cluster import bounds, merged
from plait.events import RoundDone


def blocks_of(config: Config, workers: int) -> list[Block]:
    """The workers of a tiny run, before they begin."""
    shares = bounds(config.clients, workers)
    return [Block(tiny_job, config, shares, k, threads=1) for k in range(workers)]


def rounds_of_blocks(blocks: list[Block]) -> Iterator[RoundDone]:
    """All rounds, from the common start on."""
    *_, sites = [block.begin(None) for block in blocks][-1]
    for round_ in range(blocks[0].config.rounds):
        trained = [block.train(round_) for block in blocks]
        mixed = [b.mix(round_, *(t[1 + k] for t in trained)) for k, b in enumerate(blocks)]
        sums = [*(before for before, *_ in trained), *mixed]
        measured = [block.measure(round_, *sums) for block in blocks]
        added = [b.add_up(*(m[1 + k] for m in measured)) for k, b in enumerate(blocks)]
        yield merged([part for part, *_ in measured], added, sites)


def handed_bytes(config: Config, workers: int, event: RoundDone) -> int:
    """By the formulas of docs/scaling.md, for the small rank of these tests."""
    layout = tiny_job(config).backbone.layout
    blocks = {
        client: k for k, block in enumerate(bounds(config.clients, workers)) for client in block
    }
    travels = {"A", "B", *event.shared.replace("AB", "A|B").split("|")} - {"-"}
    sizes = {str(factor.name): layout.size(factor) for factor in layout.factors}
    heard = {(blocks[i], j) for i, j, _ in event.edges if blocks[i] != blocks[j]}
    rows = len(heard) * 4 * sum(sizes[name.rpartition(".")[2]] for name in travels)
    sums = 2 * workers * (workers - 1) * 8 * sum(sizes.values())
    crosses = 0
    for place, site in enumerate(layout.sites):
        others = [client for client in blocks if blocks[client] != place % workers]
        crosses += 2 * 8 * len(others) * layout.rank * (site.d_in + site.d_out)
    return rows + sums + crosses
