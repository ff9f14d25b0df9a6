"""Fitting the loss surface: variable projection for starts, a batched damped Newton from the best of them.

- Residual ``log L̂ − log L``; Huber's loss or squares, summed (a mean stops optimisers early:
  Hoffmann's published exponents).
- For given α and β the surface is linear in E, A and B: a 14 × 14 grid of exponents is solved at
  once (weights 1/L², the first step towards the log residual), and the best few and some spread-out
  ones start Newton. The best end is taken; the gradient and the agreement of starts judge it.
- Replicates are weights on the same points, start at the fit and advance together in blocks that fit
  the cache; ``benchmarks/fits.py`` holds them to many starts each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.errors import Floats
from analysis.solver import LossFn, Model, Solution, minimise
from analysis.surface import EXPONENTS, HALF_LIVES, Surface, saturating

AGREE = 1e-6
"""Ends within this share of the best objective are the same optimum."""
ENOUGH = 4
"""So many agreeing starts leave no doubt, and the rest are not followed to their ends."""
SHORT, LONG = 30, 400
"""Newton steps of every start, and of those followed to the end."""
BLOCK = 100
"""Replicates that advance together."""
GRID = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.4, 2.0])
"""Exponents at which the linear part is solved."""
FIRST_HALF_LIVES = (15.4, 5.3)
"""R_D and R_N as Muennighoff et al. found them."""


@dataclass(frozen=True, eq=False)
class Points:
    """The data as logs: all (n,)."""

    log_params: Floats
    log_tokens: Floats
    log_unique: Floats | None
    log_loss: Floats


def residual_model(surface: Surface, points: Points) -> Model:
    """Residuals and Jacobian for the solver."""

    def model(theta_BP: Floats, _: np.ndarray) -> tuple[Floats, Floats]:
        value, jacobian = surface.with_jacobian(
            theta_BP, points.log_params, points.log_tokens, points.log_unique
        )
        return value - points.log_loss, jacobian

    return model


def descend(
    surface: Surface,
    points: Points,
    theta_BP: Floats,
    w_Bn: Floats,
    loss_fn: LossFn,
    delta: float,
    iterations: int = 200,
) -> Solution:
    """Newton from the given starts."""
    lower, upper = surface.lower, surface.upper
    start = np.clip(theta_BP, lower, upper)
    return minimise(residual_model(surface, points), start, w_Bn, loss_fn, delta, lower, upper, iterations)


def projected(surface: Surface, points: Points, w: Floats) -> Floats:
    """Starts from the grid of exponents, best first: (S, P)."""
    K = len(GRID)
    v = points.log_tokens
    if surface.repeats and points.log_unique is not None:
        v = saturating(v, np.minimum(points.log_unique, v), np.array(FIRST_HALF_LIVES[0]))[0]
    u = points.log_params - surface.centre_params
    v = v - surface.centre_tokens
    # All 2K + 1 columns once; a grid point's normal equations are entries of one Gram matrix.
    columns = np.exp(-np.concatenate([np.zeros((1, len(u))), GRID[:, None] * u, GRID[:, None] * v]))
    columns *= np.exp(-points.log_loss) * np.sqrt(w)
    gram, target = columns @ columns.T, columns @ np.sqrt(w)
    i, j = (g.ravel() for g in np.meshgrid(np.arange(K), np.arange(K), indexing="ij"))
    which = np.stack([np.zeros_like(i), 1 + i, 1 + K + j], 1)
    best = np.full(K * K, np.inf)
    level = np.zeros((K * K, 3))
    # Not-negative least squares over three columns: every subset that keeps a term of N or of D.
    for chosen in ([0, 1, 2], [1, 2], [0, 1], [0, 2]):
        at = which[:, chosen]
        normal, right = gram[at[:, :, None], at[:, None, :]], target[at]
        scale = np.sqrt(np.einsum("spp->sp", normal))
        normal = normal / (scale[:, :, None] * scale[:, None, :]) + 1e-12 * np.eye(len(chosen))
        solved = np.linalg.solve(normal, (right / scale)[..., None])[..., 0] / scale
        squares = w.sum() - (right * solved).sum(1)
        good = (solved >= 0).all(1) & (squares < best)
        best[good] = squares[good]
        level[good] = 0.0
        level[np.ix_(good, chosen)] = solved[good]
    found = np.column_stack([level, GRID[i], GRID[j], np.tile(np.log(FIRST_HALF_LIVES), (K * K, 1))])
    found[:, 1:3] = np.log(np.maximum(level[:, 1:], 1e-3 * surface.scale))
    usable = np.argsort(best, kind="stable")[: int(np.isfinite(best).sum())]
    return found[usable, : surface.size]


def starts(surface: Surface, points: Points, w: Floats, count: int = 10) -> Floats:
    """Best grid points, and others spread over the grid's better half; repetition at three half-lives."""
    usable = projected(surface, points, w)
    spread = np.linspace(4, max(5, len(usable) // 2), count - 4).astype(int)
    chosen = usable[np.unique(np.concatenate([np.arange(4), spread]).clip(max=len(usable) - 1))]
    if not surface.repeats:
        return chosen
    half = [np.log(h) for h in (1.0, 5.0, 30.0)]
    copies = np.repeat(chosen, len(half), axis=0)
    copies[:, 5] = np.tile(half, len(chosen))
    return copies


@dataclass(frozen=True, eq=False)
class Fitted:
    """Where the fit ended."""

    theta: Floats
    """(P,) working coordinates."""
    objective: float
    converged: bool
    floorless: bool
    """E rests at 0 and all else is determined: intervals still hold."""
    status: str


def fit_surface(surface: Surface, points: Points, w: Floats, loss_fn: LossFn, delta: float) -> Fitted:
    """The best of many starts, and what to think of it."""
    begin = starts(surface, points, w)
    w_Sn = np.broadcast_to(w, (len(begin), len(w)))
    short = descend(surface, points, begin, w_Sn, loss_fn, delta, iterations=SHORT)
    # Stragglers go on only when the others leave the optimum in doubt.
    first = short.objective.min()
    if (short.objective <= first * (1 + AGREE) + 1e-20).sum() >= ENOUGH:
        rows = np.argsort(short.objective)[:1]
    else:
        rows = np.arange(len(begin))
    end = descend(surface, points, short.theta[rows], w_Sn[rows], loss_fn, delta, iterations=LONG)
    best = int(np.argmin(end.objective))
    objective, theta = float(end.objective[best]), end.theta[best]
    reached = short.objective.copy()
    reached[rows] = end.objective
    agree = int((reached <= objective * (1 + AGREE) + 1e-20).sum())
    undetermined = _undetermined(surface, theta)
    floorless = bool(theta[0] <= 0) and not undetermined and bool(end.converged[best])
    converged = False
    if not end.converged[best]:
        status = "not converged: the gradient does not vanish at the best point found"
    elif undetermined:
        status = undetermined
    elif floorless:
        status = "no floor found: the best E rests at its lower bound 0"
    elif agree < 2:
        status = f"not converged: only 1 of {len(begin)} starts reached the best value"
    else:
        converged = True
        status = f"converged ({agree} of {len(begin)} starts agree{_half_life_note(surface, theta)})"
    return Fitted(theta, objective, converged, floorless, status)


def _undetermined(surface: Surface, theta: Floats) -> str:
    """Which exponent or half-life the data leave open; empty if none."""
    lower, upper = surface.lower, surface.upper
    for level, exponent, name in ((1, 3, "alpha"), (2, 4, "beta")):
        if not lower[level] < theta[level] < upper[level]:
            return f"{name} is undetermined: its term rests at a bound, the loss does not follow it"
        if not EXPONENTS[0] < theta[exponent] < EXPONENTS[1]:
            return f"{name} is undetermined: it rests at its bound {theta[exponent]:g}"
    if surface.repeats and theta[5] <= lower[5]:
        return f"R_D is undetermined: it rests at its lower bound {HALF_LIVES[0]:g}"
    return ""


def _half_life_note(surface: Surface, theta: Floats) -> str:
    """Half-lives that the data do not pin down."""
    notes = []
    for p, name, what in ((5, "R_D", "repeated tokens"), (6, "R_N", "excess parameters")):
        if p < surface.size and theta[p] >= np.log(HALF_LIVES[1]):
            notes.append(f"; {name} is undetermined at its upper bound: {what} count in full")
        elif p < surface.size and theta[p] <= np.log(HALF_LIVES[0]):
            notes.append(f"; {name} is undetermined at its lower bound: {what} count for nothing")
    return "".join(notes)


def refit(
    surface: Surface, points: Points, theta_P: Floats, w_Rn: Floats, loss_fn: LossFn, delta: float
) -> tuple[Floats, int]:
    """All replicates' θ (R, P) and how many did not converge."""
    found = np.empty((len(w_Rn), surface.size))
    unconverged = 0
    for first in range(0, len(w_Rn), BLOCK):
        w = w_Rn[first : first + BLOCK]
        end = descend(surface, points, np.tile(theta_P, (len(w), 1)), w, loss_fn, delta)
        found[first : first + len(w)] = end.theta
        unconverged += int((~end.converged).sum())
    return found, unconverged
