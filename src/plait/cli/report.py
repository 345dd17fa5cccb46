"""The commands that show runs: `plait report`, `plait figures` and `plait dashboard`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from plait.cli.arguments import check_file

if TYPE_CHECKING:
    from plait.report.study import Study


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML file about runs; it opens offline."""

    dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, comparisons' folders, or folders of such."""
    out: Path = Path("report.html")
    """The file to write."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Write figures for paper, a file each."""

    dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, comparisons' folders, or folders of such."""
    out: Path = Path("figures")
    """The folder to write."""
    format: Literal["pdf", "png", "svg"] = "pdf"
    """The file format."""


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """Follow runs in the browser while they go."""

    dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, comparisons' folders, or folders of such; they may still be empty."""
    host: str = "127.0.0.1"
    """The address to listen at; any other than this machine's own asks for a token."""
    port: int = 8765
    """The port to listen at."""


def report(args: list[str]) -> None:
    """`plait report`."""
    given = tyro.cli(Report, prog="plait report", args=args)
    check_file(given.out)
    from plait.machine.files import write_atomically
    from plait.report.page import html_report
    from plait.report.study import read_studies

    studies = read_studies(given.dirs)
    _say_remarks(studies)
    html = html_report(studies)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(given.out, html)
    print(f"{given.out}: {len(html) / 1e6:.1f} MB, opens in any browser, offline too")


def figures(args: list[str]) -> None:
    """`plait figures`."""
    given = tyro.cli(Figures, prog="plait figures", args=args)
    from plait.experiments.plan import slug
    from plait.report.paper_figures import paper_figures
    from plait.report.study import read_studies

    studies = read_studies(given.dirs)
    _say_remarks(studies)
    for study in studies:
        folder = given.out / slug(study.title) if len(studies) > 1 else given.out
        written = paper_figures(study.said, folder, given.format)
        print(f"{folder}: {', '.join(path.name for path in written)}")


def _say_remarks(studies: Iterable[Study]) -> None:
    for study in studies:
        for remark in study.remarks:
            print(f"plait: {remark}", file=sys.stderr)


def dashboard(args: list[str]) -> None:
    """`plait dashboard`."""
    given = tyro.cli(Dashboard, prog="plait dashboard", args=args)
    from plait.report.dashboard import serve

    serve(given.dirs, given.host, given.port)
