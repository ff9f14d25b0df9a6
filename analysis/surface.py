"""The loss surface ``L(N, D) = E + A/N^α + B/D^β`` (Hoffmann et al. 2022) in coordinates that fit well.

- Working coordinates: ``E, log a, log b, α, β`` with ``a = A·N₀^−α`` and ``b = B·D₀^−β``, the two
  terms at the data's mean log N₀ and log D₀. There the levels hardly move with the exponents; the
  published A and B, levels at N = D = 1, move by orders of magnitude with them.
- Repeated data (Muennighoff et al. 2023, arXiv 2305.16264, eqs. 4 to 6): D counts as
  ``D' = U(1 + R_D(1 − e^(−r/R_D)))``, ``r = D/U − 1``, of U unique tokens; N counts as N' likewise
  beyond ``U_N``, the compute-optimal N for U tokens under the law without repetition, where
  ``αA/U_N^α = βB/U^β``. R_D and R_N are fitted as logs.
- N' only on request: it bends the surface only where N exceeds U_N, which data with one or two
  values of U cannot tell from another α. Its half-life is then a number without meaning.
- Shapes: B problems, n points, P = 5, 6 or 7 coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.errors import Floats

EXPONENTS = (1e-3, 5.0)
"""Bounds of α and β; one that rests there is not determined by the data."""
HALF_LIVES = (1e-2, 1e4)
"""Bounds of R_D and R_N: repeats worth nothing after a hundredth of an epoch, or never worth less."""
SMALLEST_TERM = 1e-8
"""a and b are at least this share of the mean loss."""


@dataclass(frozen=True, eq=False)
class Surface:
    """Which form, around which centre."""

    centre_params: float
    """log N₀."""
    centre_tokens: float
    """log D₀."""
    scale: float
    """A typical loss, for the bounds."""
    repeats: bool = False
    """With R_D."""
    excess: bool = False
    """With R_N."""

    @property
    def names(self) -> tuple[str, ...]:
        """The fitted parameters."""
        return ("E", "A", "B", "alpha", "beta", "R_D", "R_N")[: self.size]

    @property
    def size(self) -> int:
        """P."""
        return 5 + self.repeats + self.excess

    @property
    def lower(self) -> Floats:
        """Bounds of the working coordinates (P,)."""
        term, half = np.log(SMALLEST_TERM * self.scale), np.log(HALF_LIVES[0])
        return np.array([0.0, term, term, EXPONENTS[0], EXPONENTS[0], half, half])[: self.size]

    @property
    def upper(self) -> Floats:
        """Bounds of the working coordinates (P,)."""
        term, half = np.log(1e3 * self.scale), np.log(HALF_LIVES[1])
        return np.array([10 * self.scale, term, term, EXPONENTS[1], EXPONENTS[1], half, half])[: self.size]

    def natural(self, theta: Floats) -> Floats:
        """Working coordinates (…, P) to E, log A, log B, α, β, R_D, R_N; A and B stay logs."""
        out = theta.copy()
        out[..., 1] += theta[..., 3] * self.centre_params
        out[..., 2] += theta[..., 4] * self.centre_tokens
        out[..., 5:] = np.exp(theta[..., 5:])
        return out

    def params(self, theta_P: Floats) -> Mapping[str, float]:
        """E, A, B, alpha, beta (and R_D, R_N) by name."""
        values = self.natural(theta_P)
        with np.errstate(over="ignore"):
            values[1:3] = np.exp(values[1:3])
        return dict(zip(self.names, values.tolist(), strict=True))

    def log_loss(self, theta_BP: Floats, u: Floats, v: Floats, unique: Floats | None) -> Floats:
        """log L at log N ``u``, log D ``v`` and log U ``unique``, each (n,) or (B, n)."""
        return np.asarray(np.log(self._terms(theta_BP, u, v, unique)[0]))

    def with_jacobian(
        self, theta_BP: Floats, u: Floats, v: Floats, unique: Floats | None
    ) -> tuple[Floats, Floats]:
        """log L (B, n) and its derivatives in the working coordinates (B, n, P)."""
        L, x, y, n_eff, d_eff, detail = self._terms(theta_BP, u, v, unique)
        J = np.empty((*L.shape, self.size))
        inverse = 1 / L
        x, y = x * inverse, y * inverse
        J[..., 0] = inverse
        J[..., 1] = x
        J[..., 2] = y
        np.multiply(x, -n_eff, out=J[..., 3])
        np.multiply(y, -d_eff, out=J[..., 4])
        alpha, beta = theta_BP[:, 3:4], theta_BP[:, 4:5]
        if self.repeats:
            J[..., 5] = -beta * y * detail["d_RD"]
        if self.excess:
            pull = -alpha * x * detail["d_UN"]
            log_U, log_UN = detail["log_U"], detail["log_UN"]
            J[..., 1] += pull / alpha
            J[..., 2] -= pull / alpha
            J[..., 3] += pull * (1 / alpha + self.centre_params - log_UN) / alpha
            J[..., 4] += pull * (-1 / beta - self.centre_tokens + log_U) / alpha
            J[..., 6] = -alpha * x * detail["d_RN"]
        return np.log(L), J

    def _terms(
        self, theta_BP: Floats, u: Floats, v: Floats, unique: Floats | None
    ) -> tuple[Floats, Floats, Floats, Floats, Floats, dict[str, Floats]]:
        """L, its two terms, log N'/N₀ and log D'/D₀, and what the Jacobian of repetition needs."""
        E, a, b, alpha, beta = (theta_BP[:, p : p + 1] for p in range(5))
        detail: dict[str, Floats] = {}
        if self.repeats and unique is not None:
            log_U = np.minimum(unique, v)
            half = np.exp(theta_BP[:, 5:6])
            v, _, detail["d_RD"] = saturating(v, log_U, half)
            if self.excess:
                log_A, log_B = a + alpha * self.centre_params, b + beta * self.centre_tokens
                log_UN = (np.log(alpha / beta) + log_A - log_B + beta * log_U) / alpha
                detail["log_U"], detail["log_UN"] = log_U, log_UN
                u, detail["d_UN"], detail["d_RN"] = saturating(u, log_UN, np.exp(theta_BP[:, 6:7]))
        elif self.repeats:
            detail["d_RD"] = np.zeros_like(v)
            if self.excess:
                zero = np.zeros_like(u)
                detail |= {"d_UN": zero, "d_RN": zero, "log_U": zero, "log_UN": zero}
        n_eff, d_eff = u - self.centre_params, v - self.centre_tokens
        x = np.exp(a - alpha * n_eff)
        y = np.exp(b - beta * d_eff)
        return E + x + y, x, y, n_eff, d_eff, detail


def saturating(total: Floats, unique: Floats, half_life: Floats) -> tuple[Floats, Floats, Floats]:
    """What a repeated quantity counts as: ``X' = U(1 + R(1 − e^(−r/R)))``, r = X/U − 1; X below U.

    Args:
        total, unique: log X, log U.
        half_life: R, in repetitions.

    Returns:
        log X' and its derivatives in log U and in log R.
    """
    ratio = np.exp(np.clip(total - unique, 0.0, 500.0))
    again = ratio - 1
    decay = np.exp(-again / half_life)
    # expm1 keeps X' = X to the last digit for R much larger than r.
    grown = 1 - half_life * np.expm1(-again / half_life)
    beyond = total > unique
    value = np.where(beyond, unique + np.log(grown), total)
    d_unique = np.where(beyond, 1 - decay * ratio / grown, 0.0)
    d_half = np.where(beyond, (half_life * -np.expm1(-again / half_life) - again * decay) / grown, 0.0)
    return value, d_unique, d_half
