"""Figures with several families on one axis: a colour and a marker per family, each with its own law.

Losses of families whose tokens are the same alone (``analysis.families``), FID of all. Colours are of Okabe
and Ito's set, told apart without colour vision and, by the markers, in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis import plots
from analysis.families import Group
from analysis.family_pairs import QUANTITY
from analysis.fidelity import SAMPLING, Protocol, drawing, drawn
from analysis.study import Law, usable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = (
    ("#0a5c9e", "#6ab8f5", "o"), ("#b8430c", "#f49c66", "s"), ("#00775c", "#4fcba4", "^"),
    ("#96407f", "#e592cf", "D"), ("#8a6d00", "#dcc04a", "v"), ("#4b5560", "#aab4bf", "P"),
)  # fmt: skip
"""Light and dark colour, marker; by a family's place in its sweep, over again when there are more."""

LINES = ("-", "--", ":", "-.")
"""By the way in which pictures were drawn."""


def look(families: Sequence[str], family: str) -> tuple[str, str]:
    """Colour (light) and marker of a family among all of its sweep."""
    colour, _, marker = LOOKS[list(families).index(family) % len(LOOKS)]
    return colour, marker


def params_figure(group: Group, families: Sequence[str]) -> Figure:
    """Final last-map loss of a group's families against N, with each one's law. Some run has finished."""
    title, y_label = plots.QUANTITIES[QUANTITY]
    fig, ax = plots.figure(f"{title}, by family and size", plots.X_LABELS["params"], y_label)
    studies = [study for study in group.studies if len(study.final(QUANTITY))]
    finals = [study.final(QUANTITY) for study in studies]
    x = plots.limits([v for final in finals for v in final["params"]], 0.06, 0.1)
    plots.log_axes(ax, x, plots.limits([v for final in finals for v in final[QUANTITY]], 0.5, 0.1))
    for study, final in zip(studies, finals, strict=True):
        colour, marker = look(families, study.family)
        own = final[~final["imported"]]
        ax.errorbar(
            own["params"], own[QUANTITY], own[f"{QUANTITY}_se"], fmt=marker, ms=5, color=colour,
            ecolor=plots.MUTED, elinewidth=0.9, capsize=2, mec=plots.PAPER, mew=0.5, zorder=3,
            label=_draw_law(ax, study.law(QUANTITY), study.family, colour, x),
        )  # fmt: skip
        _mark_published(ax, final, "params", colour)
    ax.legend(loc="lower left", title="law, 95 % band; bars: ±1 s.e. over images", title_fontsize=7)
    return fig


def compute_figure(group: Group, families: Sequence[str]) -> Figure:
    """Every run's last-map loss against C, each family's Pareto frontier and its law. Some frontier has
    points."""
    title, y_label = plots.QUANTITIES[QUANTITY]
    flops = group.studies[0].flops
    fig, ax = plots.figure(f"{title}, by family and compute", plots.X_LABELS[flops], y_label)
    studies = [study for study in group.studies if len(study.frontiers[QUANTITY, "pareto"].x)]
    frames = [study.frame[usable(study.frame, QUANTITY)] for study in studies]
    x = plots.limits([v for frame in frames for v in frame[flops]], 0.03, 0.06)
    plots.log_axes(ax, x, plots.limits([v for frame in frames for v in frame[QUANTITY]], 0.4, 0.06))
    for study, frame in zip(studies, frames, strict=True):
        colour, marker = look(families, study.family)
        for _, part in frame.groupby("run", sort=False):
            ax.plot(part[flops], part[QUANTITY], color=colour, lw=0.8, alpha=0.35)
        _mark_published(ax, frame, flops, colour)
        frontier, law = study.frontiers[QUANTITY, "pareto"], study.law(QUANTITY, flops, "pareto")
        said = _draw_law(ax, law, study.family, colour, (float(frontier.x.min()), x[1]))
        ax.plot(
            frontier.x, frontier.y, marker, ms=3.6, mfc=plots.PAPER, mec=colour, mew=0.9, zorder=4, label=said
        )
    ax.legend(loc="lower left", title="law of the Pareto frontier, 95 % band", title_fontsize=7)
    return fig


def _mark_published(ax: Axes, frame: pd.DataFrame, x: str, colour: str) -> None:
    """Imported points, in their family's colour but with a marker that is no family's."""
    part = frame[frame["imported"]]
    if len(part):
        label = f"{part['family'].iloc[0]}: published checkpoint, evaluated here"
        ax.plot(part[x], part[QUANTITY], plots.PUBLISHED, ms=6, color=colour, zorder=4, label=label)


def _draw_law(ax: Axes, row: Law, family: str, colour: str, reach: tuple[float, float]) -> str:
    """Draw a law, if there is one; its line of the legend, which goes with the family's marker."""
    if row.law is None:
        return f"{family}: {row.problem}"
    before = len(ax.get_lines())
    plots.draw_law(ax, row.law, colour, f"{family}: ", reach=reach, points=False)
    named = next(line for line in ax.get_lines()[before:] if str(line.get_label()).startswith(family))
    text = str(named.get_label())
    named.set_label("")
    return text


def fid_figure(protocol: Protocol, x: str, families: Sequence[str]) -> Figure:
    """FID against N (each run's latest measurements) or C (all), a line per family and way of drawing; some
    of them can be drawn.

    Args:
        x: params, flops or flops_6nd.
        families: all of the sweep's, which fix the colours.
    """
    word = "model size" if x == "params" else "compute"
    fig, ax = plots.figure(f"FID, against {word}", plots.X_LABELS[x], "FID (lower is better)")
    frame = drawn(protocol.last if x == "params" else protocol.frame)
    plots.log_axes(ax, plots.limits(frame[x], 0.06, 0.12), plots.limits(frame["fid"], 0.3, 0.1))
    ways = protocol.settings
    for (family, *way), part in frame.groupby(["family", *SAMPLING], sort=False):
        colour, marker = look(families, str(family))
        name = str(family) if len(ways) == 1 else f"{family}, {drawing(way)}"
        style = LINES[ways.index(tuple(way)) % len(LINES)]
        lines = [part.sort_values("params")] if x == "params" else [p for _, p in part.groupby("run")]
        for line in lines:
            ax.plot(line[x], line["fid"], style, color=colour, lw=1.0, zorder=2)
        ax.plot(
            part[x], part["fid"], marker, ms=5, color=colour, mec=plots.PAPER, mew=0.5, zorder=3, label=name
        )
    ax.legend(loc="lower left", title="" if len(ways) > 1 else drawing(ways[0]), title_fontsize=7)
    return fig
