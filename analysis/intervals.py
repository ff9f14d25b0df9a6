"""Three ways to an interval, by what the data allow. Which one was used is part of every result.

The law is a line in log space, ``a + α·z`` with ``z = log X − centre``, above an offset
``E = L∞`` that is absent, fixed, or free.

- ``LineInterval``: least squares without a free offset. Student's t with n − 2 degrees of
  freedom, exact for independent normal errors, when every run gives one point. When runs give
  several, the bias-reduced cluster covariance CR2 with Satterthwaite's degrees of freedom (Bell
  and McCaffrey 2002; Pustejovsky and Tipton 2018). A percentile bootstrap of five runs covers
  far less than it says; this does not (``benchmarks/coverage.py``).
- ``ProfileInterval``: free offset, one point per run. Profile likelihood over L∞ (Bates and
  Watts 1988, ch. 6): at each L∞ the line is nearly linear, so the region ``RSS ≤ s²(n − 3 + t²)``
  is cut into ellipses and any quantity's interval is the union of its range over them. It is
  lopsided where the data are, and reaches the bound L∞ = 0 when they do not exclude it.
- ``ReplicateInterval``: Huber's loss, or a free offset with several points per run. Expanded
  percentiles of bootstrap replicates over runs (``analysis.bootstrap``), refused where there are
  too few replicates to resolve them: of five runs always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from analysis.bootstrap import expanded_percentile, unresolved
from analysis.errors import Floats

Bounds = tuple[Floats, Floats]


class Interval(Protocol):
    """What a law needs from its uncertainty. All logs are natural."""

    @property
    def method(self) -> str:
        """The method in words."""

    def refusal(self, level: float) -> str:
        """Why there is none at this level; empty if there is one."""

    def params(self, level: float) -> dict[str, tuple[float, float]]:
        """Intervals of alpha, log_beta and, if free, offset."""

    def predict(self, z: Floats, level: float, observation: bool) -> Bounds:
        """Interval of L at ``z``; of a new run's L with ``observation``."""


def bracket(low: float, high: float, form: str = ".5g") -> str:
    """``  [low, high]`` for a line of text; empty where there is no interval (NaN)."""
    return "" if np.isnan(low) else f"  [{low:{form}}, {high:{form}}]"


def t_quantile(freedom: float | Floats, level: float) -> Floats:
    """Two-sided Student quantile; ``freedom`` may be fractional."""
    from scipy.special import stdtrit

    return np.asarray(stdtrit(freedom, 0.5 + level / 2), dtype=np.float64)


def fieller(a: Floats, alpha: Floats, cov: Floats, q: Floats) -> tuple[float, float]:
    """Range of b = a/α over the ellipses ``(θ − θ̂)ᵀ cov⁻¹ (θ − θ̂) ≤ q`` (Fieller 1954).

    One ellipse per entry: a, alpha, q (S,), cov (S, 2, 2). Unbounded (±∞) where α = 0 is inside.
    """
    square = alpha**2 - q * cov[:, 1, 1]
    middle = a * alpha - q * cov[:, 0, 1]
    constant = a**2 - q * cov[:, 0, 0]
    if (square <= 0).any():
        return -np.inf, np.inf
    root = np.sqrt(np.maximum(middle**2 - square * constant, 0.0))
    return float(((middle - root) / square).min()), float(((middle + root) / square).max())


@dataclass(frozen=True)
class LineInterval:
    """Student's t around a straight line in log space; with clusters, CR2."""

    a: float
    alpha: float
    offset: float
    centre: float
    cov: Floats
    """Covariance of (a, α)."""
    variance: float
    """Of one point's log residual."""
    freedom: Callable[[Floats], Floats]
    """Degrees of freedom of the contrasts (S, 2)."""
    method: str

    def refusal(self, level: float) -> str:
        return ""

    def params(self, level: float) -> dict[str, tuple[float, float]]:
        t = float(t_quantile(self.freedom(np.array([[0.0, 1.0]])), level)[0])
        half = t * float(np.sqrt(self.cov[1, 1]))
        # Fieller's pivot at b = a/α is the contrast a − bα.
        q = float(t_quantile(self.freedom(np.array([[1.0, -self.a / self.alpha]])), level)[0]) ** 2
        low, high = fieller(np.array([self.a]), np.array([self.alpha]), self.cov[None], np.array([q]))
        return {
            "alpha": (self.alpha - half, self.alpha + half),
            "log_beta": (low - self.centre, high - self.centre),
        }

    def predict(self, z: Floats, level: float, observation: bool) -> Bounds:
        contrasts = np.stack([np.ones_like(z), z], 1)
        variance = np.einsum("sp,pq,sq->s", contrasts, self.cov, contrasts)
        half = t_quantile(self.freedom(contrasts), level) * np.sqrt(variance + observation * self.variance)
        line = self.a + self.alpha * z
        return self.offset + np.exp(line - half), self.offset + np.exp(line + half)


def student_line(
    a: float, alpha: float, offset: float, centre: float, z: Floats, e: Floats, w: Floats
) -> LineInterval:
    """One point per run: (XᵀWX)⁻¹s², n − 2 degrees of freedom."""
    X = np.stack([np.ones_like(z), z], 1)
    freedom = len(z) - 2
    variance = float((w * e**2).sum() / freedom)
    cov = np.asarray(np.linalg.inv(X.T @ (X * w[:, None])), dtype=np.float64) * variance
    method = f"Student's t, {freedom} degrees of freedom (least squares, one point per run)"
    return LineInterval(
        a, alpha, offset, centre, cov, variance, lambda c: np.full(len(c), float(freedom)), method
    )


def cluster_line(
    a: float, alpha: float, offset: float, centre: float, z: Floats, e: Floats, w: Floats, codes: np.ndarray
) -> LineInterval:
    """Several points per run: CR2 covariance, Satterthwaite's degrees of freedom per contrast."""
    root = np.sqrt(w)
    X = np.stack([np.ones_like(z), z], 1) * root[:, None]
    e = e * root
    bread = np.linalg.inv(X.T @ X)
    half = np.linalg.cholesky(bread)
    members = [np.flatnonzero(codes == g) for g in range(int(codes.max()) + 1)]
    adjusted: list[Floats] = []
    meat = np.zeros((2, 2))
    for rows in members:
        # A_g = (I − H_gg)^(-1/2), from the thin SVD of the rank-two H_gg = Z Zᵀ.
        U, s, _ = np.linalg.svd(X[rows] @ half, full_matrices=False)
        rest = 1 - s**2
        gain = np.where(rest > 1e-9, 1 / np.sqrt(np.maximum(rest, 1e-9)), 0.0) - 1
        A_X = X[rows] + U @ (gain[:, None] * (U.T @ X[rows]))
        adjusted.append(A_X)
        score = A_X.T @ e[rows]
        meat += np.outer(score, score)
    cov = bread @ meat @ bread

    inner = np.stack([A.T @ A for A in adjusted])
    cross = np.stack([X[rows].T @ A for rows, A in zip(members, adjusted, strict=True)])

    def freedom(contrasts: Floats) -> Floats:
        directions = contrasts @ bread
        own = np.einsum("sp,gpq,sq->sg", directions, inner, directions)
        pulled = np.einsum("gpq,sq->sgp", cross, directions)
        gram = -np.einsum("sgp,pq,shq->sgh", pulled, bread, pulled)
        gram[:, np.arange(len(members)), np.arange(len(members))] += own
        return np.asarray(np.einsum("sgg->s", gram) ** 2 / np.einsum("sgh,sgh->s", gram, gram))

    variance = float((e**2).sum() / (len(z) - 2))
    method = f"Student's t on cluster-robust errors (CR2, Satterthwaite), {len(members)} independent groups"
    return LineInterval(a, alpha, offset, centre, cov, variance, freedom, method)


@dataclass(frozen=True)
class ProfileInterval:
    """Union over L∞ of conditional ellipses; see the module."""

    profile: Callable[[Floats], tuple[Floats, Floats, Floats]]
    """L∞ (S,) -> RSS (S,), θ̂ = (a, α) (S, 2), (JᵀJ)⁻¹ (S, 2, 2)."""
    best: float
    """L∞ at the optimum."""
    ceiling: Callable[[float], float]
    """RSS -> an L∞ that lies above all with this RSS or a lower one."""
    rss: float
    n: int
    centre: float

    @property
    def method(self) -> str:
        return f"profile likelihood, {self.n - 3} degrees of freedom (one point per run)"

    def refusal(self, level: float) -> str:
        return ""

    def region(self, level: float) -> tuple[Floats, Floats, Floats, Floats]:
        """L∞ values inside, their θ̂ and (JᵀJ)⁻¹, and what is left of the threshold."""
        freedom = self.n - 3
        # The floor keeps the region of exact data from being smaller than rounding.
        allowed = self.rss * (1 + float(t_quantile(freedom, level)) ** 2 / freedom) + self.n * 1e-20
        ceiling = self.ceiling(allowed)
        grid = np.unique(np.append(ceiling * (1 - np.geomspace(1e-6, 1.0, 120)), self.best))
        for turn in range(4):
            rss, theta, inverse = self.profile(grid)
            inside = np.flatnonzero(rss <= allowed * (1 + 1e-9))
            first, last = inside[0], inside[-1]
            fine = [
                np.linspace(grid[i], grid[i + 1], 12) for i in (first - 1, last) if 0 <= i < len(grid) - 1
            ]
            core = np.linspace(grid[first], grid[last], 60 if turn == 0 else 2)
            grid = np.unique(np.concatenate([core, grid[inside], *fine]))
        rss, theta, inverse = self.profile(grid)
        keep = rss <= allowed * (1 + 1e-9)
        return grid[keep], theta[keep], inverse[keep], np.maximum(allowed - rss[keep], 0.0)

    def params(self, level: float) -> dict[str, tuple[float, float]]:
        offset, theta, inverse, q = self.region(level)
        half = np.sqrt(q * inverse[:, 1, 1])
        low, high = fieller(theta[:, 0], theta[:, 1], inverse, q)
        return {
            "alpha": (float((theta[:, 1] - half).min()), float((theta[:, 1] + half).max())),
            "log_beta": (low - self.centre, high - self.centre),
            "offset": (float(offset.min()), float(offset.max())),
        }

    def predict(self, z: Floats, level: float, observation: bool) -> Bounds:
        offset, theta, inverse, q = self.region(level)
        X = np.stack([np.ones_like(z), z], 1)
        line = theta @ X.T
        spread = np.einsum("zp,spq,zq->sz", X, inverse, X)
        with np.errstate(divide="ignore"):  # no offset: its log is −∞
            log_offset = np.log(offset)[:, None]
        log_L = np.logaddexp(log_offset, line)
        share = np.exp(line - log_L)
        # On the log of L a step of the line counts by the reducible share; a new run adds its own noise.
        half = np.sqrt(q[:, None] * spread)
        with np.errstate(over="ignore"):  # far beyond the data a bound may be infinite
            low = (offset[:, None] + np.exp(line - half)).min(0)
            high = (offset[:, None] + np.exp(line + half)).max(0)
        if observation:
            half = np.sqrt(q[:, None] * (spread * share**2 + 1))
            # Far out the law's own band, which is not linearised, may be the wider one.
            low = np.minimum(low, np.exp((log_L - half).min(0)))
            high = np.maximum(high, np.exp((log_L + half).max(0)))
        return low, high


@dataclass(frozen=True)
class ReplicateInterval:
    """Expanded percentiles of bootstrap replicates over groups."""

    theta: Floats
    """(R, 3): a, α, offset of every replicate."""
    residuals: Floats
    """Of the fit, in log L, or log(L − offset) where the offset is fixed: a new run's noise is drawn
    from them."""
    groups: int
    free_offset: bool
    centre: float
    seed: int

    @property
    def method(self) -> str:
        return f"bootstrap over {self.groups} runs, {len(self.theta)} replicates, expanded percentiles"

    @property
    def parameters(self) -> int:
        """How many were fitted."""
        return 3 if self.free_offset else 2

    def refusal(self, level: float) -> str:
        return unresolved(len(self.theta), level, self.groups, self.parameters)

    def params(self, level: float) -> dict[str, tuple[float, float]]:
        a, alpha, offset = self.theta.T
        log_beta = a / alpha - self.centre
        columns = {"alpha": alpha, "log_beta": log_beta} | ({"offset": offset} if self.free_offset else {})
        found = {}
        for name, column in columns.items():
            low, high = expanded_percentile(column, level, self.groups, self.parameters)
            found[name] = (float(low), float(high))
        return found

    def predict(self, z: Floats, level: float, observation: bool) -> Bounds:
        a, alpha, offset = self.theta.T[:, :, None]
        L = offset + np.exp(a + alpha * z)
        if observation:
            rng = np.random.default_rng(self.seed + 1)
            inflate = np.sqrt(len(self.residuals) / max(1, len(self.residuals) - self.parameters))
            # Residuals are log L̂ − log L: a run above the law has a negative one.
            noise = np.exp(-rng.choice(self.residuals, size=(len(L), 1)) * inflate)
            L = L * noise if self.free_offset else offset + (L - offset) * noise
        return expanded_percentile(L, level, self.groups, self.parameters)
