"""Power laws ``L = (βX)^α`` and ``L = L∞ + (βX)^α`` (VAR eqs. 9–16; α is negative for a loss that falls).

- Without an offset, or with a fixed one (the paper's 4.5 and 5.0 nats), the law is a straight
  line of ``log(L − L∞)`` over ``log X``: least squares there, as the paper does, or Huber's loss, summed.
- With a free offset the residual is ``log L̂ − log L``, never ``log(L − L∞)``, whose scatter
  shrinks by itself as L∞ falls and so pulls L∞ down (``analysis.line_fit`` has the descent).
- L∞ is not bounded by the smallest observation, which lies below the law by its noise: of a law
  that has reached its floor that bound would cut the truth away. L∞ may exceed an observation as
  far as the objective allows: L̂ > L∞, so one residual alone would cost more beyond (``ceiling_of``).
- A fit that did not converge, or rests at a bound of L∞, says so in ``status``; it is not drawn.
- Intervals: ``analysis.intervals`` says which method is used when, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from analysis.bootstrap import group_codes, group_weights, replicates_note
from analysis.errors import DataError, Floats, check_level, positive, rows
from analysis.intervals import Interval, ReplicateInterval, bracket, cluster_line, student_line
from analysis.line_fit import fit_line, fit_offset, pivot_of, polish, profile_interval
from analysis.solver import LossFn, check_loss_fn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OffsetKind = Literal["none", "fixed", "free"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """L at ``x`` with its interval."""

    x: Floats
    value: Floats
    low: Floats
    high: Floats
    level: float
    observation: bool
    """False: the interval of the law itself. True: of one new run, its noise included."""


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """A fitted law. Frozen; every number in it belongs to the data it holds."""

    x: Floats
    y: Floats
    weights: Floats
    """Scaled to mean 1."""
    groups: int
    """Independent units: runs, or points where no groups were given."""
    kind: OffsetKind
    params: Mapping[str, float]
    """alpha, beta (in 1/unit of X) and, unless ``kind`` is none, offset (in L's unit)."""
    log_beta: float
    """β may lie beyond the range of floats when α is small; its natural log does not."""
    pearson: float
    """Correlation of log X with log(L − offset), over the points above the offset."""
    objective: float
    """Σ w ρ(r) of the log residuals; ρ = r²/2 or Huber's."""
    residuals: Floats
    """log L̂ − log L (of L − offset when the offset is fixed)."""
    converged: bool
    status: str
    loss_fn: LossFn
    delta: float
    uncertainty: Interval | None
    replicates: Floats | None
    """(R, 3) bootstrap draws of alpha, log_beta, offset; None without ``bootstrap``."""
    redrawn: int
    """Resamples that could not carry the form and were drawn again."""
    unconverged: int
    """Replicates whose gradient did not vanish; they count where they ended."""

    @property
    def alpha(self) -> float:
        """The exponent."""
        return self.params["alpha"]

    @property
    def offset(self) -> float:
        """L∞; 0 without an offset."""
        return self.params.get("offset", 0.0)

    @property
    def interval_method(self) -> str:
        """How ``interval`` and ``predict`` get their bounds, or why there are none."""
        return self.uncertainty.method if self.uncertainty else "none: " + _why_none(self)

    def no_interval(self, level: float = 0.95) -> str:
        """Why there is no interval at this level: Huber's loss, or several points per run with a
        free offset, fitted without ``bootstrap``; too few runs or replicates. Empty if there is one.
        """
        return self.uncertainty.refusal(check_level(level)) if self.uncertainty else _why_none(self)

    def interval(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Intervals of the fitted parameters, by name, and of ``log_beta`` (β may overflow).

        Raises:
            DataError: ``no_interval`` says why.
        """
        found = self._uncertain(level).params(check_level(level))
        low, high = found["log_beta"]
        with np.errstate(over="ignore"):
            found["beta"] = (float(np.exp(low)), float(np.exp(high)))
        return found

    def value(self, x: ArrayLike) -> Floats:
        """L at ``x``.

        Raises:
            DataError: ``x`` is not positive.
        """
        at = np.asarray(x, dtype=np.float64)
        logs = np.log(positive(at.ravel(), "x")).reshape(at.shape) + self.log_beta
        return np.asarray(self.offset + np.exp(self.alpha * logs))

    def predict(self, x: ArrayLike, level: float = 0.95, observation: bool = False) -> Prediction:
        """L at ``x`` with an interval: of the law, or of one new run with ``observation``.

        Raises:
            DataError: as ``interval``.
        """
        at = np.atleast_1d(positive(np.atleast_1d(x), "x"))
        z = np.log(at) - self._centre
        low, high = self._uncertain(level).predict(z, check_level(level), observation)
        return Prediction(at, self.value(at), low, high, level, observation)

    @property
    def equation(self) -> str:
        """The law with its numbers."""
        head = f"{self.offset:.4g} + " if self.kind != "none" else ""
        return f"L = {head}({_scientific(self.log_beta)}·X)^{self.alpha:.4g}"

    def rows(self, level: float = 0.95) -> list[tuple[str, float, float, float]]:
        """(name, value, low, high) of every parameter; NaN bounds where there is no interval."""
        bounds = {} if self.no_interval(level) else self.interval(level)
        nothing = (float("nan"), float("nan"))
        return [(name, value, *bounds.get(name, nothing)) for name, value in self.params.items()]

    def summary(self, level: float = 0.95) -> str:
        """The fit as text."""
        why = self.no_interval(level)
        method = f"none: {why}" if why else self.interval_method
        lines = [
            self.equation,
            f"points {len(self.x)}, independent {self.groups}, loss {self.loss_fn}, r {self.pearson:.5f}",
            f"objective {self.objective:.6e}, status: {self.status}",
            f"{level:.0%} intervals: {method}",
        ]
        lines += [
            f"  {name:8s}{value:12.5g}{bracket(low, high)}" for name, value, low, high in self.rows(level)
        ]
        if self.replicates is not None:
            lines.append(replicates_note(len(self.replicates), self.redrawn, self.unconverged))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        import pandas as pd

        table = pd.DataFrame(self.rows(), columns=["parameter", "value", "low", "high"])
        return f"{table.to_html(index=False)}<p>r = {self.pearson:.4f}; {self.status}</p>"

    def plot(self, ax: Axes, **options: Any) -> None:
        """Points, curve and band; of a fit that did not converge the points alone, and its status."""
        from analysis.plots import draw_law

        draw_law(ax, self, **options)

    @cached_property
    def _centre(self) -> float:
        return _centre(np.log(self.x), self.weights)

    def _uncertain(self, level: float) -> Interval:
        if self.uncertainty is None or self.uncertainty.refusal(check_level(level)):
            raise DataError("this law has no interval: " + self.no_interval(level))
        return self.uncertainty


def fit_power_law(
    x: ArrayLike,
    y: ArrayLike,
    offset: bool | float = False,
    weights: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    loss_fn: LossFn = "squared",
    delta: float = 1e-3,
) -> PowerLaw:
    """Fit ``L = (βX)^α`` or ``L = L∞ + (βX)^α`` (VAR eqs. 9–16).

    Args:
        x: the scale X: parameters, FLOPs, tokens; positive.
        y: loss or error rate L; positive.
        offset: False for none, True for a free L∞ ≥ 0, a number for a fixed one.
        weights: of the points, e.g. 1/se²; scaled to mean 1.
        groups: the run (or seed) of each point; points of one group are not independent.
        bootstrap: replicates over groups. Needed for intervals with Huber's loss and with a
            free offset over several points per run; elsewhere kept beside better intervals.
        seed: of the bootstrap.
        loss_fn: squared, or huber (summed over points) for data with outliers.
        delta: Huber's δ in units of log L.

    Raises:
        DataError: NaN or non-positive values (rows named), too few points or distinct x for
            the form, constant y, points at or below a fixed offset, an unknown loss, δ ≤ 0.
    """
    x_n, y_n = positive(x, "x"), positive(y, "y")
    if len(x_n) != len(y_n):
        raise DataError(f"x has {len(x_n)} rows, y has {len(y_n)}")
    n = len(x_n)
    codes = group_codes(groups, n)
    G = int(codes.max(initial=-1)) + 1
    check_loss_fn(loss_fn, delta)
    # A comparison of numpy's is no bool of Python's, and must not pass for an offset of 1 nat.
    switch = isinstance(offset, bool | np.bool_)
    kind: OffsetKind = ("free" if offset else "none") if switch else "fixed"
    fixed = float(offset) if kind == "fixed" else 0.0
    _enough(x_n, n, G, kind)
    w = np.ones(n) if weights is None else positive(weights, "weights")
    if len(w) != n:
        raise DataError(f"weights: expected {n}, got {len(w)}")
    w = w / w.mean()
    if not fixed >= 0:
        raise DataError(f"offset must not be negative, got {fixed}")
    if (y_n <= fixed).any():
        raise DataError(f"y: {rows(y_n <= fixed)} at or below the fixed offset {fixed:g}")
    if np.ptp(y_n) <= 16 * np.finfo(np.float64).eps * y_n.max():
        raise DataError("y does not change with x at all: no exponent to fit")
    log_x = np.log(x_n)
    centre = _centre(log_x, w)
    z, log_y = log_x - centre, np.log(y_n - fixed)
    ceiling = 0.0
    if kind == "free":
        theta, objective, converged, status, ceiling = fit_offset(z, y_n, w, loss_fn, delta)
    else:
        solution = fit_line(z, log_y, w[None], loss_fn, delta)
        theta = np.append(solution.theta[0], fixed)
        objective, converged = float(solution.objective[0]), bool(solution.converged[0])
        status = "converged" if converged else "not converged: the gradient does not vanish"
    a, alpha, L_inf = (float(v) for v in theta)
    if alpha == 0:
        raise DataError("the fitted exponent is exactly 0, so that β is not defined")
    log_beta = a / alpha - centre
    if kind == "free":
        residuals = np.log(L_inf + np.exp(a + alpha * z)) - log_y
    else:
        residuals = a + alpha * z - log_y

    replicates = None
    redrawn = unconverged = 0
    if bootstrap:
        draws, redrawn = group_weights(codes, bootstrap, seed, (x_n, 3 if kind == "free" else 2))
        if kind == "free":
            starts, pivot = np.tile(theta, (bootstrap, 1)), pivot_of(z, w, theta)
            end = polish(z, y_n, draws * w, starts, ceiling, pivot, loss_fn, delta)
            found = end.theta
        else:
            end = fit_line(z, log_y, draws * w, loss_fn, delta)
            found = np.column_stack([end.theta, np.full(bootstrap, fixed)])
        unconverged = int((~end.converged).sum())
        replicates = found

    uncertainty: Interval | None = None
    if loss_fn == "squared" and kind != "free":
        if n == G:
            uncertainty = student_line(a, alpha, fixed, centre, z, residuals, w)
        else:
            uncertainty = cluster_line(a, alpha, fixed, centre, z, residuals, w, codes)
    elif loss_fn == "squared" and n == G:
        uncertainty = profile_interval(z, y_n, w, L_inf, 2 * objective, centre)
    elif replicates is not None and _fitted(kind) < G:
        uncertainty = ReplicateInterval(replicates, residuals, G, kind == "free", centre, seed)

    with np.errstate(over="ignore"):
        params = {"alpha": alpha, "beta": float(np.exp(log_beta))}
    if kind != "none":
        params["offset"] = L_inf
    if replicates is not None:
        r_a, r_alpha, r_offset = replicates.T
        replicates = np.column_stack([r_alpha, r_a / r_alpha - centre, r_offset])
    return PowerLaw(
        x_n, y_n, w, G, kind, params, log_beta, _pearson_above(log_x, y_n, L_inf, w), objective,
        residuals, converged, status, loss_fn, delta, uncertainty, replicates, redrawn,
        unconverged,
    )  # fmt: skip


def _enough(x: Floats, n: int, groups: int, kind: OffsetKind) -> None:
    """Three points (four with a free offset), over two (three) distinct x, in two groups or more."""
    points, distinct = (4, 3) if kind == "free" else (3, 2)
    form = "L = L∞ + (βX)^α" if kind == "free" else "L = (βX)^α"
    if n < points:
        raise DataError(f"{form} needs at least {points} points, got {n}")
    if (have := len(np.unique(x))) < distinct:
        raise DataError(f"{form} needs at least {distinct} distinct x, got {have}")
    if groups < 3:
        raise DataError(f"{form} needs at least 3 independent groups (runs), got {groups}")


def _fitted(kind: OffsetKind) -> int:
    """How many parameters the form has."""
    return 3 if kind == "free" else 2


def _centre(log_x: Floats, w: Floats) -> float:
    return float((w * log_x).sum() / w.sum())


def _pearson(u: Floats, v: Floats, w: Floats) -> float:
    u, v = u - _centre(u, w), v - _centre(v, w)
    scale = np.sqrt((w * u * u).sum() * (w * v * v).sum())
    return float((w * u * v).sum() / scale) if scale > 0 else float("nan")


def _pearson_above(log_x: Floats, y: Floats, offset: float, w: Floats) -> float:
    above = y > offset
    return _pearson(log_x[above], np.log(y[above] - offset), w[above])


def _why_none(law: PowerLaw) -> str:
    if law.replicates is not None:
        return f"{law.groups} independent runs are too few for its parameters"
    return "fit it with bootstrap=4000 (Huber's loss, or a free offset over several points per run)"


def _scientific(log_value: float) -> str:
    """exp(log_value) with three digits, also beyond the range of floats."""
    exponent = int(np.floor(log_value / np.log(10)))
    return f"{np.exp(log_value - exponent * np.log(10)):.3g}e{exponent:+d}"
