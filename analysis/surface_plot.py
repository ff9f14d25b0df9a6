"""A loss surface in one panel: loss against compute, curves of constant N, and the optimal frontier.

- Points are coloured by N on a log scale (viridis, larger is darker, as elsewhere); at most nine
  curves of constant N are drawn, over the data's own tokens, so that none stands where nothing was trained.
- The frontier is the lowest loss that the fitted surface allows at each C: solid over the data, dashed
  beyond, with the interval of the law. It is not a fit to the lowest points.
- C is 6·N·D unless ``flops_per_token`` says otherwise; the axis names the convention either way.
- With repeated data the curves are drawn for U where all points share it, else for fresh data.
- Of a fit that did not converge only the points and its status are drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from analysis.errors import DataError, Floats
from analysis.plots import INK, MUTED, OFFSET, limits, log_axes, number
from analysis.surface_optimum import FlopsPerToken

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.parametric import ParametricLaw

CURVES = 9
"""Values of N that get a curve."""
BAND = 25
"""Budgets inside and beyond the data at which the frontier is worked out."""


def draw_surface(
    ax: Axes,
    law: ParametricLaw,
    flops_label: str = "6·N·D",
    flops_per_token: FlopsPerToken | None = None,
    loss_label: str = "loss (nats per token)",
    reach: float = 10.0,
    level: float = 0.95,
) -> None:
    """Draw ``law`` into ``ax`` and a colour bar for N beside it.

    Args:
        flops_label: the FLOPs convention, for the axis.
        flops_per_token: training FLOPs per token for N, elementwise; 6·N for None.
        loss_label: what the loss is, with its unit.
        reach: the frontier goes on to so many times the largest C.
        level: of the frontier's band.

    Raises:
        DataError: ``reach`` below 1; as ``ParametricLaw.optimal``.
    """
    if reach < 1:
        raise DataError(f"reach must be at least 1, got {reach}")
    C = law.tokens * _cost(law.sizes, flops_per_token)
    colour = _colours(law.sizes)
    unique = _one_unique(law)
    x_limits = limits([C.min(), C.max() * (reach if law.converged else 1)], 0.03, 0.02)
    values = [*law.loss]
    if law.converged:
        grid = np.union1d(np.geomspace(C.min(), C.max(), BAND), np.geomspace(C.max(), C.max() * reach, BAND))
        best = law.optimal(grid, flops_per_token, unique)
        values += [*best.loss]
    # Room above for the legend: the points crowd both the frontier and its left end.
    log_axes(ax, x_limits, limits(values, 0.05, 0.22))
    ax.set_xlabel(f"training compute C (FLOP, {flops_label})")
    ax.set_ylabel(loss_label)
    ax.scatter(C, law.loss, s=11, c=colour.to_rgba(law.sizes), linewidths=0, zorder=3)
    bar = ax.figure.colorbar(colour, ax=ax, pad=0.015, aspect=30)
    _colour_ticks(bar.ax, law.sizes)
    bar.set_label("parameters N", fontsize=8)
    bar.outline.set_linewidth(0.5)
    if not law.converged:
        ax.plot([], [], " ", label=law.status)
        ax.legend(loc="upper right")
        return
    _curves(ax, law, colour, flops_per_token, unique)
    a = law.compute_exponents.a
    text = f"optimal frontier of the surface, N ∝ C^{a:.3g}"
    if not law.no_interval(level):
        low, high = law.compute_exponent_interval(level)["a"]
        text += f" [{low:.3g}, {high:.3g}]"
        # Of the surface at these N and D: the loss is flat in N there, so the optimum's own is the same.
        band = law.predict(best.params, best.tokens, unique, level)
        ax.fill_between(grid, band.low, band.high, color=OFFSET, alpha=0.16, lw=0, zorder=4)
    seen = grid <= C.max()
    ax.plot(grid, best.loss, "--", color=OFFSET, lw=1.2, zorder=5)
    ax.plot(grid[seen], best.loss[seen], color=OFFSET, lw=1.8, zorder=5, label=text)
    E = law.params["E"]
    if ax.get_ylim()[0] < E:
        ax.axhline(E, color=MUTED, lw=0.8, ls=":")
    ax.plot([], [], " ", label=f"α = {law.alpha:.3g}, β = {law.beta:.3g}, E = {E:.4g}; {law.loss_fn} loss")
    ax.legend(loc="upper right", labelcolor=INK)


def _cost(N: Floats, flops_per_token: FlopsPerToken | None) -> Floats:
    return 6 * N if flops_per_token is None else np.asarray(flops_per_token(N), dtype=np.float64)


def _one_unique(law: ParametricLaw) -> float | None:
    if law.unique_tokens is None or np.ptp(law.unique_tokens) > 0:
        return None
    return float(law.unique_tokens[0])


def _colours(N: Floats) -> mpl.cm.ScalarMappable:
    shades = mpl.colormaps["viridis"](np.linspace(0.92, 0.05, 256))
    norm = mpl.colors.LogNorm(float(N.min()), float(N.max()))
    return mpl.cm.ScalarMappable(norm, mpl.colors.ListedColormap(shades))


def _colour_ticks(ax: Axes, N: Floats) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from analysis.plots import log_ticks

    major, _ = log_ticks(float(N.min()), float(N.max()), most=5)
    ax.yaxis.set_major_locator(FixedLocator(list(major)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def _curves(
    ax: Axes,
    law: ParametricLaw,
    colour: mpl.cm.ScalarMappable,
    flops_per_token: FlopsPerToken | None,
    unique: float | None,
) -> None:
    """Loss along the tokens that models of about this N were trained on."""
    sizes = np.unique(law.sizes)
    if len(sizes) > CURVES:
        # The data's own sizes, as even in log N as they come.
        goal = np.linspace(np.log(sizes[0]), np.log(sizes[-1]), CURVES)
        sizes = np.unique([sizes[np.argmin(np.abs(np.log(sizes) - g))] for g in goal])
    edges = np.sqrt(sizes[1:] * sizes[:-1])
    home = np.searchsorted(edges, law.sizes)
    for k, N in enumerate(sizes):
        own = law.tokens[home == k]
        D = np.geomspace(own.min(), own.max(), 60)
        L = law.value(N, D, unique)
        ax.plot(D * _cost(np.array([N]), flops_per_token), L, color=colour.to_rgba(N), lw=0.9, zorder=2)
