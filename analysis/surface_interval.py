"""Intervals of anything computed from a fitted loss surface, by what the data allow.

- Squared loss: *profile likelihood* (Bates and Watts 1988, ch. 6). A quantity g, be it an exponent,
  a ratio of exponents, a prediction or an optimum, is pushed away from its estimate, all
  coordinates refitted at every step, until ``(RSS − RSS₀)/s²`` passes t²_{n−P}. No linearisation:
  the bounds of E, α and predictions are lopsided where the data are, and stop at E = 0.
- Several points per run: the same profile with its threshold scaled by V_CR2(g)/V(g), the ratio of
  the cluster-robust to the plain variance of g (the vertical adjustment of Chandler and Bate 2007),
  t with Satterthwaite's degrees of freedom (Pustejovsky and Tipton 2018) on the Jacobian.
- Huber's loss: expanded percentiles of bootstrap replicates (``analysis.bootstrap``).
- Measured coverage: ``benchmarks/coverage_parametric.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from analysis.bootstrap import expanded_percentile, unresolved
from analysis.errors import Floats
from analysis.intervals import Bounds, t_quantile
from analysis.solver import inverse, minimise
from analysis.surface import Surface
from analysis.surface_fit import Points, residual_model

TURNS = 18
"""Secant steps towards a bound at most."""
FIRST = 0.3
"""The first of them, as a share of the bound that a straight line would have."""
CLOSE = 1e-3
"""A bound is found when its likelihood distance is right within this share."""
SOFT = 10.0
"""Stiffness of the push, in standard errors of g: stiff enough to move it, soft enough to solve."""


@dataclass(frozen=True, eq=False)
class Quantity:
    """Q numbers computed from the working coordinates."""

    value: Callable[[Floats, np.ndarray], Floats]
    """θ (B, P), which of the Q (B,) -> (B,)."""
    count: int
    """Q."""
    natural: tuple[float, float] = (-np.inf, np.inf)
    """What a bound becomes where the data set none."""

    def at(self, theta_P: Floats) -> Floats:
        """All Q at one θ."""
        return self.value(np.tile(theta_P, (self.count, 1)), np.arange(self.count))

    def slopes(self, theta_BP: Floats, which: np.ndarray) -> Floats:
        """Derivatives in the working coordinates (B, P), by central differences."""
        B, P = theta_BP.shape
        step = 1e-5 * np.maximum(np.abs(theta_BP), 0.1)
        forward = theta_BP[:, None, :] + step[:, :, None] * np.eye(P)
        back = theta_BP[:, None, :] - step[:, :, None] * np.eye(P)
        both = np.concatenate([forward, back]).reshape(2 * B * P, P)
        values = self.value(both, np.tile(np.repeat(which, P), 2)).reshape(2, B, P)
        return np.asarray((values[0] - values[1]) / (2 * step))


class SurfaceInterval(Protocol):
    """What a surface needs from its uncertainty."""

    @property
    def method(self) -> str:
        """The method in words."""

    def refusal(self, level: float) -> str:
        """Why there is none at this level; empty if there is one."""

    def bounds(self, quantity: Quantity, level: float) -> Bounds:
        """Lower and upper bounds, (Q,) each."""

    def noise(self, level: float) -> float:
        """Half-width of the interval of one new run's log loss around the law."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """CR2's covariance of θ and Satterthwaite's degrees of freedom, for P parameters.

    The working model, which CR2 needs to know how much of the noise the fit took up, is equal
    correlation ``rho`` within a run. With rho = 0, the usual choice, five parameters of 52 points
    look cheap; but A, α and E are fitted to 13 runs.
    """

    cov: Floats
    bread: Floats
    rho: float
    inner: Floats
    """(G, P, P): X_gᵀA_gᵀA_gX_g."""
    cross: Floats
    """(G, P, P): X_gᵀA_gX_g."""
    sums: Floats
    """(G, P): column sums of A_gX_g."""
    totals: Floats
    """(G, P): column sums of X_g."""

    left: float
    """Share of one point's variance that an average residual keeps after the fit, times n."""
    noise_freedom: float
    """Satterthwaite's degrees of freedom of that variance."""

    @classmethod
    def of(cls, X: Floats, e: Floats, codes: np.ndarray, rho: float | None = None) -> Clusters:
        """From the weighted Jacobian (n, P), the weighted residuals and the group of each point.

        ``rho``: None estimates it from the products of residuals within groups.
        """
        bread = inverse(X.T @ X)
        G, P = int(codes.max()) + 1, X.shape[1]
        members = [np.flatnonzero(codes == g) for g in range(G)]
        if rho is None:
            pairs = sum(len(rows) * (len(rows) - 1) for rows in members)
            together = sum(float(e[rows].sum()) ** 2 for rows in members) - float(e @ e)
            rho = float(np.clip(together / pairs / np.mean(e**2), 0.0, 0.99)) if pairs else 0.0
        totals = np.stack([X[rows].sum(0) for rows in members])
        meat = np.zeros((P, P))
        inner, cross, sums = [], [], []
        for g, rows in enumerate(members):
            X_g = X[rows]
            # M = ((I − H) Φ (I − H))_gg; A M A = Φ_g makes the score's variance unbiased under Φ.
            spill = -X_g @ bread @ totals.T
            spill[:, g] += 1
            M = (1 - rho) * (np.eye(len(rows)) - X_g @ bread @ X_g.T) + rho * spill @ spill.T
            root = _power((1 - rho) * np.eye(len(rows)) + rho, 0.5)
            A_X = root @ _power(root @ M @ root, -0.5) @ root @ X_g
            score = A_X.T @ e[rows]
            meat += np.outer(score, score)
            inner.append(A_X.T @ A_X)
            cross.append(X_g.T @ A_X)
            sums.append(A_X.sum(0))
        cov = bread @ meat @ bread
        # E[RSS]/σ² = tr(MΦ) and its spread 2 tr((MΦ)²), with M = I − H, Φ = (1 − ρ)I + ρZZᵀ, K = ZᵀMZ.
        n = len(X)
        K = np.diag([float(len(rows)) for rows in members]) - totals @ bread @ totals.T
        left = (1 - rho) * (n - P) + rho * np.trace(K)
        square = (1 - rho) ** 2 * (n - P) + 2 * rho * (1 - rho) * np.trace(K) + rho**2 * (K * K).sum()
        return cls(
            cov, bread, rho, np.stack(inner), np.stack(cross), np.stack(sums), totals, float(left),
            float(left**2 / square),
        )  # fmt: skip

    def freedom(self, contrasts: Floats) -> Floats:
        """Degrees of freedom of the contrasts (Q, P), under the working model."""
        directions = contrasts @ self.bread
        G = np.arange(len(self.inner))
        pulled = np.einsum("gpq,sq->sgp", self.cross, directions) @ self.bread
        gram = -np.einsum("sgp,hpq,sq->sgh", pulled, self.cross, directions)
        gram[:, G, G] += np.einsum("sp,gpq,sq->sg", directions, self.inner, directions)
        by_run = -pulled @ self.totals.T
        by_run[:, G, G] += directions @ self.sums.T
        gram = (1 - self.rho) * gram + self.rho * by_run @ by_run.transpose(0, 2, 1)
        return np.asarray(np.einsum("sgg->s", gram) ** 2 / np.einsum("sgh,sgh->s", gram, gram))


def _power(symmetric: Floats, power: float) -> Floats:
    """A power of a positive semi-definite matrix; directions without any weight stay without."""
    values, vectors = np.linalg.eigh(symmetric)
    kept = values > 1e-9 * values[-1]
    return np.asarray((vectors * np.where(kept, np.where(kept, values, 1.0) ** power, 0.0)) @ vectors.T)


@dataclass(frozen=True, eq=False)
class ProfileSurface:
    """Squared loss: profile likelihood; see the module."""

    surface: Surface
    points: Points
    w: Floats
    theta: Floats
    """(P,) at the optimum."""
    rss: float
    bread: Floats
    """(XᵀX)⁻¹ of the weighted Jacobian."""
    clusters: Clusters | None
    """None: every point is its own run."""
    groups: int

    @classmethod
    def of(
        cls, surface: Surface, points: Points, w: Floats, theta: Floats, codes: np.ndarray
    ) -> ProfileSurface:
        """At an optimum θ; ``codes`` are the points' runs."""
        e, J = (a[0] for a in residual_model(surface, points)(theta[None], np.zeros(1, int)))
        X, e = J * np.sqrt(w)[:, None], e * np.sqrt(w)
        G = int(codes.max()) + 1
        clusters = Clusters.of(X, e, codes) if len(w) > G else None
        return cls(surface, points, w, theta, float(e @ e), inverse(X.T @ X), clusters, G)

    @property
    def freedom(self) -> int:
        """n − P."""
        return len(self.w) - self.surface.size

    @property
    def variance(self) -> float:
        """s² of one log residual; not below what rounding leaves of exact data."""
        return max(self.rss / self.freedom, 1e-20)

    @property
    def method(self) -> str:
        if self.clusters is None:
            return (
                f"profile likelihood, {self.freedom} degrees of freedom (least squares, independent points)"
            )
        return f"profile likelihood scaled to cluster-robust errors (CR2, Satterthwaite), {self.groups} runs"

    def refusal(self, level: float) -> str:
        """Too few runs: the parameters of one run's size can take up all that its points say."""
        P = self.surface.size
        if self.clusters is not None and self.groups <= P:
            return f"intervals of {P} parameters need more than {P} independent runs, got {self.groups}"
        return "" if self.freedom > 0 else f"{len(self.w)} points are too few for {P} parameters"

    def noise(self, level: float) -> float:
        if self.clusters is None:
            return float(t_quantile(self.freedom, level)) * float(np.sqrt(self.variance))
        # Runs' own errors are few and the fit took up a part of them: n − P would count points.
        variance = max(self.rss / self.clusters.left, 1e-20)
        return float(t_quantile(self.clusters.noise_freedom, level)) * float(np.sqrt(variance))

    def bounds(self, quantity: Quantity, level: float) -> Bounds:
        Q = quantity.count
        everything = np.arange(Q)
        c = quantity.slopes(np.tile(self.theta, (Q, 1)), everything)
        spread = np.einsum("qp,pr,qr->q", c, self.bread, c)
        s = np.sqrt(self.variance)
        goal = np.full(Q, float(t_quantile(self.freedom, level)))
        if self.clusters is not None:
            robust = np.einsum("qp,pr,qr->q", c, self.clusters.cov, c)
            goal = t_quantile(self.clusters.freedom(c), level) * np.sqrt(robust / spread) / s
        which, side = np.tile(everything, 2), np.repeat([-1.0, 1.0], Q)
        unit = np.sqrt(spread)[which]
        ends = self._search(quantity, which, side, unit, goal[which] * s, c[which])
        return ends[:Q], ends[Q:]

    def _search(
        self, quantity: Quantity, which: np.ndarray, side: Floats, unit: Floats, goal: Floats, c: Floats
    ) -> Floats:
        """Where √(RSS − RSS₀) reaches ``goal``, on each ``side``; the natural limit where it never does,
        NaN where the search did not end.

        Args:
            unit: standard error of g over s, the scale of the search.
            c: dg/dθ at the optimum.
        """
        best = quantity.at(self.theta)[which]
        lower, upper = self.surface.lower, self.surface.upper
        base = residual_model(self.surface, self.points)
        ends = np.full(len(which), np.nan)
        # From the optimum outwards in steps: along a bent valley the whole way at once, which is a
        # straight line's, ends beyond the box, and the descent from there need not come back.
        direction = side[:, None] * (c @ self.bread) / unit[:, None]
        theta = np.clip(self.theta + FIRST * direction * goal[:, None], lower, upper)
        distance = FIRST * goal * unit
        last_x, last_tau = np.zeros(len(which)), np.zeros(len(which))
        active = np.arange(len(which))
        w = np.broadcast_to(np.append(self.w, 1.0), (len(which), len(self.w) + 1))
        for _ in range(TURNS):
            chosen = active
            stiff = SOFT / unit[chosen]
            target = best[chosen] + side[chosen] * distance[chosen]

            def pushed(
                theta_BP: Floats,
                rows: np.ndarray,
                chosen: np.ndarray = chosen,
                stiff: Floats = stiff,
                target: Floats = target,
            ) -> tuple[Floats, Floats]:
                r, J = base(theta_BP, rows)
                k = which[chosen][rows]
                push = stiff[rows] * (quantity.value(theta_BP, k) - target[rows])
                pull = stiff[rows][:, None] * quantity.slopes(theta_BP, k)
                return np.hstack([r, push[:, None]]), np.concatenate([J, pull[:, None]], 1)

            end = minimise(pushed, theta[chosen], w[: len(chosen)], "squared", 1.0, lower, upper, 300)
            theta[chosen] = end.theta
            g = quantity.value(end.theta, which[chosen])
            rss = (self.w * base(end.theta, chosen)[0] ** 2).sum(1)
            # The end is on the profile at the g that was reached, whatever the push.
            x = side[chosen] * (g - best[chosen])
            tau = np.sqrt(np.maximum(rss - self.rss, 0.0))
            need = goal[chosen]
            found = np.abs(tau - need) <= CLOSE * need
            still = np.abs(x - last_x[chosen]) < 1e-4 * unit[chosen] * need
            # Only where the descent truly ended do the data set no bound.
            stuck = ~found & end.converged & still & (tau < need)
            ends[chosen[found]] = g[found]
            ends[chosen[stuck]] = np.where(side[chosen[stuck]] < 0, *quantity.natural)
            run, rise = x - last_x[chosen], tau - last_tau[chosen]
            span = np.maximum(x, 1e-3 * need * unit[chosen])
            secant = np.abs(rise) > 1e-9 * need
            slope = np.where(secant, run / np.where(secant, rise, 1.0), 0.0)
            slope = np.where(slope > 0, slope, span / np.maximum(tau, 1e-3 * need))
            ahead = x + (need - tau) * slope
            # The push falls short of its target, by a hundredth, or by half where E rests at 0 and g moves
            # less freely than ``unit`` says; the next aims as much farther.
            short = np.clip(distance[chosen] / span, 1.0, 3.0)
            distance[chosen] = np.clip(ahead, 0.4 * span, 2.5 * span) * short
            last_x[chosen], last_tau[chosen] = x, tau
            active = chosen[~found & ~stuck]
            if not len(active):
                break
        return ends


@dataclass(frozen=True, eq=False)
class ReplicateSurface:
    """Huber's loss: expanded percentiles of bootstrap replicates over runs or points."""

    theta: Floats
    """(R, P) working coordinates."""
    residuals: Floats
    """Of the fit; a new run's noise is theirs."""
    groups: int

    @property
    def method(self) -> str:
        return (
            f"bootstrap over {self.groups} runs or points, {len(self.theta)} replicates, expanded percentiles"
        )

    def refusal(self, level: float) -> str:
        P = self.theta.shape[1]
        if self.groups <= P:
            return f"intervals of {P} parameters need more than {P} independent runs, got {self.groups}"
        return unresolved(len(self.theta), level, self.groups, P)

    def noise(self, level: float) -> float:
        inflate = np.sqrt(len(self.residuals) / (len(self.residuals) - self.theta.shape[1]))
        return float(np.quantile(np.abs(self.residuals), level) * inflate)

    def bounds(self, quantity: Quantity, level: float) -> Bounds:
        R, Q = len(self.theta), quantity.count
        values = np.column_stack([quantity.value(self.theta, np.full(R, k)) for k in range(Q)])
        return expanded_percentile(values, level, self.groups, self.theta.shape[1])
