"""`plait doctor`: what doctor_checks.py finds, a line for each check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import tyro
from rich.console import Console

from plait.cli.doctor_checks import Finding

STYLES = {"ok": "green", "note": "yellow", "bad": "red"}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check what this machine has for plait, and say what to do about what it has not."""

    federation: Path | None = None
    """A peer's folder, or one with several: do for each what `plait peer --check` does, too."""


def doctor(args: list[str]) -> None:
    """Print what was found.

    Raises:
        ValueError: Something that plait can't do without is missing.
    """
    given = tyro.cli(Doctor, prog="plait doctor", args=args)
    from plait.cli.doctor_checks import examine
    from plait.cli.doctor_peer import examine_peers

    peers = [] if given.federation is None else examine_peers(given.federation)
    say(chain(examine(), peers))


def say(findings: Iterable[Finding]) -> None:
    """Print what was found as it is found.

    Raises:
        ValueError: Something of it is bad.
    """
    console = Console()
    bad = 0
    for found in findings:
        console.print(
            f"[{STYLES[found.mark]}]{found.mark:4}[/]  {found.about:8}", end="", highlight=False
        )
        console.print(found.text, markup=False, highlight=False, soft_wrap=True)
        if found.fix:
            console.print(f"{'':16}{found.fix}", markup=False, highlight=False, soft_wrap=True)
        bad += found.mark == "bad"
    if bad:
        raise ValueError(f"{bad} of these {'keeps' if bad == 1 else 'keep'} plait from working.")
