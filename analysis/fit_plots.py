"""Panels of the fits that hold more than one curve: IsoFLOP valleys, two laws, a broken law.

Colours, ticks and limits are those of ``analysis.plots``; what was rejected or undecided is drawn
as such, never left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots import INK, MUTED, OFFSET, PAPER, PLAIN, depth_colours, limits, log_axes, number

if TYPE_CHECKING:
    from analysis.broken import BrokenLaw
    from analysis.comparison import Comparison
    from analysis.isoflop import IsoFlop


def draw_isoflop(
    ax: Axes, iso: IsoFlop, x_label: str = "parameters N", y_label: str = "loss", level: float = 0.95
) -> None:
    """Loss over N, a valley per budget (more compute is darker), its minimum, and the path of optima.

    Rejected budgets are drawn dashed, with a cross at the end of the sampled N nearest their minimum.
    """
    N, L = iso.points["params"], iso.points["loss"]
    shown = np.concatenate([L, [b.loss for b in iso.accepted]])
    log_axes(ax, limits(N, 0.05, 0.2), limits(shown, 0.06, 0.08))
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    for b, colour in zip(iso.budgets, depth_colours(len(iso.budgets)), strict=True):
        n, loss = N[b.index], L[b.index]
        ax.plot(n, loss, "o", ms=3.4, color=colour, zorder=3)
        if b.curve is not None:
            x = np.geomspace(n.min(), n.max(), 120)
            ax.plot(x, b.curve.value(np.log(x)), "-" if b.accepted else ":", color=colour, lw=1.2, zorder=2)
        if b.accepted:
            ax.plot(b.params, b.loss, "D", ms=5.5, mfc=PAPER, mec=colour, mew=1.4, zorder=5)
        else:
            at = n.argmin() if np.isnan(b.params) else np.abs(np.log(n / b.params)).argmin()
            ax.plot(n[at], loss[at], "x", ms=8, color=OFFSET, mew=1.8, zorder=5)
        last = int(n.argmax())
        ax.annotate(
            number(float(f"{b.flops:.2e}")), (n[last], loss[last]), (5, 0), textcoords="offset points",
            fontsize=7, color=colour, va="center", annotation_clip=False,
        )  # fmt: skip
    rejected = len(iso.budgets) - len(iso.accepted)
    keys = [Line2D([], [], ls="", marker="D", ms=5, mfc=PAPER, mec=INK, label="minimum")]
    if rejected:
        keys.append(Line2D([], [], ls="", marker="x", ms=6, color=OFFSET, label=f"rejected ({rejected})"))
    if iso.laws:
        flops = np.geomspace(iso.accepted[0].flops, iso.accepted[-1].flops, 80)
        path, floor = (iso.laws[key].value(flops) for key in ("params", "loss"))
        ax.plot(path, floor, "--", color=INK, lw=1.0, zorder=4)
        name, a, low, high = iso.rows(level)[0]
        text = f"N_opt ∝ Cᵃ, {name} = {a:.3f}"
        if np.isfinite(low):
            text += f" [{low:.3f}, {high:.3f}]"
        keys.append(Line2D([], [], ls="--", lw=1.0, color=INK, label=text.replace("-", "−")))
    else:
        keys.append(Line2D([], [], ls="", label="no exponents: fewer than 3 minima"))
    ax.legend(handles=keys, loc="best", title="C in FLOP beside each valley", title_fontsize=7)


def draw_comparison(ax: Axes, found: Comparison, x_label: str = "", y_label: str = "loss") -> None:
    """Both laws with their points and bands, crossings, and the X at which it is undecided which is lower.

    The X shown are those of the data, and beyond them as far as the crossings and their ranges reach.
    """
    laws = (found.first, found.second)
    data = np.concatenate([law.x for law in laws])
    ends = [end for part in found.undecided for end in part]
    low, high = limits([*data, *found.crossings, *ends], 0.04, 0.06)
    x = np.geomspace(max(low, found.searched[0]), min(high, found.searched[1]), 240)
    curves = np.concatenate([law.value(x) for law in laws])
    y_low, y_high = limits([*curves, *found.first.y, *found.second.y], 0.16, 0.06)
    log_axes(ax, (low, high), (y_low, y_high))
    ax.set_xlabel(x_label or found.x_name)
    ax.set_ylabel(y_label)
    for i, (start, stop) in enumerate(found.undecided):
        ax.axvspan(
            start, stop, color=MUTED, alpha=0.13, lw=0, zorder=0,
            label="" if i else f"undecided at {found.level:.0%}",
        )  # fmt: skip
    marks = ("o", "s")
    for law, name, colour, mark in zip(laws, found.names, (PLAIN, OFFSET), marks, strict=True):
        band = law.predict(x, found.level)
        ax.fill_between(x, band.low, np.minimum(band.high, 10 * y_high), color=colour, alpha=0.16, lw=0)
        inside = (x >= law.x.min()) & (x <= law.x.max())
        ax.plot(x, law.value(x), "--", color=colour, lw=1.0)
        a, b = law.interval(found.level)["alpha"]
        text = f"α = {law.alpha:.3f} [{a:.3f}, {b:.3f}]".replace("-", "−")
        ax.plot(x[inside], law.value(x[inside]), color=colour)
        ax.plot(law.x, law.y, mark, ms=4.5, color=colour, mec=PAPER, mew=0.5, zorder=3)
        ax.plot(
            [], [], marker=mark, ms=4.5, color=colour, label=f"{name.replace('$', chr(92) + '$')}: {text}"
        )
    for i, place in enumerate(found.crossings):
        ax.plot(
            place, found.first.value(place), "*", ms=11, mfc=PAPER, mec=INK, zorder=5,
            label="" if i else "cross at " + ", ".join(number(float(f"{c:.3g}")) for c in found.crossings),
        )  # fmt: skip
    if not found.crossings:
        ax.plot([], [], " ", label="no crossing in the X searched")
    ax.legend(loc="lower left", title=f"bands: {found.level:.0%}", title_fontsize=7)


def draw_broken(
    ax: Axes, law: BrokenLaw, x_label: str = "X", y_label: str = "loss", level: float = 0.95
) -> None:
    """Points, curve, band and the break with its interval; without a break the points and the status."""
    log_axes(ax, limits(law.x, 0.06, 0.1), limits(law.y, 0.3, 0.1))
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.plot(law.x, law.y, "o", ms=4.5, color=INK, zorder=3)
    if not law.converged:
        ax.plot([], [], " ", label=law.status)
        ax.legend(loc="lower left")
        return
    x = np.geomspace(*ax.get_xlim(), 200)
    p = law.params
    inside = (x >= law.x.min()) & (x <= law.x.max())
    text = f"α = {p['alpha']:.3f}, then {p['alpha_after']:.3f}".replace("-", "−")
    ax.plot(x, law.value(x), "--", color=PLAIN, lw=1.0)
    ax.plot(x[inside], law.value(x[inside]), color=PLAIN, label=text)
    if not law.no_interval(level):
        band = law.predict(x, level)
        ax.fill_between(x, band.low, band.high, color=PLAIN, alpha=0.14, lw=0)
        ax.axvspan(*law.interval(level)["break"], color=MUTED, alpha=0.13, lw=0, zorder=0)
    place = number(float(f"{p['break']:.2e}"))
    ax.axvline(p["break"], color=MUTED, lw=0.9, ls=":", label=f"break at {place}")
    ax.legend(loc="lower left", title=f"bands: {level:.0%}", title_fontsize=7)
