"""Damped Newton for many small robust least-squares problems at once.

- Minimises ``Σ_i w_i ρ(r_i(θ))``, the *sum*: a mean shrinks gradients below the usual stopping
  thresholds and optimisers then stop early and call it converged.
- ρ is ``r²/2`` or Huber's (``r²/2`` up to δ, then ``δ(|r| − δ/2)``).
- All problems of a batch advance together: B starts, B bootstrap weightings or B values of a
  profiled parameter are one call. Legend: B problems, n points, P parameters.
- The Hessian is Gauss-Newton's with ρ″, damped by the reweighted one, which is positive
  definite where ρ″ vanishes; a step is taken only where it lowers the objective.
- Box bounds by an active set: a parameter at its bound whose gradient points outwards rests; where
  a step would cross a bound, the others' step is solved for again with the crossing one at its bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.errors import DataError, Floats

LossFn = Literal["squared", "huber"]
Model = Callable[[Floats, np.ndarray], tuple[Floats, Floats]]
"""(theta_BP, which problems) -> residuals_Bn, jacobian_BnP."""

TOLERANCE = 1e-13
"""Converged: the decrease that a full Newton step promises, relative to the objective."""
FLOOR = 1e-20
"""Objectives below this are a fit to ten digits; what is left to gain there is rounding."""


@dataclass(frozen=True)
class Solution:
    """Where a batch ended."""

    theta: Floats
    """(B, P)."""
    objective: Floats
    """(B,) Σ w ρ(r)."""
    decrement: Floats
    """(B,) decrease that a full step still promises, relative to the objective."""
    at_lower: np.ndarray
    """(B, P)."""
    at_upper: np.ndarray

    @property
    def converged(self) -> np.ndarray:
        """Whether the gradient vanishes (in the parameters that do not rest at a bound)."""
        return self.decrement <= 1e-8


def check_loss_fn(loss_fn: str, delta: float) -> None:
    """Raise ``DataError`` for an unknown loss or a δ that is no positive number."""
    if loss_fn not in ("squared", "huber"):
        raise DataError(f"loss_fn: expected 'squared' or 'huber', got {loss_fn!r}")
    if not 0 < delta < np.inf:
        raise DataError(f"delta must be a positive number, got {delta}")


def rho(residual: Floats, loss_fn: LossFn, delta: float) -> tuple[Floats, Floats, Floats, Floats]:
    """ρ, ρ′, ρ″ and the reweighting ρ′/r."""
    if loss_fn == "squared":
        one = np.ones_like(residual)
        return 0.5 * residual**2, residual, one, one
    size = np.abs(residual)
    inside = size <= delta
    value = np.where(inside, 0.5 * residual**2, delta * (size - 0.5 * delta))
    weight = np.where(inside, 1.0, delta / np.maximum(size, delta))
    return value, residual * weight, inside.astype(np.float64), weight


def minimise(
    model: Model,
    theta_BP: Floats,
    weights_Bn: Floats,
    loss_fn: LossFn = "squared",
    delta: float = 1e-3,
    lower_P: Floats | None = None,
    upper_P: Floats | None = None,
    iterations: int = 200,
) -> Solution:
    """Minimise every problem of the batch from its own start.

    Args:
        model: residuals and their Jacobian for the problems asked for.
        theta_BP: starts, inside the bounds.
        weights_Bn: not negative; zero leaves a point out of a problem.
        loss_fn: squared or huber.
        delta: Huber's δ, in the residuals' units.
        lower_P, upper_P: bounds; None for none.
        iterations: at most so many steps.
    """
    B, P = theta_BP.shape
    lower = np.full(P, -np.inf) if lower_P is None else lower_P
    upper = np.full(P, np.inf) if upper_P is None else upper_P
    theta = theta_BP.copy()
    damping = np.full(B, 1e-3)
    objective = np.full(B, np.inf)
    decrement = np.full(B, np.inf)
    active = np.arange(B)
    residual, jacobian = model(theta, active)
    value, slope, curve, weight = rho(residual, loss_fn, delta)
    objective[:] = (weights_Bn * value).sum(1)
    for _ in range(iterations):
        w = weights_Bn[active]
        gradient = np.matmul((w * slope)[:, None, :], jacobian)[:, 0]
        resting = ((theta[active] <= lower) & (gradient > 0)) | ((theta[active] >= upper) & (gradient < 0))
        gradient = np.where(resting, 0.0, gradient)
        newton = _hessian(w * curve, jacobian, resting)
        damper = _hessian(w * weight, jacobian, resting)
        # A flat Huber Hessian is no measure of progress; the reweighted one bounds it from above.
        promised = 0.5 * np.einsum("bp,bp->b", gradient, _solve(damper, gradient))
        decrement[active] = promised / (objective[active] + FLOOR)
        going = decrement[active] > TOLERANCE
        going &= damping[active] < 1e12
        if not going.any():
            break
        chosen = active[going]
        lam = damping[chosen][:, None, None]
        hessian = newton[going] + lam * damper[going]
        step = _solve(hessian, gradient[going])
        trial = np.clip(theta[chosen] - step, lower, upper)
        crossing = trial != theta[chosen] - step
        if crossing.any():
            # The others' share of the step was meant for where the crossing ones would have gone: clipped
            # alone, it need not descend at all, and the descent would crawl along the bound.
            step = _step_to(hessian, gradient[going], crossing, theta[chosen] - trial)
            # Exactly at the bound: θ − (θ − bound) may stop short of it by its last digit.
            trial = np.where(crossing, trial, np.clip(theta[chosen] - step, lower, upper))
        new_residual, new_jacobian = model(trial, chosen)
        new = rho(new_residual, loss_fn, delta)
        new_objective = (weights_Bn[chosen] * new[0]).sum(1)
        better = new_objective < objective[chosen]
        took = chosen[better]
        theta[took], objective[took] = trial[better], new_objective[better]
        damping[took] = np.maximum(damping[took] / 8, 1e-9)
        damping[chosen[~better]] *= 6
        keep = np.flatnonzero(going)
        residual, jacobian = residual[keep], jacobian[keep]
        slope, curve, weight = slope[keep], curve[keep], weight[keep]
        residual[better], jacobian[better] = new_residual[better], new_jacobian[better]
        slope[better], curve[better], weight[better] = new[1][better], new[2][better], new[3][better]
        active = chosen
    return Solution(theta, objective, decrement, theta <= lower, theta >= upper)


def _hessian(weight_Bn: Floats, jacobian_BnP: Floats, resting_BP: np.ndarray) -> Floats:
    hessian: Floats = np.matmul((weight_Bn[:, :, None] * jacobian_BnP).transpose(0, 2, 1), jacobian_BnP)
    if resting_BP.any():
        moving = ~resting_BP
        hessian = hessian * (moving[:, :, None] & moving[:, None, :])
        hessian = hessian + np.einsum("bp,pq->bpq", resting_BP, np.eye(resting_BP.shape[1]))
    return hessian


def _step_to(hessian_BPP: Floats, gradient_BP: Floats, held_BP: np.ndarray, held_step_BP: Floats) -> Floats:
    """The Newton step of the other parameters, given the ``held`` ones' own."""
    fixed = np.where(held_BP, held_step_BP, 0.0)
    rest = np.where(held_BP, fixed, gradient_BP - np.einsum("bpq,bq->bp", hessian_BPP, fixed))
    free = ~held_BP
    hessian = hessian_BPP * (free[:, :, None] & free[:, None, :])
    hessian = hessian + np.einsum("bp,pq->bpq", held_BP, np.eye(held_BP.shape[1]))
    return _solve(hessian, rest)


def _solve(hessian_BPP: Floats, gradient_BP: Floats) -> Floats:
    """H⁻¹g, scaled to a unit diagonal first; singular directions get no step."""
    scale = np.sqrt(np.einsum("bpp->bp", hessian_BPP))
    scale = np.where(scale > 0, scale, 1.0)
    scaled = hessian_BPP / (scale[:, :, None] * scale[:, None, :])
    scaled = scaled + 1e-14 * np.eye(scale.shape[1])
    return np.asarray(np.linalg.solve(scaled, (gradient_BP / scale)[..., None])[..., 0] / scale)


def inverse(information: Floats) -> Floats:
    """Of symmetric matrices (…, P, P), scaled to a unit diagonal first.

    Coordinates differ by orders of magnitude, and a law that falls only before its second point is
    nearly singular.
    """
    scale = np.sqrt(np.einsum("...pp->...p", information)) + np.finfo(np.float64).tiny
    outer = scale[..., :, None] * scale[..., None, :]
    scaled = information / outer + 1e-14 * np.eye(scale.shape[-1])
    return np.asarray(np.linalg.inv(scaled) / outer)
