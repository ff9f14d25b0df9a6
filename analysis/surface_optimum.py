"""Which N and D a budget C should buy under a loss surface.

- ``C = 6·N·D``: in closed form, ``αA/N^α = βB/D^β``, so ``N = G(C/6)^a`` with ``a = β/(α + β)`` and
  ``G = (αA/βB)^(1/(α + β))`` (Hoffmann et al. 2022, eq. 4).
- Any other cost per token, or repeated data: one-dimensional minimisation over log N, a grid first,
  since nothing promises a single valley, then golden sections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.errors import DataError, Floats
from analysis.surface import Surface

FlopsPerToken = Callable[[Floats], Floats]
"""N -> training FLOPs per token, elementwise."""
GOLDEN = (np.sqrt(5) - 1) / 2
REACH = np.log(1e6)
"""The search spans this far on either side of the closed form's N."""


@dataclass(frozen=True, eq=False)
class Optimum:
    """What to train for ``flops``: arrays like ``flops``, or plain numbers."""

    flops: Floats
    params: Floats
    """N."""
    tokens: Floats
    """D."""
    loss: Floats
    """L there, in nats per token as the data."""


@dataclass(frozen=True)
class OptimumInterval:
    """(low, high) of each, arrays like ``flops``."""

    params: tuple[Floats, Floats]
    tokens: tuple[Floats, Floats]
    loss: tuple[Floats, Floats]


def closed_form(surface: Surface, theta_BP: Floats, log_C: Floats) -> Floats:
    """log N that is best for log C (B,) at 6 FLOPs per parameter and token."""
    natural = surface.natural(theta_BP)
    log_A, log_B, alpha, beta = natural[:, 1], natural[:, 2], natural[:, 3], natural[:, 4]
    return np.asarray((np.log(alpha / beta) + log_A - log_B + beta * (log_C - np.log(6))) / (alpha + beta))


def best_log_params(
    surface: Surface,
    theta_BP: Floats,
    log_C: Floats,
    flops_per_token: FlopsPerToken | None,
    log_unique: Floats | None,
) -> tuple[Floats, Floats]:
    """log N and log D that minimise the loss for log C (B,).

    Raises:
        DataError: the cost per token is not positive, or the best N lies outside the search.
    """
    start = closed_form(surface, theta_BP, log_C)
    if flops_per_token is None and (log_unique is None or not surface.repeats):
        return start, log_C - np.log(6) - start

    def tokens(u: Floats) -> Floats:
        cost = 6 * np.exp(u) if flops_per_token is None else np.asarray(flops_per_token(np.exp(u)), float)
        if not (cost > 0).all():
            raise DataError("flops_per_token: expected positive FLOPs per token for every N")
        return np.asarray(log_C[:, None] - np.log(cost))

    def loss(u: Floats) -> Floats:
        unique = None if log_unique is None else log_unique[:, None]
        return surface.log_loss(theta_BP, u, tokens(u), unique)

    grid = start[:, None] + np.linspace(-REACH, REACH, 240)
    middle = np.argmin(loss(grid), axis=1)
    if ((middle == 0) | (middle == grid.shape[1] - 1)).any():
        raise DataError("no optimal N within a factor 1e6 of that for 6·N·D; check flops_per_token")
    rows = np.arange(len(grid))
    low, high = grid[rows, middle - 1], grid[rows, middle + 1]
    # Golden sections stop where rounding hides the valley; a parabola through the last ends finishes.
    for _ in range(16):
        one, two = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        values = loss(np.stack([one, two], 1))
        left = values[:, 0] <= values[:, 1]
        low, high = np.where(left, low, one), np.where(left, two, high)
    centre, h = (low + high) / 2, 3e-3
    down, here, up = loss(centre[:, None] + h * np.array([-1.0, 0.0, 1.0])).T
    bend = np.maximum(down - 2 * here + up, 1e-300)
    best = centre + np.clip(0.5 * h * (down - up) / bend, -h, h)
    return best, tokens(best[:, None])[:, 0]
