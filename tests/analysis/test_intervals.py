"""Intervals against the same numbers worked out another way: whole matrices, roots, nested searches."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import fractional_matrix_power
from scipy.optimize import brentq, least_squares
from scipy.stats import t

from analysis import PowerLaw, fit_power_law
from analysis.errors import Floats

N = 73728.0 * np.arange(1, 9) ** 3.0


def cr2(X: Floats, e: Floats, groups: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """CR2's covariance and the n×n matrices of Satterthwaite's freedom, from their definitions."""
    n = len(X)
    bread = np.linalg.inv(X.T @ X)
    I_H = np.eye(n) - X @ bread @ X.T
    meat = np.zeros((2, 2))
    columns = []
    for g in np.unique(groups):
        rows = np.flatnonzero(groups == g)
        A = np.real(fractional_matrix_power(I_H[np.ix_(rows, rows)], -0.5))
        score = X[rows].T @ A @ e[rows]
        meat += np.outer(score, score)
        columns.append(I_H[:, rows] @ A @ X[rows] @ bread)
    return bread @ meat @ bread, np.stack(columns)


def freedom(columns: Floats, contrast: Floats) -> float:
    """Tr(Ω)²/Tr(Ω²) of Ω = GᵀG, under independent errors (Bell and McCaffrey 2002)."""
    G = columns @ contrast
    omega = G @ G.T
    return float(np.trace(omega) ** 2 / np.trace(omega @ omega))


def fieller_roots(a: float, alpha: float, cov: Floats, q: float) -> Floats:
    """The b at which (a − bα)² = q·var(a − bα)."""
    square = [alpha**2 - q * cov[1, 1], -2 * (a * alpha - q * cov[0, 1]), a**2 - q * cov[0, 0]]
    return np.sort(np.roots(square).real)


def test_cr2_satterthwaite_and_fieller_by_whole_matrices() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(5, dtype=np.int64), [2, 4, 3, 5, 2])
    x = np.exp(rng.uniform(10, 20, len(groups)))
    y = x**-0.2 * np.exp(0.05 * rng.normal(size=5)[groups] + 0.02 * rng.normal(size=len(groups)))
    z = np.log(x) - np.log(x).mean()
    X = np.stack([np.ones_like(z), z], 1)
    (a, alpha), *_ = np.linalg.lstsq(X, np.log(y))
    cov, columns = cr2(X, a + alpha * z - np.log(y), groups)
    found = fit_power_law(x, y, groups=groups).interval()

    half = t.ppf(0.975, freedom(columns, np.array([0.0, 1.0]))) * np.sqrt(cov[1, 1])
    assert found["alpha"] == pytest.approx((alpha - half, alpha + half), rel=1e-9)
    q = t.ppf(0.975, freedom(columns, np.array([1.0, -a / alpha]))) ** 2
    expected = fieller_roots(a, alpha, cov, q) - np.log(x).mean()
    assert found["log_beta"] == pytest.approx(tuple(expected), rel=1e-9)


def test_fieller_of_independent_points_by_roots() -> None:
    y = 5 * N**-0.1 * np.exp(0.02 * np.cos(5 * np.arange(8)))
    u = np.log(N)
    (slope, level), cov = np.polyfit(u, np.log(y), 1, cov=True)
    expected = fieller_roots(level, slope, cov[::-1, ::-1], t.ppf(0.975, 6) ** 2)
    assert fit_power_law(N, y).interval()["log_beta"] == pytest.approx(tuple(expected), rel=1e-7)


def profile_ends(law: PowerLaw, fixed: str, best: float, far: tuple[float, float]) -> tuple[float, float]:
    """Where the RSS with one parameter fixed and the other two searched passes RSS(1 + t²/(n − 3))."""
    u, log_y = np.log(law.x / law.x[0]), np.log(law.y)
    n = len(u)
    scale = 1 / np.sqrt(2 * law.objective)
    allowed = 1 + t.ppf(0.975, n - 3) ** 2 / (n - 3)
    amplitude = float(np.exp(law.alpha * (law.log_beta + np.log(law.x[0]))))
    # L∞ as its distance from the best, in units of what lies above it.
    start = {"alpha": law.alpha, "log_amplitude": np.log(amplitude), "lift": 0.0}

    def excess(value: float) -> float:
        free = [k for k in start if k != fixed]

        def residuals(theta: Floats) -> Floats:
            p = dict(zip(free, theta, strict=True)) | {fixed: value}
            L = law.offset + amplitude * p["lift"] + np.exp(p["log_amplitude"] + p["alpha"] * u)
            return np.asarray((np.log(np.maximum(L, 1e-9)) - log_y) * scale)

        tries = [
            least_squares(residuals, [start[k] * f for k in free], xtol=1e-14, ftol=1e-14, gtol=1e-14)
            for f in (1.0, 0.7, 1.4)
        ]
        return 2 * min(float(r.cost) for r in tries) - allowed

    return float(brentq(excess, far[0], best, rtol=1e-6)), float(brentq(excess, best, far[1], rtol=1e-6))


@pytest.mark.parametrize(
    ("offset", "amplitude", "alpha", "noise"),
    [(2.0, 1.5, -0.3, 3e-4), (0.95, 0.95e-4, -0.3, 1e-6), (2.0, 1.5, -0.9, 2e-3)],
    ids=["ordinary", "floor within 1e-4 of the smallest value", "floor reached"],
)
def test_profile_interval_by_nested_searches(
    offset: float, amplitude: float, alpha: float, noise: float
) -> None:
    z = np.random.default_rng(4).normal(size=8)
    law = fit_power_law(N, (offset + amplitude * (N / N[0]) ** alpha) * np.exp(noise * z), offset=True)
    found = law.interval()
    scale = float(np.exp(law.alpha * (law.log_beta + np.log(N[0]))))
    lifts = profile_ends(law, "lift", 0.0, (-0.9, 0.2))
    ours = [(bound - law.offset) / scale for bound in found["offset"]]
    assert ours == pytest.approx(lifts, rel=0.02)
    ends = profile_ends(law, "alpha", law.alpha, (law.alpha * 3, law.alpha * 0.2))
    width = ends[1] - ends[0]
    assert found["alpha"] == pytest.approx(ends, abs=0.03 * width)
