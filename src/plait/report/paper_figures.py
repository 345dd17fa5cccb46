"""Figures for paper: matplotlib, in Okabe and Ito's colours, drawn from recorded events alone.

`curves` is the one picture of a comparison; `paper_figures` writes a file for each figure at the
width of a column, in a size of type that is legible in print, with fonts that stay text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from plait.figures import FIGURES
from plait.report.series import (
    LINE_STYLES,
    MAJORITY,
    Said,
    Series,
    band,
    last_scores,
    over_rounds,
    phases,
    remark,
    sent_megabytes,
    started,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Groups = Mapping[str, Said]
"""Label -> the events of each of its runs."""
Format = Literal["pdf", "png", "svg"]

COLUMN_INCHES = (3.5, 2.7)
PRINT: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "legend.fontsize": 7,
    "savefig.dpi": 300,
    # Text stays text: it can be searched, and journals ask for TrueType.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


def curves(runs: Groups, path: Path) -> None:
    """Draw accuracy, disagreement and cross term over the rounds.

    Args:
        runs: Label -> the events of each of its runs.
        path: The PNG to write.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = _figure((11, 5.5), dpi=150)
    panels = figure.subplot_mosaic([["scores", "apart"], ["scores", "cross"]], width_ratios=[3, 2])
    _draw_scores(panels["scores"], runs)
    panels["scores"].set_title(f"Clients' own models{_band_words(runs)}", loc="left")
    for panel, name in (("apart", "apart"), ("cross", "cross_term")):
        _draw(panels[panel], runs, name)
        panels[panel].set_title(FIGURES[name].title, loc="left")
    for one in panels.values():
        _dress(one)
    _legend(figure, panels["scores"])
    _save(figure, path, "png")


def paper_figures(runs: Groups, folder: Path, form: Format) -> list[Path]:
    """Write every figure of a study as a file of its own.

    Args:
        runs: Label -> the events of each of its runs.
        folder: Where to write; made if it isn't there.
        form: The file format.

    Returns:
        The files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    _figure((1, 1))  # complains before the folder is made
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(PRINT):
        for name, draw in PICTURES.items():
            figure = _figure(COLUMN_INCHES)
            axes = figure.subplots()
            draw(axes, runs)
            _dress(axes)
            _legend(figure, axes, columns=2)
            _save(figure, folder / f"{name}.{form}", form)
            written.append(folder / f"{name}.{form}")
    return written


# -- the figures


def _draw_scores(axes: Axes, runs: Groups) -> None:
    begun = started(runs)
    assert begun is not None
    _draw(axes, runs, "accuracy_client_mean")
    if begun.majority:
        axes.axhline(
            begun.majority, color=MAJORITY, linewidth=1.2, linestyle=(0, (1, 2)),
            label="majority class",
        )  # fmt: skip


def _draw(axes: Axes, runs: Groups, name: str) -> None:
    figure = FIGURES[name]
    for label, (color, dash) in styles(runs).items():
        _draw_band(axes, label, *over_rounds(runs[label], figure), color, dash)
    if figure.log and axes.dataLim.y1 > 0:
        axes.set_yscale("log")
    axes.set_ylabel(_plain(figure.unit.format(metric=_metric(runs))))
    axes.annotate(remark(runs, figure), (0.99, 0.03), xycoords="axes fraction", ha="right")


def _draw_bytes(axes: Axes, runs: Groups) -> None:
    for label, (color, dash) in styles(runs).items():
        said = runs[label]
        _, values = over_rounds(said, FIGURES["accuracy_client_mean"])
        _draw_band(axes, label, sent_megabytes(said)[: values.shape[1]], values, color, dash)
    axes.set_xlabel("sent by all clients, MB")
    axes.set_ylabel(f"{_metric(runs)}, client mean")


def _draw_clients(axes: Axes, runs: Groups) -> None:
    for label, (color, dash) in styles(runs).items():
        shares, values = last_scores(runs[label])
        _draw_band(axes, label, shares, values, color, dash)
    axes.set_xlabel("clients from the worst to the best, %")
    axes.set_ylabel(f"{_metric(runs)} of a client")


def _draw_consensus(axes: Axes, runs: Groups) -> None:
    """A and B of the first label, the phases of its first run shaded."""
    label, said = next(iter(runs.items()))
    for name, (color, _), dash in zip(
        ("consensus_A", "consensus_B"), LINE_STYLES, ("solid", "dash"), strict=False
    ):
        rounds, values = over_rounds(said, FIGURES[name])
        _draw_band(axes, f"{FIGURES[name].title}, {label}", rounds, values, color, dash)
    stretches = phases(said[0])
    for first, end, factors in stretches:
        if len(stretches) > 1 and factors.startswith("A"):
            axes.axvspan(first, end, color="#888888", alpha=0.2, linewidth=0)
    if axes.dataLim.y1 > 0:
        axes.set_yscale("log")
    axes.set_ylabel("Ξ, all layers; shaded: A trains" if len(stretches) > 1 else "Ξ, all layers")


PICTURES: dict[str, Callable[[Axes, Groups], None]] = {
    "accuracy": _draw_scores,
    "worst-client": partial(_draw, name="accuracy_client_min"),
    "loss": partial(_draw, name="loss_client_mean"),
    "bytes": _draw_bytes,
    "clients": _draw_clients,
    "consensus": _draw_consensus,
    "disagreement": partial(_draw, name="apart"),
    "cross-term": partial(_draw, name="cross_term"),
}
"""File name -> what draws it."""


# -- parts


def _draw_band(axes: Axes, label: str, x: Series, values: Series, color: str, dash: str) -> None:
    mean, low, high = band(values)
    if len(values) > 1:
        axes.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)
    marker = "." if len(x) <= 40 else ""
    axes.plot(x, mean, DASHES[dash], color=color, label=label, marker=marker, markersize=4)


def _dress(axes: Axes) -> None:
    axes.set_xlabel(axes.get_xlabel() or "rounds done")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def _legend(figure: Figure, axes: Axes, columns: int = 8) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _figure(inches: tuple[float, float], dpi: int = 300) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("The picture needs matplotlib: pip install 'plait[report]'.") from error
    return Figure(figsize=inches, layout="constrained", dpi=dpi)


def _save(figure: Figure, path: Path, form: Format) -> None:
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format=form)
    partial.replace(path)


def _band_words(runs: Groups) -> str:
    seeds = max(len(said) for said in runs.values())
    return f"  (mean of {seeds} seeds, band: their range)" if seeds > 1 else ""


def _metric(runs: Groups) -> str:
    begun = started(runs)
    return begun.metric if begun else "score"


def _plain(unit: str) -> str:
    """The unit in matplotlib's mathtext instead of the web's tags."""
    for web, text in (("Ξ<sub>A</sub>", r"$\Xi_A$"), ("Ξ<sub>B</sub>", r"$\Xi_B$"),
                      ("‖C‖<sub>F</sub>", r"$\|C\|_F$")):  # fmt: skip
        unit = unit.replace(web, text)
    return unit
