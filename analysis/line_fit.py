"""The descents behind ``analysis.powerlaw``: a line in log space, alone or above a free offset.

The law is ``log L = a + α·z`` or ``log L = log(L∞ + exp(a + α·z))`` with ``z = log X − centre``.
Legend: B problems of a batch (starts, resamples), S values of L∞, n points, P parameters.

- Variable projection: the line is solved for at 120 values of L∞; the best of them and spread-out
  others start a damped Newton in all three parameters (``polish``), and the ends must agree.
- The Newton works in level, slope and curvature at a pivot where the law still falls: in
  (a, α, L∞), or with the pivot on the floor, the same descent crawls along a bent valley.
"""

from __future__ import annotations

import numpy as np

from analysis.errors import Floats
from analysis.intervals import ProfileInterval
from analysis.solver import LossFn, Model, Solution, inverse, minimise

NEAREST = 1e-6
"""L∞ keeps this share of its upper bound away from it."""


def least_squares_line(z: Floats, v_Bn: Floats, w_Bn: Floats) -> Floats:
    """Weighted least squares of v on (1, z): (B, 2), in closed form."""
    total = w_Bn.sum(1)
    mean_z = (w_Bn * z).sum(1) / total
    mean_v = (w_Bn * v_Bn).sum(1) / total
    dz = z - mean_z[:, None]
    alpha = (w_Bn * dz * (v_Bn - mean_v[:, None])).sum(1) / (w_Bn * dz**2).sum(1)
    return np.column_stack([mean_v - alpha * mean_z, alpha])


def fit_line(z: Floats, v: Floats, w_Bn: Floats, loss_fn: LossFn, delta: float) -> Solution:
    B = len(w_Bn)
    X = np.stack([np.ones_like(z), z], 1)
    start = least_squares_line(z, np.broadcast_to(v, w_Bn.shape), w_Bn)
    if loss_fn == "squared":
        r = start @ X.T - v
        no = np.zeros((B, 2), bool)
        return Solution(start, 0.5 * (w_Bn * r**2).sum(1), np.zeros(B), no, no)

    def model(theta_BP: Floats, _: np.ndarray) -> tuple[Floats, Floats]:
        return theta_BP @ X.T - v, np.broadcast_to(X, (len(theta_BP), *X.shape))

    return minimise(model, start, w_Bn, loss_fn, delta)


def at_offsets(z: Floats, y: Floats, w: Floats, offset_S: Floats, loss_fn: LossFn, delta: float) -> Solution:
    """The line (a, α) at each given L∞, minimising the loss of log L."""
    log_y = np.log(y)
    w_Sn = np.broadcast_to(w, (len(offset_S), len(z)))
    # Weights gap²/y² make this start the first Newton step on log L; points at or below L∞, where
    # the line has no logarithm, weigh next to nothing.
    gap = np.maximum(y - offset_S[:, None], NEAREST * y)
    start = least_squares_line(z, np.log(gap), w_Sn * (gap / y) ** 2)

    def model(theta_BP: Floats, which: np.ndarray) -> tuple[Floats, Floats]:
        rising = np.exp(np.clip(theta_BP[:, :1] + theta_BP[:, 1:2] * z, -500, 500))
        L = offset_S[which, None] + rising
        share = rising / L
        return np.log(L) - log_y, np.stack([share, share * z], 2)

    return minimise(model, start, w_Sn, loss_fn, delta)


def offset_model(z: Floats, log_y: Floats, ceiling: float) -> Model:
    """Residuals and Jacobian of the offset form in ``(c, g, v)``, in which its valley is straight.

    c is log L and g is d log L/dz, both at the pivot z = 0, which the data pin down on their own; v =
    log(1 − L∞/ceiling) is the curvature alone (expected-value parameters: Ross 1990, "Nonlinear
    estimation"). In (a, α, L∞) the same descent crawls along a bent valley and stops short.
    """

    def model(theta: Floats, _: np.ndarray) -> tuple[Floats, Floats]:
        level, g, v = np.exp(theta[:, :1]), theta[:, 1:2], theta[:, 2:]
        E = -ceiling * np.expm1(v)
        R = _reducible(level, E)
        h = np.exp(np.clip(g * level / R * z, -300, 300))
        L = E + R * h
        d_c = level * h - h * z * g * level * E / R
        d_E = 1 - h + h * z * g * level / R
        J = np.stack([d_c, level * h * z, d_E * (E - ceiling)], 2)
        return np.log(L) - log_y, J / L[:, :, None]

    return model


def _reducible(level: Floats, E: Floats) -> Floats:
    """L − L∞, kept positive where a trial step has L∞ above L."""
    return np.maximum(level - E, 1e-12 * level)


def ceiling_of(y: Floats, w: Floats, objective: float, loss_fn: LossFn, delta: float) -> float:
    """An L∞ that no fit with this objective or a lower one can reach.

    L̂ > L∞, so w ρ(log L∞ − log y) of any one point below L∞ is less than the objective. Never
    above the weighted geometric mean, where the law is a constant.
    """
    one = objective / w
    residual = np.sqrt(2 * one)
    if loss_fn == "huber":
        residual = np.where(residual <= delta, residual, one / delta + delta / 2)
    return float(np.exp(min((np.log(y) + residual).min(), (w * np.log(y)).sum() / w.sum())))


def pivot_of(z: Floats, w: Floats, theta: Floats) -> float:
    """The z at which level and slope say most and agree least: the mean of z where the law still falls.

    A steep law has reached its floor at the centre of the data, where its slope says nothing.
    """
    a, alpha, E = theta
    rising = np.exp(np.clip(a + alpha * z, -300, 300))
    info = w * (rising / (E + rising)) ** 2
    return float((info * z).sum() / info.sum())


def polish(
    z: Floats, y: Floats, w_Bn: Floats, theta_BP: Floats, ceiling: float, pivot: float,
    loss_fn: LossFn, delta: float,
) -> Solution:  # fmt: skip
    """All of (a, α, L∞) from the given starts, L∞ in [0, ceiling)."""
    a, alpha, E = theta_BP.T
    a, z = a + alpha * pivot, z - pivot
    level = E + np.exp(a)
    start = np.column_stack([np.log(level), alpha * (1 - E / level), np.log1p(-E / ceiling)])
    # L at the centre of the data is within e^±10 of the data; a trial step beyond would only overflow.
    log_y = np.log(y)
    lower = np.array([log_y.min() - 10, -np.inf, np.log(NEAREST)])
    upper = np.array([log_y.max() + 10, np.inf, 0.0])
    model = offset_model(z, log_y, ceiling)
    end = minimise(model, np.clip(start, lower, upper), w_Bn, loss_fn, delta, lower, upper)
    c, g, v = end.theta.T
    level, E = np.exp(c), -ceiling * np.expm1(v)
    R = _reducible(level, E)
    alpha = g * level / R
    theta = np.column_stack([np.log(R) - alpha * pivot, alpha, E])
    return Solution(theta, end.objective, end.decrement, end.at_upper, end.at_lower)


def fit_offset(
    z: Floats, y: Floats, w: Floats, loss_fn: LossFn, delta: float
) -> tuple[Floats, float, bool, str, float]:
    """Variable projection over L∞, then Newton from eight starts.

    Returns θ, objective, converged, status, and the upper bound that L∞ had.
    """
    shares = np.append(1 - np.geomspace(NEAREST, 1.0, 119), 0.0)
    below = at_offsets(z, y, w, shares * y.min(), loss_fn, delta)
    # Four times the objective: twice the residual, so that resamples are not cut either.
    ceiling = ceiling_of(y, w, 4 * float(below.objective.min()), loss_fn, delta)
    grid = shares * ceiling
    line = at_offsets(z, y, w, grid, loss_fn, delta)
    order = np.argsort(line.objective, kind="stable")
    # Spread starts from far enough below the bound to 0; nearer to it the descent only crawls.
    chosen = np.unique(
        np.concatenate([order[:2], np.linspace(len(grid) * 2 // 3, len(grid) - 1, 6).astype(int)])
    )
    starts = np.column_stack([line.theta[chosen], grid[chosen]])
    w_Bn = np.broadcast_to(w, (len(chosen), len(z)))
    pivot = pivot_of(z, w, np.append(line.theta[order[0]], grid[order[0]]))
    end = polish(z, y, w_Bn, starts, ceiling, pivot, loss_fn, delta)
    best = int(np.argmin(end.objective))
    objective = float(end.objective[best])
    agree = int((end.objective <= objective * (1 + 1e-6) + 1e-20).sum())
    theta = end.theta[best]
    converged = False
    # Where the gradient vanishes in rounding alone depends on the processor: an exponent so steep is none.
    if _one_step(z, theta, 1e-9 if end.converged[best] else 1e-3):
        status = "exponent not determined: the loss falls before the second x and rests on its floor after"
    elif not end.converged[best]:
        status = "not converged: the gradient does not vanish at the best point found"
    elif end.at_lower[best, 2]:
        status = "no offset found: the best L∞ rests at its lower bound 0"
    elif end.at_upper[best, 2]:
        status = "no offset found: L∞ runs into its upper bound, beyond the smallest loss"
    elif agree < 2:
        status = f"not converged: only 1 of {len(chosen)} starts reached the best value"
    else:
        converged, status = True, f"converged ({agree} of {len(chosen)} starts agree)"
    return theta, objective, converged, status, ceiling


def _one_step(z: Floats, theta: Floats, share: float) -> bool:
    """Whether only the point at one end lies off the floor, so that any steeper law fits as well.

    Args:
        share: what the second point may have left of the first one's height above the floor.
    """
    alpha = theta[1]
    ends = np.unique(z)[[0, 1, -2, -1]] * alpha
    first, second = (ends[0], ends[1]) if alpha < 0 else (ends[3], ends[2])
    return bool(second - first < np.log(share))


def profile_interval(
    z: Floats, y: Floats, w: Floats, best: float, rss: float, centre: float
) -> ProfileInterval:
    def profile(offset_S: Floats) -> tuple[Floats, Floats, Floats]:
        line = at_offsets(z, y, w, offset_S, "squared", 1.0)
        share = 1 - offset_S[:, None] / (
            offset_S[:, None] + np.exp(line.theta @ np.stack([np.ones_like(z), z]))
        )
        J = np.stack([share, share * z], 2)
        information = np.einsum("n,snp,snq->spq", w, J, J)
        return 2 * line.objective, line.theta, inverse(information)

    def ceiling(rss: float) -> float:
        return ceiling_of(y, w, rss / 2, "squared", 1.0)

    return ProfileInterval(profile, best, ceiling, rss, len(z), centre)
