"""Two laws side by side: difference in exponent, ratio of losses, and where one overtakes the other.

- The two are taken as independent: no run in both. Laws that hold the very same points are refused.
- Both lines with Student's t (least squares, offset none or fixed): the variances of the
  exponents add, the degrees of freedom by Welch and Satterthwaite. Otherwise the two intervals
  are combined by MOVER (Zou and Donner 2008): for d = θ₁ − θ₂, ``d − √((θ₁−l₁)² + (u₂−θ₂)²)`` to
  ``d + √((u₁−θ₁)² + (θ₂−l₂)²)``, which keeps them lopsided.
- Ratio of losses likewise, of log L at one X. The range of the crossing is the set of all X at
  which the interval of that ratio includes 1 (Fieller's way): it covers as the interval does, and
  may be empty, in pieces, or open at the ends of the X searched. It is then said in words.
- Of 1000 studies of 6 + 6 runs without offset (exponents −0.10 and −0.14) at noise 0.2 % each and
  0.2 and 0.4 %, the 95 % interval of the difference held in 95.1 and 94.3 %, the crossing's range in
  95.3 and 94.6 %; of 100 with free offsets (−0.20 and −0.30), 10 + 10 runs, noise 0.1 %, in 96 and
  95 % (``benchmarks/coverage_choices.py compare --studies 1000``).
- Two laws without offset cross once unless parallel; with offsets up to twice, or never.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.errors import DataError, Floats, positive
from analysis.intervals import Bounds, LineInterval, t_quantile
from analysis.powerlaw import PowerLaw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 600
"""Points of log X at which crossings are looked for."""


@dataclass(frozen=True, eq=False)
class Ratio:
    """first's L / second's L at ``x``, with its interval."""

    x: Floats
    value: Floats
    low: Floats
    high: Floats
    level: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """What ``compare`` found."""

    first: PowerLaw
    second: PowerLaw
    names: tuple[str, str]
    level: float
    x_name: str
    searched: tuple[float, float]
    """X between which crossings were looked for."""

    @property
    def difference(self) -> float:
        """first's exponent − second's."""
        return self.first.alpha - self.second.alpha

    @property
    def method(self) -> str:
        """How the interval of the difference was made."""
        return "Welch's t" if self._lines else "MOVER of the two laws' own intervals"

    def interval(self, level: float | None = None) -> tuple[float, float]:
        """Of ``difference``; at the comparison's level unless told."""
        level = self.level if level is None else level
        if self._lines:
            slope = np.array([[0.0, 1.0]])
            low, high = _welch(self.first, self.second, slope, slope, level)
            return float(self.difference + low[0]), float(self.difference + high[0])
        bounds = [np.array([law.interval(level)["alpha"]]).T for law in (self.first, self.second)]
        low, high = _mover(np.array([self.first.alpha]), bounds[0], np.array([self.second.alpha]), bounds[1])
        return float(low[0]), float(high[0])

    def ratio(self, x: ArrayLike, level: float | None = None) -> Ratio:
        """first's L over second's at ``x``, with its interval."""
        level = self.level if level is None else level
        at = np.atleast_1d(positive(np.atleast_1d(x), "x"))
        one, two = np.log(self.first.value(at)), np.log(self.second.value(at))
        if self._lines and self.first.kind == self.second.kind == "none":
            low, high = _welch(
                self.first, self.second, _contrasts(self.first, at), _contrasts(self.second, at), level
            )
            low, high = one - two + low, one - two + high
        else:
            bounds = []
            for law in (self.first, self.second):
                said = law.predict(at, level)
                bounds.append(np.log(np.stack([said.low, said.high])))
            low, high = _mover(one, bounds[0], two, bounds[1])
        with np.errstate(over="ignore"):
            return Ratio(at, np.exp(one - two), np.exp(low), np.exp(high), level)

    @cached_property
    def crossings(self) -> tuple[float, ...]:
        """X in ``searched`` at which the two fitted laws give the same L, growing."""
        from scipy.optimize import brentq

        def gap(log_x: float) -> float:
            x = np.array([np.exp(log_x)])
            return float((np.log(self.first.value(x)) - np.log(self.second.value(x)))[0])

        grid = np.log(self._grid)
        values = np.array([gap(float(u)) for u in grid])
        found = [float(np.exp(u)) for u, v in zip(grid, values, strict=True) if v == 0]
        for i in np.flatnonzero(values[:-1] * values[1:] < 0):
            found.append(float(np.exp(brentq(gap, grid[i], grid[i + 1], xtol=1e-13))))
        return tuple(sorted(found))

    @cached_property
    def undecided(self) -> tuple[tuple[float, float], ...]:
        """Ranges of X in ``searched`` where the interval of the ratio includes 1: the crossing's range."""
        # Around each crossing ever finer steps: its range may be narrower than one of the grid's.
        fine = np.geomspace(1e-9, np.log(self.searched[1] / self.searched[0]) / STEPS, 30)
        places = np.array(self.crossings)
        around = (places[:, None] * np.exp(np.concatenate([-fine, fine]))).ravel()
        grid = np.unique(np.clip(np.concatenate([self._grid, places, around]), *self.searched))
        ratio = self.ratio(grid)
        with np.errstate(divide="ignore"):  # an open bound is 0, whose log is −∞
            u, low, high = np.log(ratio.x), np.log(ratio.low), np.log(ratio.high)
        inside = ((low <= 0) & (high >= 0)) | np.isin(grid, places)
        edges = np.flatnonzero(np.diff(inside.astype(int)))
        ends: list[float] = [float(u[0])] if inside[0] else []
        for i in edges:
            outer = i if inside[i + 1] else i + 1
            bound = low if low[outer] > 0 else high
            share = bound[i] / (bound[i] - bound[i + 1])
            ends.append(float(u[i] + (share if np.isfinite(share) else 0.5) * (u[i + 1] - u[i])))
        if inside[-1]:
            ends.append(float(u[-1]))
        return tuple((float(np.exp(a)), float(np.exp(b))) for a, b in zip(ends[::2], ends[1::2], strict=True))

    @property
    def verdict(self) -> str:
        """Who is lower where, and how sure, in words."""
        low, high = self.searched
        a, b = self.names
        x = self.x_name
        where = f"between {x} = {low:.3g} and {high:.3g}"
        lines = []
        if not self.crossings:
            lower = a if float(self.first.value(low)) < float(self.second.value(low)) else b
            lines.append(f"the fitted laws do not cross {where}: {lower} is lower{self._beyond()}")
        for place in self.crossings:
            before = place * (1 - 1e-6)
            first_lower = float(self.first.value(before)) < float(self.second.value(before))
            lower, later = (a, b) if first_lower else (b, a)
            lines.append(f"{lower} is lower below {x} = {place:.4g}, {later} above")
        if not self.undecided:
            lines.append(f"at {self.level:.0%} that is decided everywhere {where}")
        for start, stop in self.undecided:
            left = "open below" if start <= low * (1 + 1e-9) else f"from {start:.3g}"
            right = "open above" if stop >= high * (1 - 1e-9) else f"to {stop:.3g}"
            if left == "open below" and right == "open above":
                lines.append(f"at {self.level:.0%} it is undecided everywhere {where}")
            else:
                lines.append(f"at {self.level:.0%} undecided: {x} {left}, {right}")
        return "; ".join(lines)

    def rows(self) -> list[tuple[str, float, float, float]]:
        """(name, value, low, high): both exponents and their difference."""
        a, b = self.names
        return [
            (f"alpha {a}", self.first.alpha, *self.first.interval(self.level)["alpha"]),
            (f"alpha {b}", self.second.alpha, *self.second.interval(self.level)["alpha"]),
            ("difference", self.difference, *self.interval()),
        ]

    def summary(self) -> str:
        """The comparison as text."""
        low, high = self.interval()
        apart = "excludes" if low > 0 or high < 0 else "includes"
        lines = [f"  {name:20s}{value:10.5f}  [{lo:.5f}, {hi:.5f}]" for name, value, lo, hi in self.rows()]
        return "\n".join(
            [
                f"{self.names[0]} against {self.names[1]}, {self.level:.0%} intervals, runs independent",
                *lines,
                f"the interval of the difference ({self.method}) {apart} 0",
                self.verdict,
            ]
        )

    def _repr_html_(self) -> str:
        import html

        import pandas as pd

        table = pd.DataFrame(self.rows(), columns=["exponent", "value", "low", "high"])
        return f"{table.to_html(index=False)}<p>{html.escape(self.verdict)}</p>"

    def plot(self, ax: Axes, **options: Any) -> None:
        """Both laws with bands, the crossings and the undecided ranges."""
        from analysis.fit_plots import draw_comparison

        draw_comparison(ax, self, **options)

    @property
    def _grid(self) -> Floats:
        return np.geomspace(*self.searched, STEPS)

    @property
    def _lines(self) -> bool:
        return all(isinstance(law.uncertainty, LineInterval) for law in (self.first, self.second))

    def _beyond(self) -> str:
        """Where two laws without offset meet outside the X searched."""
        if not self.first.kind == self.second.kind == "none" or self.difference == 0:
            return ""
        meet = self.second.alpha * self.second.log_beta - self.first.alpha * self.first.log_beta
        decades = meet / self.difference / np.log(10)
        return f" (they meet at {self.x_name} = 1e{decades:.1f}, an extrapolation)"


def compare(
    first: PowerLaw,
    second: PowerLaw,
    names: tuple[str, str] = ("first", "second"),
    level: float = 0.95,
    x_name: str = "X",
    extrapolation: float = 10.0,
) -> Comparison:
    """Two laws of the same loss over the same X, fitted on separate runs.

    That they are the same is the caller's to see to: losses of other tokenizers, scales or
    conventions of N and C do not compare, and nothing in a law can tell.

    Args:
        first, second: converged laws with intervals.
        names: of the two, for words and figures.
        level: of the intervals.
        x_name: of X.
        extrapolation: crossings are looked for this factor beyond the data of both, on either side.

    Raises:
        DataError: a law did not converge or has no interval (the reason is given), both hold the
            same points, equal names, ``extrapolation`` below 1.
    """
    if names[0] == names[1]:
        raise DataError(f"names: two different names are expected, got {names[0]!r} twice")
    if not extrapolation >= 1:
        raise DataError(f"extrapolation must be at least 1, got {extrapolation}")
    for name, law in zip(names, (first, second), strict=True):
        if not law.converged:
            raise DataError(f"{name}: {law.status}")
        if why := law.no_interval(level):
            raise DataError(f"{name} has no interval: {why}")
    if first.x.shape == second.x.shape and _same_points(first, second):
        raise DataError(f"{names[0]} and {names[1]} hold the same points: compare needs separate runs")
    low = min(first.x.min(), second.x.min()) / extrapolation
    high = max(first.x.max(), second.x.max()) * extrapolation
    return Comparison(first, second, names, level, x_name, (float(low), float(high)))


def _same_points(first: PowerLaw, second: PowerLaw) -> bool:
    ours, theirs = (
        np.stack([law.x, law.y])[:, np.lexsort((law.y, law.x))] for law in (first, second)
    )  # fmt: skip
    return bool((ours == theirs).all())


def _contrasts(law: PowerLaw, x: Floats) -> Floats:
    line = law.uncertainty
    assert isinstance(line, LineInterval)
    return np.stack([np.ones_like(x), np.log(x) - line.centre], 1)


def _welch(first: PowerLaw, second: PowerLaw, one: Floats, two: Floats, level: float) -> Bounds:
    """Half widths (−, +) of the difference of two lines' contrasts (S, 2)."""
    variance, freedom = [], []
    for law, contrasts in ((first, one), (second, two)):
        line = law.uncertainty
        assert isinstance(line, LineInterval)
        variance.append(np.einsum("sp,pq,sq->s", contrasts, line.cov, contrasts))
        freedom.append(line.freedom(contrasts))
    total = variance[0] + variance[1]
    # Exact data have no variance; any freedom then gives the same half width of 0.
    share = np.divide(variance[0], total, out=np.full_like(total, 0.5), where=total > 0)
    half = t_quantile(1 / (share**2 / freedom[0] + (1 - share) ** 2 / freedom[1]), level) * np.sqrt(total)
    return -half, half


def _mover(one: Floats, one_bounds: Floats, two: Floats, two_bounds: Floats) -> Bounds:
    """Interval of one − two from each one's own, (low, high) stacked first."""
    low = one - two - np.hypot(one - one_bounds[0], two_bounds[1] - two)
    high = one - two + np.hypot(one_bounds[1] - one, two - two_bounds[0])
    return low, high
