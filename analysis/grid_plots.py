"""The figure of a grid over N and D: final losses against tokens, a line per size, and the fitted surface."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis import plots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from analysis.grids import Grid


def surface_figure(final: pd.DataFrame, grid: Grid) -> Figure:
    """Final values of every run against D, coloured by depth, with the surface at each size.

    Args:
        final: the rows that ``grid`` was fitted to.
    """
    quantity = grid.quantity
    title, y_label = plots.QUANTITIES[quantity]
    fig, ax = plots.figure(f"{title}, against training tokens", plots.X_LABELS["tokens"], y_label)
    depths = sorted(final["depth"].unique())
    colours = dict(zip(depths, plots.depth_colours(len(depths)), strict=True))
    reach = plots.limits(final["tokens"], 0.06, 0.12)
    plots.log_axes(ax, reach, plots.limits(final[quantity], 0.25, 0.1))
    law = grid.surface
    tokens = np.geomspace(*reach, 120)
    ends = []
    for (depth, imported), part in final.groupby(["depth", "imported"]):
        colour = colours[depth]
        ax.errorbar(
            part["tokens"], part[quantity], part[f"{quantity}_se"], fmt=plots.PUBLISHED if imported else "o",
            ms=5, color=colour, ecolor=plots.MUTED, elinewidth=0.9, capsize=2, zorder=3,
        )  # fmt: skip
        place = int(part["tokens"].to_numpy().argmax())
        at, top = float(part["tokens"].iloc[place]), float(part[quantity].iloc[place])
        ends.append((at, top, f"d{depth}", colour))
        if law is not None and law.converged:
            found = law.predict(part["params"].iloc[0], tokens)
            ax.plot(tokens, found.value, color=colour, lw=1.1, zorder=2)
            shown = np.isfinite(found.low) & np.isfinite(found.high)
            ax.fill_between(
                tokens[shown], found.low[shown], found.high[shown], color=colour, alpha=0.12, lw=0
            )
    plots.label(ax, ends)
    plots.explain_published(ax, final)
    text = grid.problem or (law.status if law is not None and not law.converged else "")
    if law is not None and law.converged:
        text = f"{law.equation}, 95 % bands"
    ax.plot([], [], "-", color=plots.MUTED, label=text)
    ax.legend(loc="lower left", title="bars: ±1 s.e. over images", title_fontsize=7)
    return fig
