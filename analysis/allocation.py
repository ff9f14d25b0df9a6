"""How deep and how long for a compute budget, in this project's depths, with intervals.

- The dial is one integer, the depth d, so the optimum is found by trying every depth: the loss
  surface L(N, D) at N(d) and at the tokens that the budget buys there (``analysis.ladder``).
- The valley is flat: depths are told apart by the interval of the *difference* of their log losses
  (profile likelihood or replicates, as the surface has), not by the overlap of two intervals,
  which share almost all their error.
- A surface needs final losses at several training lengths per depth. A law over N at one length
  says nothing about length: such data are refused, with the runs that are missing.
- Of 300 simulated studies (``benchmarks/coverage_choices.py allocate --studies 300``: 4 depths × 3 lengths
  at 0.2 % noise, a budget 41 times the largest run's) 95 % intervals of the difference held the truth
  in 96.0 % of the depths compared, those of the best depth, widened to whole depths, in 99.7 %, and those
  of a new run's loss in 94.7 % (sampling error 1.3 %).
- Beyond the trained range every number is an extrapolation; by how much is in ``warnings``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import DataError, Floats
from analysis.ladder import SAME, Ladder, span
from analysis.parametric import ParametricLaw, fit_parametric
from analysis.surface_interval import Quantity

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

DEEPEST = 4096
"""No depth beyond is tried: N = 5·10¹⁵."""
FRESH = 4.0
"""Up to about so many epochs a repeated token counts nearly as a fresh one (2305.16264)."""


@dataclass(frozen=True, eq=False)
class Allocation:
    """The best depth for a budget, its neighbours, and how sure that is."""

    budget: float
    """FLOPs."""
    depth: int
    params: float
    tokens: float
    images: float | None
    """None where the tokens of an image are not known."""
    epochs: float | None
    """None where the size of the data is not known."""
    loss: float
    low: float
    """Of a new run's loss at ``level``; NaN where the surface has no interval."""
    high: float
    level: float
    depth_interval: tuple[float, float] | None
    """Of the depth that is best for the budget, widened to whole depths."""
    tokens_interval: tuple[float, float] | None
    """The tokens that the budget buys at the ends of ``depth_interval``."""
    indistinguishable: tuple[int, ...] | None
    """Depths whose loss cannot be told from the best's at ``level``; None without intervals."""
    no_interval: str
    """Why an interval is missing; empty if none is."""
    table: pd.DataFrame
    """Depths around the best: depth, params, tokens, images, epochs, loss, low, high; ``worse``, the
    loss relative to the best's minus 1, with worse_low and worse_high; ``told_apart``."""
    labels: Mapping[str, str]
    """What N and C count."""
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """The answer as text."""
        n = [f"{self.tokens:.4g} tokens"]
        n += [f"{self.images:.4g} images"] if self.images is not None else []
        n += [f"{self.epochs:.4g} epochs"] if self.epochs is not None else []
        lines = [f"{self.budget:.4g} FLOP: depth {self.depth} (N = {self.params:.4g}) for {', '.join(n)}"]
        bounds = f" [{self.low:.5g}, {self.high:.5g}] at {self.level:.0%}" if self.low == self.low else ""
        lines.append(f"forecast loss {self.loss:.5g}{bounds}")
        if self.depth_interval and self.tokens_interval and self.indistinguishable:
            low, high = self.depth_interval
            few, many = self.tokens_interval
            at = f"at {self.level:.0%}"
            lines.append(f"best depth {low:g} to {high:g}, {few:.4g} to {many:.4g} tokens, {at}")
            lines.append(f"cannot be told from it {at}: depth {_spans(self.indistinguishable)}")
        if self.no_interval:
            lines.append(f"intervals: {self.no_interval}")
        lines.append(_shown(self.table, self.depth).to_string(index=False))
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*lines, *self.labels.values()])

    def _repr_html_(self) -> str:
        lines = [html.escape(line) for line in (*self.warnings, *self.labels.values())]
        head = html.escape(self.summary().splitlines()[0])
        return (
            f"<p>{head}</p>{_shown(self.table, self.depth).to_html(index=False)}<p>{'<br>'.join(lines)}</p>"
        )

    def plot(self, ax: Axes) -> None:
        """Forecast loss over depth at this budget; open points cannot be told from the best."""
        from matplotlib.ticker import MaxNLocator

        from analysis.plots import MUTED, PLAIN

        table = _near(self.table, self.depth)
        ax.fill_between(table["depth"], table["low"], table["high"], color=PLAIN, alpha=0.15, linewidth=0)
        ax.plot(table["depth"], table["loss"], color=PLAIN)
        same = table[~table["told_apart"].astype(bool)] if self.indistinguishable else table.iloc[:0]
        said = f"not told from the best at {self.level:.0%}"
        ax.plot(same["depth"], same["loss"], "o", color=PLAIN, markerfacecolor="none", label=said)
        ax.plot([self.depth], [self.loss], "o", color=PLAIN, label=f"best: depth {self.depth}")
        for row, side in ((table.iloc[0], "left"), (table.iloc[-1], "right")):
            ax.annotate(
                f"{row['tokens']:.2g} tokens", (row["depth"], row["loss"]), color=MUTED, fontsize=7,
                xytext=(0, 6), textcoords="offset points", ha=side,
            )  # fmt: skip
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("depth d")
        ax.set_ylabel("forecast loss (nats per token)")
        ax.set_title(f"Depth for {self.budget:.3g} FLOP")
        ax.legend(loc="upper center")


def allocate(
    budget: float | None,
    runs: pd.DataFrame | Ladder,
    surface: ParametricLaw | None = None,
    *,
    gpu_hours: float | None = None,
    flops_per_second: float | None = None,
    quantity: str = "loss_last",
    params: str = "params",
    flops: str = "flops",
    depths: Sequence[int] | None = None,
    unique_tokens: float | None = None,
    tokens_per_image: float | None = None,
    level: float = 0.95,
) -> Allocation:
    """The depth and training length with the lowest forecast loss for a compute budget.

    Args:
        budget: FLOPs, in the convention of the column ``flops``; None with ``gpu_hours``.
        runs: as from ``load_runs`` (or a ``Ladder``): what a depth costs, and, without ``surface``,
            the final losses that the surface is fitted to (least squares in log L).
        surface: the fitted L(N, D), with N as in the column ``params``.
        gpu_hours, flops_per_second: instead of ``budget``: GPU time, and the FLOP/s that one GPU reaches.
        quantity: the column of the loss, when the surface is fitted here.
        params, flops: the columns of N and C; ``N`` and ``C`` after ``with_conventions``.
        depths: those to choose from; by default every depth that the budget can train for one image.
        unique_tokens: tokens of one pass over the data; by default as the runs' epochs imply.
        tokens_per_image: to say the length in images.
        level: of all intervals.

    Raises:
        DataError: no budget or two; a budget too small for the depths; a surface that did not
            converge, or is none; runs that cannot carry a surface (what to run is said).
    """
    C = _budget(budget, gpu_hours, flops_per_second)
    ladder = runs if isinstance(runs, Ladder) else Ladder.from_runs(_last(runs), params, flops)
    if surface is None:
        if isinstance(runs, Ladder):
            raise DataError("a Ladder says what a depth costs, not what it reaches: give a surface, or runs")
        surface = _fit(_last(runs), quantity, params)
    _usable(surface)
    unique = unique_tokens if unique_tokens is not None else ladder.epoch_tokens
    tried = _depths(depths, ladder, C, tokens_per_image)
    repeats = "R_D" in surface.params

    def at(d: Floats) -> tuple[Floats, Floats, Floats | None]:
        D = ladder.tokens(d, C)
        return ladder.size(d), D, np.minimum(D, unique) if unique is not None and repeats else None

    loss = surface.value(*at(tried))
    best = int(np.argmin(loss))
    depth = int(tried[best])
    near = _around(tried, best)
    said = _bounds(surface, at(near), level)
    table = _table(near, ladder, C, surface.value(*at(near)), said, unique, tokens_per_image)
    why = surface.no_interval(level)
    ends = same = None
    flat: tuple[str, ...] = ()
    table["worse_low"] = table["worse_high"] = np.nan
    table["told_apart"] = np.nan
    if not why:
        rows = near != depth
        low, high = _differences(surface, at(near[rows]), at(tried[[best]]), level)
        table.loc[rows, "worse_low"], table.loc[rows, "worse_high"] = np.expm1(low), np.expm1(high)
        table.loc[~rows, ["worse_low", "worse_high"]] = 0.0
        table["told_apart"] = table["worse_low"] > 0
        alike = near[~table["told_apart"].to_numpy(bool)]
        same = tuple(int(d) for d in tried[(tried >= alike[0]) & (tried <= alike[-1])])
        if alike[0] == near[0] > tried[0] or alike[-1] == near[-1] < tried[-1]:
            flat = (f"the valley is flat beyond the depths compared ({near[0]:g} to {near[-1]:g})",)
        ends, why = _best_depths(surface, ladder, C, unique if repeats else None, level)
    chosen = table[table["depth"] == depth].iloc[0]
    return Allocation(
        C, depth, float(chosen["params"]), float(chosen["tokens"]),
        None if tokens_per_image is None else float(chosen["images"]),
        None if unique is None else float(chosen["epochs"]),
        float(chosen["loss"]), float(chosen["low"]), float(chosen["high"]), level,
        ends, None if ends is None else (float(ladder.tokens(ends[1], C)), float(ladder.tokens(ends[0], C))),
        same, why, table, ladder.labels or {}, (*flat, *_warnings(ladder, surface, chosen, C, tried)),
    )  # fmt: skip


Where = tuple[Floats, Floats, Floats | None]
"""N, D and, for repeated data, unique tokens: (n,) each."""


def _differences(surface: ParametricLaw, at: Where, best: Where, level: float) -> tuple[Floats, Floats]:
    """Bounds of log L at each place minus log L at the best."""
    u, v = np.log(at[0])[:, None], np.log(at[1])[:, None]
    unique = None if at[2] is None else np.log(at[2])[:, None]
    u_best, v_best = np.log(best[0]), np.log(best[1])
    unique_best = None if best[2] is None else np.log(best[2])
    form = surface.surface

    def value(theta_BP: Floats, which: np.ndarray) -> Floats:
        here = form.log_loss(theta_BP, u[which], v[which], None if unique is None else unique[which])
        there = form.log_loss(theta_BP, u_best, v_best, unique_best)
        return np.asarray((here - there)[:, 0])

    if surface.uncertainty is None:
        raise DataError("this law has no interval: " + surface.no_interval(level))
    return surface.uncertainty.bounds(Quantity(value, len(u)), level)


def _best_depths(
    surface: ParametricLaw, ladder: Ladder, C: float, unique: float | None, level: float
) -> tuple[tuple[float, float] | None, str]:
    """The interval of the best depth, or why there is none."""

    def per_token(N: Floats) -> Floats:
        return ladder.cost(ladder.depth_of(N))

    try:
        found = surface.optimal_interval(C, level, per_token, unique)
    except DataError as error:
        return None, f"none of the best depth: {error}"
    low, high = (float(d) for d in ladder.depth_of(np.array(found.params, dtype=np.float64)))
    # Rounding must not turn a whole depth into its neighbour.
    return (max(1.0, math.floor(low + 1e-6)), max(1.0, math.ceil(high - 1e-6))), ""


def _budget(budget: float | None, gpu_hours: float | None, flops_per_second: float | None) -> float:
    if (budget is None) == (gpu_hours is None):
        raise DataError("give one budget: FLOPs, or gpu_hours with flops_per_second")
    if (gpu_hours is None) != (flops_per_second is None):
        raise DataError("gpu_hours and flops_per_second (that one GPU reaches) go together")
    C = budget if budget is not None else 3600.0 * (gpu_hours or 0.0) * (flops_per_second or 0.0)
    if not 0 < C < math.inf:
        raise DataError(f"the budget must be a positive number of FLOPs, got {C}")
    return float(C)


def _last(runs: pd.DataFrame) -> pd.DataFrame:
    """Last evaluations of finished runs: others lie in the middle of a learning-rate schedule."""
    if "final" not in runs:
        return runs
    if not runs["final"].any():
        raise DataError("no run has finished: there are no final losses to allocate by")
    return runs[runs["final"]]


def _fit(final: pd.DataFrame, quantity: str, params: str) -> ParametricLaw:
    if quantity not in final:
        raise DataError(f"the column {quantity} is not there; there are {', '.join(map(str, final.columns))}")
    lengths = np.round(np.log(final["tokens"]), 2)
    per_depth = lengths.groupby(final["depth"]).nunique()
    if len(per_depth) < 3 or lengths.nunique() < 3 or int((per_depth > 1).sum()) < 3:
        depths = ", ".join(f"d{d:g}" for d in per_depth.index)
        few, many = span(final["tokens"].to_numpy(dtype=np.float64))
        raise DataError(
            "how long to train cannot be said from these runs: a surface L(N, D) needs final losses of at "
            "least 3 depths at 2 or more training lengths each, 3 lengths in all; there are "
            f"{depths}, with {int(per_depth.max())} length{'s' if per_depth.max() > 1 else ''} at most "
            f"({few:.3g} to {many:.3g} tokens). Run the depths again at a quarter and at four times the "
            "epochs, and give all runs together"
        )
    pairs = final.groupby(["depth", lengths]).ngroup()
    groups = pairs if pairs.duplicated().any() else None
    return fit_parametric(final[params], final["tokens"], final[quantity], "squared", groups=groups)


def _usable(surface: object) -> None:
    if not isinstance(surface, ParametricLaw):
        raise DataError(
            f"allocate needs a loss surface L(N, D) (fit_parametric), got {type(surface).__name__}: a law "
            "over one scale says nothing about the trade of depth against training length"
        )
    if not surface.converged and not (surface.E == 0 and surface.uncertainty):
        raise DataError(f"the surface is no fit to allocate by: {surface.status}")


def _depths(asked: Sequence[int] | None, ladder: Ladder, C: float, tokens_per_image: float | None) -> Floats:
    """Growing depths that the budget can train for one image (one token, if its tokens are not known)."""
    tried = np.unique(np.asarray(asked if asked is not None else np.arange(1, DEEPEST + 1), dtype=np.float64))
    if len(tried) == 0 or tried[0] < 1 or (tried != np.round(tried)).any():
        raise DataError(f"depths: expected whole numbers from 1, got {asked}")
    tried = tried[ladder.tokens(tried, C) >= (tokens_per_image or 1.0)]
    if len(tried) == 0:
        raise DataError(f"{C:.4g} FLOP do not train the smallest depth on a single image")
    return tried


def _around(tried: Floats, best: int) -> Floats:
    """Depths to compare: four to either side, then a fifth apart up to eight times deeper and shallower."""
    steps = tried[best] * 8.0 ** (np.arange(-12, 13) / 12)
    places = np.searchsorted(tried, steps).clip(max=len(tried) - 1)
    next_to = np.arange(best - 4, best + 5).clip(0, len(tried) - 1)
    return np.asarray(tried[np.unique(np.concatenate([places, next_to]))])


def _bounds(
    surface: ParametricLaw, where: tuple[Floats, Floats, Floats | None], level: float
) -> tuple[Floats, Floats]:
    if surface.no_interval(level):
        nothing = np.full(len(where[0]), np.nan)
        return nothing, nothing
    said = surface.predict(*where, level=level, observation=True)
    return said.low, said.high


def _table(
    near: Floats, ladder: Ladder, C: float, loss: Floats, said: tuple[Floats, Floats],
    unique: float | None, tokens_per_image: float | None,
) -> pd.DataFrame:  # fmt: skip
    import pandas as pd

    D = ladder.tokens(near, C)
    nothing = np.full(len(near), np.nan)
    return pd.DataFrame(
        {
            "depth": near.astype(int), "params": ladder.size(near), "tokens": D,
            "images": nothing if tokens_per_image is None else D / tokens_per_image,
            "epochs": nothing if unique is None else D / unique,
            "loss": loss, "low": said[0], "high": said[1], "worse": loss / loss.min() - 1,
        }
    )  # fmt: skip


def _near(table: pd.DataFrame, depth: int) -> pd.DataFrame:
    return table[table["depth"].between(depth / 2, depth * 2)]


def _shown(table: pd.DataFrame, depth: int) -> pd.DataFrame:
    """The table for reading: within twice the depth, short numbers, percentages, no empty columns."""
    shown = _near(table, depth).dropna(axis=1, how="all").copy()
    for name in shown.columns.intersection(["params", "tokens", "images", "epochs"]):
        shown[name] = shown[name].map("{:.4g}".format)
    for name in shown.columns.intersection(["loss", "low", "high"]):
        shown[name] = shown[name].map("{:.5g}".format)
    for name in shown.columns.intersection(["worse", "worse_low", "worse_high"]):
        shown[name] = shown[name].map("{:+.2%}".format)
    return shown


def _spans(depths: Sequence[int]) -> str:
    """``3 to 5, 8``."""
    spans: list[list[int]] = []
    for d in depths:
        if spans and d == spans[-1][1] + 1:
            spans[-1][1] = d
        else:
            spans.append([d, d])
    return ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in spans)


def _warnings(
    ladder: Ladder, surface: ParametricLaw, chosen: pd.Series, C: float, tried: Floats
) -> Iterator[str]:
    if ladder.note:
        yield ladder.note
    if not surface.converged:
        yield f"{surface.status}; far beyond the runs the loss is then forecast too low"
    if len(tried) > 1 and chosen["depth"] in (tried[0], tried[-1]) and chosen["depth"] > 1:
        yield f"the best is an end of the depths tried ({tried[0]:g} to {tried[-1]:g}); it may lie beyond"
    words = {
        "params": ("the model", "larger than the largest", "smaller than the smallest", chosen["params"]),
        "tokens": ("training", "longer than the longest", "shorter than the shortest", chosen["tokens"]),
        "flops": ("the budget", "larger than the largest", "smaller than the smallest", C),
    }
    for key, (what, more, less, value) in words.items():
        low, high = ladder.trained.get(key, (0.0, math.inf))
        if value > high * (1 + SAME):
            yield f"extrapolation: {what} is {value / high:.3g} times {more} run's"
        if value < low * (1 - SAME):
            yield f"extrapolation: {what} is {low / value:.3g} times {less} run's"
    epochs = float(chosen["epochs"])
    covered = ladder.trained.get("epochs", (0.0, 1.0))[1]
    if epochs > max(1.0, covered) * (1 + SAME):
        yield f"the data would be seen {epochs:.3g} times; the runs saw it up to {covered:.3g} times"
    if "R_D" in surface.params and epochs != epochs:
        yield "the size of the data is not known (unique_tokens): every token is taken for a fresh one"
    if epochs > FRESH and "R_D" not in surface.params:
        yield (
            f"{epochs:.3g} epochs, and this surface takes a repeated token for a fresh one; fit it with "
            "unique_tokens if the runs repeat their data"
        )
