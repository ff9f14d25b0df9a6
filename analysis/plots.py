"""The report's figures, one panel each, so that they stack on a phone and pair in a paper.

- Colour is depth, along viridis (readable without colour vision and in grey); deeper is darker.
  The laws are blue (no offset) and vermilion (with offset) of Okabe and Ito's set.
- A published checkpoint that was evaluated here has a marker of its own, ``PUBLISHED``, and no curve.
- Curves are labelled where they end; axes name quantity and unit, and a FLOPs axis its convention.
- Log axes over less than a decade get round linear ticks: losses from 4.3 to 4.7 have no decade.
- A fit that did not converge is not drawn; its status stands in the legend instead.
- No pyplot: no global state, and equal records give equal files.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.errors import Floats

if TYPE_CHECKING:
    import pandas as pd

    from analysis.forecast import Forecast
    from analysis.frontier import Frontier
    from analysis.powerlaw import PowerLaw

INK, MUTED, GRID, PAPER = "#1b1f24", "#636b76", "#dfe3e8", "#ffffff"
PLAIN, OFFSET = "#0b6fb3", "#c9480b"
STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"], "font.size": 9,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.linewidth": 0.7, "axes.titlesize": 9.5,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "axes.facecolor": PAPER,
    "axes.titlecolor": INK, "figure.facecolor": PAPER, "grid.color": GRID, "grid.linewidth": 0.6,
    "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 7.0,
    "legend.frameon": False, "legend.handlelength": 1.3, "lines.linewidth": 1.4,
    "svg.fonttype": "none", "svg.hashsalt": "varscale", "figure.dpi": 100,
}  # fmt: skip
SIZE = (4.7, 3.5)
"""Inches: one column."""

QUANTITIES = {
    "loss_last": ("Loss, last scale", "validation loss, last scale (nats per token)"),
    "loss_avg": ("Loss, all scales", "validation loss, average (nats per token)"),
    "error_last": ("Error, last scale", "token error rate, last scale"),
    "error_avg": ("Error, all scales", "token error rate, average"),
}
"""Column -> title, axis label."""
X_LABELS = {
    "params": "parameters N (block matrices)",
    "flops": "training compute C (FLOP, exact count)",
    "flops_6nd": "training compute C (FLOP, 6·N·D)",
    "tokens": "training tokens seen D",
}
PUBLISHED = "X"
"""Marker of imported points."""
_SUPER = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def depth_colours(count: int, dark: bool = False) -> list[str]:
    """``count`` hex colours, shallow to deep; ``dark`` for a dark page (deeper is lighter)."""
    at = np.linspace(0.66, 0.05, count) if not dark else np.linspace(0.42, 0.98, count)
    return [
        mpl.colors.to_hex(c)
        for c in mpl.colormaps["viridis"](at if count > 1 else [0.4 if not dark else 0.7])
    ]


def number(value: float) -> str:
    """A tick label: plain between 0.001 and 10 000, else m×10ⁿ with four digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.6g}"
    digits, exponent = f"{value:.3e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPER)
    mantissa = f"{float(digits):g}"
    return power if mantissa == "1" else f"{mantissa}×{power}"


def log_ticks(low: float, high: float, most: int = 6) -> tuple[Floats, Floats]:
    """Labelled and unlabelled ticks for a log axis from ``low`` to ``high``."""
    nothing = np.array([])
    if high / low < 8:
        ticks = np.asarray(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
        return ticks[(ticks >= low) & (ticks <= high)], nothing
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    minor = (10.0 ** decades[:, None] * np.arange(2, 10)).ravel()
    minor = minor[(minor >= low) & (minor <= high)]
    whole = 10.0**decades
    whole = whole[(whole >= low) & (whole <= high)]
    if len(whole) >= 3:
        return whole[:: -(-len(whole) // most)], minor if len(whole) <= most else nothing
    for parts in ((1, 2, 5), (1, 3), (1,)):
        ticks = (10.0 ** decades[:, None] * np.array(parts)).ravel()
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) <= most:
            break
    return ticks, minor[~np.isin(minor, ticks)]


def log_axes(ax: Axes, x: tuple[float, float] | None, y: tuple[float, float] | None) -> None:
    """Log scales with the given limits and readable ticks; None leaves an axis alone."""
    for axis, limits, setter in ((ax.xaxis, x, ax.set_xlim), (ax.yaxis, y, ax.set_ylim)):
        if limits is None:
            continue
        (ax.set_xscale if axis is ax.xaxis else ax.set_yscale)("log")
        setter(*limits)
        major, minor = log_ticks(*limits, most=5 if axis is ax.xaxis else 6)
        axis.set_major_locator(FixedLocator(list(major)))
        axis.set_minor_locator(FixedLocator(list(minor)) if len(minor) else NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


LINE = 12.0
"""Height of a line of labels, in pixels at the figures' 100 dots per inch."""


def limits(values: Any, below: float = 0.06, above: float = 0.06) -> tuple[float, float]:
    """Log-scale limits around the finite, positive ``values`` with a share of margin on each side."""
    numbers = np.asarray(values, dtype=np.float64).ravel()
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    low, high = float(np.log(numbers.min())), float(np.log(numbers.max()))
    span = max(high - low, 0.02)
    return float(np.exp(low - below * span)), float(np.exp(high + above * span))


def figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """One empty panel."""
    fig = Figure(figsize=SIZE)
    FigureCanvasAgg(fig)
    # Fixed margins: a layout engine would draw every figure several times over.
    fig.subplots_adjust(left=0.135, right=0.975, bottom=0.13, top=0.925)
    ax = fig.add_subplot()
    ax.set_title(title)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    return fig, ax


def label(ax: Axes, points: Sequence[tuple[float, float, str, str]], dx: float = 5, dy: float = 4) -> None:
    """Write text beside data points (x, y, text, colour), leaving out what would overlap.

    The first and last points come first, so the ends of a series keep their labels.
    """
    order = sorted(range(len(points)), key=lambda i: (0 < i < len(points) - 1, i))
    taken: list[tuple[float, float, float, float]] = []
    for i in order:
        x, y, text, colour = points[i]
        px, py = ax.transData.transform((x, y))
        box = (px + dx, py + dy, px + dx + 6.0 * len(text) + 2, py + dy + 11)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        ax.annotate(
            text, (x, y), (dx * 0.72, dy * 0.72), textcoords="offset points", fontsize=8, color=colour,
            fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def label_ends(ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write text to the right of curves' ends (x, y, text, colour), pushed apart where they would overlap."""
    order = sorted(points, key=lambda p: p[1])
    wanted = np.array([ax.transData.transform(p[:2])[1] for p in order])
    # The nearest heights at least one line apart: running maximum from below, centred on what was wanted.
    step = LINE * np.arange(len(order))
    above = np.maximum.accumulate(wanted - step)
    below = np.minimum.accumulate((wanted - step)[::-1])[::-1]
    placed = (above + below) / 2 + step
    for (x, y, text, colour), height, at in zip(order, placed, wanted, strict=True):
        ax.annotate(
            text, (x, y), (4.5, (height - at) * 0.72), textcoords="offset points", fontsize=8, color=colour,
            fontweight="bold", annotation_clip=False, va="center",
        )  # fmt: skip


def draw_law(
    ax: Axes,
    law: PowerLaw,
    colour: str = PLAIN,
    name: str = "",
    symbol: str = "X",
    reach: tuple[float, float] | None = None,
    points: bool = True,
    level: float = 0.95,
    observation: bool = False,
) -> None:
    """The law's curve, solid over its data and dashed beyond, with its band.

    A law that did not converge is only named, with its status.
    """
    if points:
        ax.plot(law.x, law.y, "o", ms=4.5, color=INK, zorder=3)
    if not law.converged:
        ax.plot([], [], " ", label=f"{name}{law.status}")
        return
    low, high = reach or (float(law.x.min()), float(law.x.max()))
    x = np.geomspace(low, high, 160)
    inside = (x >= law.x.min() * (1 - 1e-9)) & (x <= law.x.max() * (1 + 1e-9))
    text = f"{name}α = {_short(law.alpha)}"
    if not law.no_interval(level):
        band = law.predict(x, level, observation)
        shown = np.isfinite(band.high)
        ax.fill_between(x[shown], band.low[shown], band.high[shown], color=colour, alpha=0.14, lw=0)
        a, b = law.interval(level)["alpha"]
        text += f" [{_short(a)}, {_short(b)}]"
    if law.kind != "none":
        text += f", L∞ = {law.offset:.3g}"
    text += f", r = {law.pearson:.4f}".replace("-", "−")
    ax.plot(x, law.value(x), "--", color=colour, lw=1.0, zorder=2)
    ax.plot(x[inside], law.value(x[inside]), color=colour, label=text, zorder=2)


def params_figure(final: pd.DataFrame, quantity: str, laws: Sequence[tuple[str, PowerLaw]]) -> Figure:
    """Final ``quantity`` against N, one point per run, with the laws (VAR fig. 5)."""
    title, y_label = QUANTITIES[quantity]
    fig, ax = figure(f"{title}, against model size", X_LABELS["params"], y_label)
    depths = sorted(final["depth"].unique())
    colours = dict(zip(depths, depth_colours(len(depths)), strict=True))
    x_limits = limits(final["params"], 0.06, 0.12)
    values = final[quantity]
    log_axes(ax, x_limits, limits([values.min(), values.max()], 0.35 if laws else 0.1, 0.14))
    for (name, law), colour in zip(laws, (PLAIN, OFFSET), strict=False):
        draw_law(ax, law, colour, name, reach=x_limits, points=False)
    for (depth, imported), part in final.groupby(["depth", "imported"]):
        ax.errorbar(
            part["params"], part[quantity], part[f"{quantity}_se"], fmt=PUBLISHED if imported else "o",
            ms=6 if imported else 5, color=colours[depth], ecolor=MUTED, elinewidth=0.9, capsize=2, zorder=3,
        )  # fmt: skip
    explain_published(ax, final)
    tops = final.groupby("depth").agg({"params": "first", quantity: "max"})
    label(ax, [(r["params"], r[quantity], f"d{d}", colours[d]) for d, r in tops.iterrows()])
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="lower left", title="law, 95 % band; bars: ±1 s.e. over images", title_fontsize=7)
    return fig


def explain_published(ax: Axes, frame: pd.DataFrame) -> None:
    """A line of the legend for imported points, where there are any."""
    if frame["imported"].any():
        ax.plot([], [], PUBLISHED, ms=6, color=MUTED, label="published checkpoint, evaluated here")


def compute_figure(
    frame: pd.DataFrame, quantity: str, frontier: Frontier, laws: Sequence[tuple[str, PowerLaw]], flops: str
) -> Figure:
    """Every run's curve against C, the Pareto frontier and its laws (VAR fig. 6)."""
    title, y_label = QUANTITIES[quantity]
    fig, ax = figure(f"{title}, against compute", X_LABELS[flops], y_label)
    low, high = limits(frame[flops], 0.03, 0.1)
    log_axes(ax, (low, high), limits(frame[quantity], 0.3, 0.09))
    starts = _curves(ax, frame, flops, quantity, end=0)
    size = 3.4 if len(frontier.x) <= 40 else 1.8
    ax.plot(
        frontier.x, frontier.y, "o", ms=size, mfc=PAPER, mec=INK, mew=0.7, zorder=4,
        label=f"Pareto frontier, {len(frontier.x)} of {len(frame)} evaluations",
    )  # fmt: skip
    for (name, law), colour in zip(laws, (PLAIN, OFFSET), strict=False):
        draw_law(ax, law, colour, name, reach=(float(frontier.x.min()), high), points=False)
    explain_published(ax, frame)
    label(ax, starts, dx=-3, dy=5)
    ax.legend(loc="lower left")
    return fig


def curves_figure(frame: pd.DataFrame, quantity: str) -> Figure:
    """Training curves: ``quantity`` on the validation set against tokens seen."""
    title, y_label = QUANTITIES[quantity]
    fig, ax = figure(f"{title}, while training", X_LABELS["tokens"], y_label)
    log_axes(ax, limits(frame["tokens"], 0.03, 0.09), limits(frame[quantity]))
    ends = _curves(ax, frame, "tokens", quantity)
    label_ends(ax, ends)
    if frame["imported"].any():
        explain_published(ax, frame)
        ax.legend(loc="lower left")
    return fig


def scales_figure(final: pd.DataFrame, quantity: str, scales: Sequence[int]) -> Figure:
    """Final loss or error at each scale, a line per depth, and one per depth of imported points."""
    noun, unit = (
        ("Loss", "validation loss (nats per token)") if quantity == "loss" else ("Error", "token error rate")
    )
    fig, ax = figure(f"{noun}, scale by scale", "scale (side of the token map)", unit)
    depths = sorted(final["depth"].unique())
    colours = dict(zip(depths, depth_colours(len(depths)), strict=True))
    at = np.arange(len(scales))
    ends = []
    for (depth, imported), part in final.groupby(["depth", "imported"]):
        line = np.mean(part[f"{quantity}_scales"].tolist(), axis=0)
        ax.plot(at, line, f"{PUBLISHED}--" if imported else "o-", ms=3.5, color=colours[depth])
        ends.append((at[-1], line[-1], f"d{depth}", colours[depth]))
    ax.set_xticks(at, [f"{s}×{s}" for s in scales], rotation=0 if len(scales) <= 6 else 40)
    ax.set_xlim(-0.2, len(scales) - 1 + 0.09 * len(scales))
    label_ends(ax, ends)
    if final["imported"].any():
        explain_published(ax, final)
        ax.legend(loc="upper right")
    return fig


def forecast_figure(final: pd.DataFrame, quantity: str, forecasts: Sequence[tuple[str, Forecast]]) -> Figure:
    """The largest depth as forecast from the others, beside what it reached."""
    title, y_label = QUANTITIES[quantity]
    hidden = forecasts[0][1].x
    fig, ax = figure(f"{title}: largest depth, forecast", X_LABELS["params"], y_label)
    seen, unseen = final[final["params"] < hidden], final[final["params"] == hidden]
    ends = [f.predicted for _, f in forecasts]
    close = [
        v for _, f in forecasts for v in (f.low, f.high) if abs(np.log(v / f.actual)) < _span(final[quantity])
    ]
    x_limits = limits(final["params"], 0.06, 0.16)
    log_axes(ax, x_limits, limits([*final[quantity], *ends, *close], 0.3, 0.1))
    for (name, forecast), colour, shift in zip(forecasts, (PLAIN, OFFSET), (0.955, 1.045), strict=False):
        law = forecast.law
        bounds = f"[{forecast.low:.4g}, {forecast.high:.4g}]"
        said = f"{name}{forecast.predicted:.4g} {bounds}, {forecast.error:+.2%}".replace("-", "−")
        if not law.converged:
            ax.plot([], [], " ", label=f"{name}{law.status}")
            continue
        x = np.geomspace(x_limits[0], hidden, 120)
        ax.plot(x, law.value(x), "--", color=colour, lw=1.1)
        ax.errorbar(
            [hidden * shift], [forecast.predicted],
            [[forecast.predicted - forecast.low], [forecast.high - forecast.predicted]],
            fmt="D", ms=4, color=colour, capsize=3, elinewidth=1.2, zorder=3, label=said,
        )  # fmt: skip
    ax.plot(seen["params"], seen[quantity], "o", ms=5, color=INK, label="used for the fit", zorder=3)
    mean = " on average" if len(unseen) > 1 else ""
    ax.plot(
        unseen["params"], unseen[quantity], "*", ms=10, mfc=PAPER, mec=INK, zorder=4,
        label=f"d{int(unseen['depth'].iloc[0])} reached {forecasts[0][1].actual:.4g}{mean} (hidden)",
    )  # fmt: skip
    tops = final.groupby("depth").agg({"params": "first", quantity: "max"})
    label(ax, [(r["params"], r[quantity], f"d{d}", INK) for d, r in tops.iterrows()])
    ax.legend(loc="lower left", title="forecast, 95 % interval of a new run", title_fontsize=7)
    return fig


def _span(values: pd.Series[float]) -> float:
    """How far from what was reached an interval's end may lie and still stretch the axis."""
    return 1.5 * float(np.log(values.max() / values.min())) + 0.02


def _short(value: float) -> str:
    """Three digits, with a true minus sign."""
    return f"{value:#.3g}".replace("-", "−")


def _curves(
    ax: Axes, frame: pd.DataFrame, x: str, y: str, end: int = -1
) -> list[tuple[float, float, str, str]]:
    """A line per run, coloured by depth; one end (0 or −1) of each depth's first run, to be labelled."""
    depths = sorted(frame["depth"].unique())
    colours = dict(zip(depths, depth_colours(len(depths)), strict=True))
    ends: dict[int, tuple[float, float, str, str]] = {}
    for _, part in frame.groupby("run", sort=False):
        depth = part["depth"].iloc[0]
        finished = part["state"].iloc[0] == "done"
        if part["imported"].iloc[0]:
            ax.plot(part[x], part[y], PUBLISHED, ms=6, color=colours[depth])
        else:
            ax.plot(part[x], part[y], color=colours[depth], lw=1.3, ls="-" if finished else ":")
        mark = "" if finished else " unfinished"
        ends.setdefault(depth, (part[x].iloc[end], part[y].iloc[end], f"d{depth}{mark}", colours[depth]))
    return [ends[d] for d in depths]


def to_svg(fig: Figure) -> str:
    """The figure as SVG text; equal figures give equal text."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(fig: Figure) -> bytes:
    """The figure as PNG at 160 dots per inch."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def styled() -> Any:
    """The context in which the figures are made and written."""
    return mpl.rc_context(cast(Any, STYLE))
