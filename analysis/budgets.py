"""Points grouped into compute budgets, and the lowest point of each (see ``analysis.isoflop``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.bootstrap import group_codes
from analysis.errors import DataError, Floats, rows
from analysis.valleys import LEAST, Akima, Parabola, ValleyMethod, fit_valley, places


class Surface(Protocol):
    """A loss for every N and D, such as ``fit_parametric`` returns."""

    def value(self, params: ArrayLike, tokens: ArrayLike) -> Floats:
        """L(N, D)."""


@dataclass(frozen=True, eq=False)
class Budget:
    """The points of one C and their lowest point."""

    flops: float
    """Geometric mean of its points' C."""
    spread: float
    """max C / min C − 1."""
    index: NDArray[np.int64]
    """Its rows in the data given."""
    distinct: int
    """How many N, those within 5 % of one another counted once."""
    curve: Parabola | Akima | None
    params: float
    """N of the lowest point, accepted or not; NaN if there is none."""
    tokens: float
    loss: float
    slope: float
    """d log D / d log N along the budget: −1 where C = kND."""
    reason: str
    """Why it was rejected; empty if accepted."""

    @property
    def accepted(self) -> bool:
        return not self.reason


def group_budgets(C: Floats, tolerance: float, labels: ArrayLike | None) -> tuple[NDArray[np.int64], str]:
    """Budget number of each point, and the rule in words."""
    if labels is not None:
        codes = group_codes(labels, len(C))
        return codes, f"{codes.max(initial=-1) + 1} budgets as labelled"
    if not 0 <= tolerance < 1:
        raise DataError(f"tolerance must lie in [0, 1), got {tolerance}")
    order = np.argsort(C, kind="stable")
    log_c = np.log(C[order])
    step = np.log1p(tolerance) + 1e-12
    codes = np.empty(len(C), np.int64)
    codes[order] = np.cumsum(np.append(0, np.diff(log_c) > step))[: len(C)]
    for k in range(int(codes.max(initial=-1)) + 1):
        part = C[codes == k]
        if np.log(part.max() / part.min()) > step:
            raise DataError(
                f"budgets run into one another: {rows(codes == k)} reach from C = {part.min():.4g} to "
                f"{part.max():.4g} in steps within {tolerance:.3g}; "
                "pass budget= labels or another tolerance (on the command line --budget, --tolerance)"
            )
    return codes, f"{codes.max(initial=-1) + 1} budgets, C within {tolerance:.3g} of one another"


def lowest(
    index: NDArray[np.int64], N: Floats, D: Floats, L: Floats, C: Floats, method: ValleyMethod
) -> Budget:
    log_n, log_c = np.log(N[index]), np.log(C[index])
    flops, spread = float(np.exp(log_c.mean())), float(np.exp(np.ptp(log_c)) - 1)
    curve = fit_valley(log_n, L[index], method)
    distinct = int(places(log_n).max()) + 1
    nothing = float("nan")
    if curve is None:
        reason = f"{distinct} distinct N (those within 5 % are one), the {method} needs {LEAST[method]}"
        return Budget(flops, spread, index, distinct, None, nothing, nothing, nothing, nothing, reason)
    if curve.reason:
        return Budget(flops, spread, index, distinct, curve, nothing, nothing, nothing, nothing, curve.reason)
    at = curve.log_n
    params = float(np.exp(min(at, 700.0)))
    reason = ""
    if not log_n.min() <= at <= log_n.max():
        end, side = (log_n.min(), "below") if at < log_n.min() else (log_n.max(), "above")
        reason = f"minimum at N = {params:.3g}, {side} the sampled {np.exp(end):.3g}"
    elif curve.value(np.array(at)) <= 0:
        reason = "the parabola's lowest loss is not positive"
    per = _per_token(log_n, log_c - np.log(D[index]))
    tokens = float(np.exp(np.clip(log_c.mean() - at - float(per(at)), -700, 700)))
    loss, slope = float(curve.value(np.array(at))), -1 - float(per.deriv()(at))
    return Budget(flops, spread, index, distinct, curve, params, tokens, loss, slope, reason)


def _per_token(log_n: Floats, log_c_d: Floats) -> np.polynomial.Polynomial:
    """log of the FLOPs per parameter and token over log N: a line, for they change slowly if at all."""
    return np.polynomial.Polynomial.fit(log_n, log_c_d - log_n, 1)


def lowest_of_surface(b: Budget, N: Floats, D: Floats, C: Floats, surface: Surface) -> tuple[float, float]:
    """N and D of the surface's lowest loss at the budget's C."""
    from scipy.optimize import minimize_scalar

    log_n = np.log(N[b.index])
    per = _per_token(log_n, np.log(C[b.index] / D[b.index]))

    def tokens(at: float) -> float:
        return float(np.exp(np.log(b.flops) - at - float(per(at))))

    def height(at: float) -> float:
        return float(np.asarray(surface.value(np.array([np.exp(at)]), np.array([tokens(at)]))).ravel()[0])

    middle, reach = np.log(b.params), 3 * np.log(10)
    at = float(
        minimize_scalar(
            height, bounds=(middle - reach, middle + reach), method="bounded", options={"xatol": 1e-8}
        ).x
    )
    return float(np.exp(at)), tokens(at)
