"""The commands for federations: `plait peer`, `relay`, `up`, `status` and `init-federation`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from plait.cli.arguments import (
    Flag,
    Start,
    check_first,
    check_rules,
    default_out,
    defaults,
    parse,
    say_preparing,
    split,
)
from plait.machine.extras import PEER_PACKAGES, need
from plait.peers.federation import Limits

# -- what each command takes


@dataclass(frozen=True, kw_only=True)
class PeerCommand:
    """Take part in a federation as one of its peers, until its last round."""

    config: Path
    """The federation's file, federation.toml; NAME/peer.toml lies beside it."""
    name: str
    """Which peer this is."""
    insecure_loopback: Flag = False
    """No TLS, for trials on one machine: any other address is refused."""
    check: Flag = False
    """Don't start: look at certificate, key, ports, disk and rows, and try each other peer that is
    there: address, TLS, certificate, clock, and whether settings and frozen model are the same."""
    trust: str | None = None
    """Take this peer's word on the round, and its state, where no majority can be had: with two
    peers, or when too few others are there. Only for a peer that lost its folder, joins, or was
    away for long."""


@dataclass(frozen=True, kw_only=True)
class RelayCommand:
    """Let peers meet that accept no connections: pass their bytes on, which it can't read."""

    config: Path
    """The federation's file, federation.toml; relay/peer.toml lies beside it."""


@dataclass(frozen=True, kw_only=True)
class Up(Start):
    """Try a federation out: real peer processes on this machine, with mutual TLS over loopback."""

    peers: int = 3
    """How many peers."""
    out: Path | None = None
    """A new folder; `runs/<task>-<method>-<seed>-peers` if not given, with a number where that is
    taken."""
    round_timeout_s: float = Limits.round_timeout_s
    """A round waits no longer for its neighbours."""
    symmetric_loss: Flag = False
    """Mix over a link on both of its sides or on neither: conserves the mean under loss."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Show who is alive in a federation: round, lag, bytes, certificates, refused messages."""

    config: Path
    """The federation's file, federation.toml."""
    name: str | None = None
    """As which peer to ask; the first whose peer.toml is here if not given."""
    json: Flag = False
    """Print JSON."""
    insecure_loopback: Flag = False
    """No TLS, as the peers were started."""


@dataclass(frozen=True, kw_only=True)
class InitFederation(Start):
    """Write the files of a new federation: settings, a test authority, keys and certificates."""

    directory: tyro.conf.Positional[Path]
    """A new folder."""
    peers: str
    """The peers' names, comma-separated; for machines of their own with addresses,
    `ada=ada.example.org:7600,ben=...`. One without an address accepts no connections."""
    relay: str | None = None
    """Where peers meet that accept no connections, host:port; `plait relay` runs there."""
    labels: str = ""
    """The classes, comma-separated, when peers bring data of their own."""
    id: str = "trial"
    """The federation's name."""
    no_keys: Flag = False
    """Make no peer's key: each makes its own with `plait cert request`."""


# -- the commands


def _need_packages() -> None:
    for package in PEER_PACKAGES:
        need(package, "peer", "A federation")


def peer(args: list[str]) -> int:
    """`plait peer`: 0 when it is done, or was told to leave."""
    given = parse(PeerCommand, "peer", args)
    _need_packages()
    if given.check and given.insecure_loopback:
        raise ValueError("--check looks at certificates; leave it out with --insecure-loopback.")
    if given.check:
        from plait.cli.doctor import say
        from plait.cli.doctor_peer import check_peer

        say(check_peer(given.config.parent / given.name / "peer.toml"))
        return 0
    from plait.peers.process import run_peer

    run_peer(given.config, given.name, given.insecure_loopback, given.trust)
    return 0


def relay(args: list[str]) -> int:
    """`plait relay`: 0 when it was told to leave."""
    given = parse(RelayCommand, "relay", args)
    _need_packages()
    from plait.peers.relay import run_relay

    run_relay(given.config)
    return 0


def up(args: list[str]) -> int:
    """`plait up`."""
    given = parse(Up, "up", args, Up(**defaults(args)))
    config = replace(given.settings, clients=given.peers)
    out = given.out or default_out(f"{config.task}-{config.method}-{config.seed}-peers")
    check_rules(config)
    say_preparing(out, config)
    check_first(config, given.machine)
    _need_packages()
    from plait.peers import local_federation as trial

    limits = Limits(round_timeout_s=given.round_timeout_s, symmetric_loss=given.symmetric_loss)
    console = Console()
    for line in trial.up(config, given.peers, out, limits, given.machine):
        console.print(line, highlight=False)
    summary = json.loads((out / "summary.json").read_text())
    kinds = sum(map(Counter, summary["incidents"].values()), Counter[str]())
    incidents = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    console.print(
        f"\n{summary['metric']} {summary['accuracy_client_mean']:.3f}"
        f" (worst client {summary['accuracy_client_min']:.3f}),"
        f" majority class {summary['majority']:.3f};"
        f" {summary['sent_bytes'] / 1e6:.1f} MB sent, incidents: {incidents}\n"
        f"{out}: summary.json, adapters/, <name>.log",
        highlight=False,
        soft_wrap=True,
    )
    if "dp_epsilon" in summary:
        bound = f"epsilon {summary['dp_epsilon']:.3g} at delta {summary['dp_delta']:g}"
        console.print(f"{bound} for each client", highlight=False)
    return 0


def status(args: list[str]) -> int:
    """`plait status`: 0 when all peers answer or are done, 1 when one does not."""
    given = parse(Status, "status", args)
    _need_packages()
    from plait.peers.status import first_end, lag
    from plait.peers.status import status as ask

    peers = ask(given.config, given.name, given.insecure_loopback)
    code = int(any(one.why and not one.done for one in peers))
    if given.json:
        print(json.dumps([vars(one) for one in peers], indent=2))
        return code
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("peer", "round", "lag", "missed", "MB sent", "MB got", "expires", "refused here"):
        table.add_column(head, justify="left" if head in ("peer", "refused here") else "right")
    for one in peers:
        if one.why:
            table.add_row(one.name, *"------", one.why)
            continue
        facts = one.facts
        table.add_row(
            one.name,
            f"{facts['round']}/{facts['rounds']}",
            str(lag(peers, one)),
            str(facts["missing"]),
            *(f"{facts.get(key, 0) / 1e6:.1f}" for key in ("sent_bytes", "received_bytes")),
            first_end(facts.get("expires")),
            ", ".join(f"{reason} {n}" for reason, n in facts["refused"].items()) or "-",
        )
    Console(markup=False).print(table, highlight=False)
    return code


def init_federation(args: list[str]) -> int:
    """`plait init-federation`."""
    given = parse(
        InitFederation, "init-federation", args,
        InitFederation(directory=tyro.MISSING, peers=tyro.MISSING, **defaults(args)),
    )  # fmt: skip
    _need_packages()
    from plait.peers.certificates import init_federation as write

    pairs = [one.partition("=") for one in split(given.peers)]
    names, addresses = [name for name, _, _ in pairs], [address for _, _, address in pairs]
    path = write(
        given.directory, names, given.settings, federation_id=given.id,
        addresses=addresses if any(addresses) else None, relay=given.relay,
        labels=split(given.labels), machine=given.machine, keys=not given.no_keys,
    )  # fmt: skip
    print(
        f"{path}: addresses and settings, the same at every peer\n"
        f"{given.directory}/NAME: what each peer has of its own; its key stays with it"
    )
    if given.no_keys:
        print(f"Each makes its key: plait cert request --name NAME --out {given.directory}/NAME")
    print(f"Start each with: plait peer --config {path} --name NAME")
    if given.settings.task in ("file", "chat"):
        print(
            f"Before that, name each peer's rows in {given.directory}/NAME/peer.toml, under "
            '[local]: train_file = "...", dev_file = "..."'
        )
    return 0
