"""One budget's valley: loss over log N, its lowest point and how well that is known.

- ``Parabola``: least squares on (1, z, z²), z = log N − mean, losses divided by the budget's
  geometric mean so that the noise of budgets can be pooled.
- ``Akima``: the interpolating spline of Akima 1970 through the mean loss at each N, its lowest
  point among the exact zeros of its derivative. Five distinct N: its slopes are made of five points.
  A minimum that lies below all means by a fifth of their range is rejected (of a parabola through
  five points it can be a twenty-fifth).
- N within 5 % of one another are one (``places``). Between noisy losses that close a spline shoots
  far below them, and a parabola through two such and a third N can turn anywhere between the two,
  in so sharp a valley that the delta method takes the place for very well known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.errors import Floats
from analysis.intervals import fieller

ValleyMethod = Literal["parabola", "spline"]
LEAST = {"parabola": 3, "spline": 5}
"""Distinct N (``places``) that a valley needs."""
NEAR = float(np.log(1.05))
"""How far apart, in log, the N of one place may be."""
OVERSHOOT = 0.2
"""Of the range of mean losses: what a spline's minimum may lie below them."""


@dataclass(frozen=True, eq=False)
class Parabola:
    """``L/scale = c₀ + c₁ z + c₂ z²``."""

    coefficients: Floats
    """(3,), lowest order first."""
    inverse: Floats
    """(XᵀX)⁻¹ (3, 3): the covariance of the coefficients but for the noise variance."""
    design: Floats
    """X (n, 3)."""
    residuals: Floats
    """(n,) of L/scale."""
    centre: float
    scale: float

    @property
    def rss(self) -> float:
        return float(self.residuals @ self.residuals)

    @property
    def freedom(self) -> int:
        """Points − 3."""
        return len(self.residuals) - 3

    @property
    def reason(self) -> str:
        return "" if self.coefficients[2] > 0 else "the parabola opens downwards"

    @property
    def log_n(self) -> float:
        c = self.coefficients
        return self.centre - float(c[1] / (2 * c[2])) if c[2] > 0 else float("nan")

    def value(self, log_n: Floats) -> Floats:
        z = log_n - self.centre
        c = self.coefficients
        return self.scale * (c[0] + z * (c[1] + z * c[2]))

    def influence(self) -> tuple[Floats, Floats]:
        """Derivatives (n,) of log N and log L of the minimum by each point's L/scale."""
        c = self.coefficients
        z = self.log_n - self.centre
        place = -np.array([0.0, 1.0, 2 * z]) / (2 * c[2])
        # The first-order change of the place does not change the value: the slope there is 0.
        height = np.array([1.0, z, z * z]) / float(self.value(np.array(self.log_n)) / self.scale)
        by_point = self.inverse @ self.design.T
        return place @ by_point, height @ by_point

    def leverage(self) -> Floats:
        """(n,) diagonal of the hat matrix."""
        return np.asarray(np.einsum("np,pq,nq->n", self.design, self.inverse, self.design))

    def place_interval(self, q: float) -> tuple[float, float]:
        """Range of the minimum's log N (Fieller 1954), q = t² × noise variance; maybe unbounded."""
        c, cov = self.coefficients, self.inverse[1:, 1:]
        low, high = fieller(c[1:2], c[2:3], cov[None], np.array([q]))
        return self.centre - high / 2, self.centre - low / 2


@dataclass(frozen=True, eq=False)
class Akima:
    """The spline and the lowest of its sampled ends and turning points."""

    spline: Any
    log_n: float
    reason: str

    def value(self, log_n: Floats) -> Floats:
        return np.asarray(self.spline(log_n), dtype=np.float64)


def places(log_n: Floats) -> NDArray[np.int64]:
    """Which distinct N each point has: 0, 1, … by growing N; those of one lie within ``NEAR``.

    From the smallest up, a place takes what lies within 5 % of its own smallest N, so that a row of
    N in small steps is many places and not one.
    """
    order = np.argsort(log_n, kind="stable")
    which = np.empty(len(log_n), np.int64)
    place, start = -1, -np.inf
    for i in order:
        # Rounding must not decide about N exactly 5 % apart.
        if log_n[i] - start > NEAR + 1e-9:
            place, start = place + 1, log_n[i]
        which[i] = place
    return which


def fit_valley(log_n: Floats, loss: Floats, method: ValleyMethod) -> Parabola | Akima | None:
    """The curve of one budget; None with fewer distinct N than ``LEAST``."""
    which = places(log_n)
    count = np.bincount(which)
    if len(count) < LEAST[method]:
        return None
    if method == "parabola":
        centre, scale = float(log_n.mean()), float(np.exp(np.log(loss).mean()))
        X = np.vander(log_n - centre, 3, increasing=True)
        # Orthogonal columns first: with N far apart or close together XᵀX alone loses digits.
        Q, R = np.linalg.qr(X)
        R_inverse = np.linalg.inv(R)
        c = R_inverse @ (Q.T @ (loss / scale))
        return Parabola(c, R_inverse @ R_inverse.T, X, loss / scale - X @ c, centre, scale)

    from scipy.interpolate import Akima1DInterpolator

    knots, mean = np.bincount(which, log_n) / count, np.bincount(which, loss) / count
    spline = Akima1DInterpolator(knots, mean)
    turns = np.asarray(spline.derivative().roots(extrapolate=False), dtype=np.float64)
    turns = turns[np.isfinite(turns) & (turns > knots[0]) & (turns < knots[-1])]
    candidates = np.concatenate([knots[[0, -1]], turns])
    lowest = int(np.argmin(spline(candidates)))
    if lowest < 2:
        end = ("smallest", "largest")[lowest]
        return Akima(spline, float("nan"), f"the loss is lowest at the {end} N sampled")
    below = mean.min() - float(spline(candidates[lowest]))
    if below > OVERSHOOT * np.ptp(mean):
        return Akima(spline, float("nan"), "the spline dips far below the losses it passes through")
    return Akima(spline, float(candidates[lowest]), "")
