"""The parametric law ``L = E + A/N^α + B/D^β`` (Hoffmann et al. 2022, eq. 2) and its form for repeated data.

- ``analysis.surface`` has the form and its coordinates, ``surface_fit`` the fitting, ``surface_interval``
  the intervals, ``surface_optimum`` what a budget should buy.
- The default loss is Huber's at δ = 1e-3 on log L, summed, as Hoffmann's; squares for own runs whose
  noise is known to be tame: their intervals need no bootstrap.
- N and D need three distinct values each: with two, the exponent and the level of a term are one number.
- Repeated data: R_D only, unless ``excess_params``; ``analysis.surface`` says why.
- A fit that did not converge, or whose exponents rest at a bound, says so in ``status``; its curves
  are not drawn and it has no intervals. E = 0 is no law with a floor, but its intervals hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from analysis.bootstrap import group_codes, group_weights, replicates_note
from analysis.errors import DataError, Floats, check_level, positive, same_length
from analysis.intervals import bracket
from analysis.solver import LossFn, check_loss_fn
from analysis.surface import Surface
from analysis.surface_fit import Points, fit_surface, refit, residual_model
from analysis.surface_interval import ProfileSurface, Quantity, ReplicateSurface, SurfaceInterval
from analysis.surface_optimum import FlopsPerToken, Optimum, OptimumInterval, best_log_params

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class ComputeExponents(NamedTuple):
    """``N_opt ∝ C^a`` and ``D_opt ∝ C^b`` at C = 6·N·D and fresh data."""

    a: float
    """β/(α + β)."""
    b: float
    """α/(α + β)."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """L at (``params``, ``tokens``) with its interval."""

    params: Floats
    tokens: Floats
    value: Floats
    low: Floats
    high: Floats
    level: float
    observation: bool
    """False: the interval of the law itself. True: of one new run, its noise included."""


@dataclass(frozen=True, eq=False)
class ParametricLaw:
    """A fitted surface. Frozen; every number in it belongs to the data it holds."""

    sizes: Floats
    """N of each point."""
    tokens: Floats
    """D."""
    loss: Floats
    """L."""
    unique_tokens: Floats | None
    """U, for the repeated form."""
    weights: Floats
    """Scaled to mean 1."""
    groups: int
    """Independent units: runs, or points where no groups were given."""
    params: Mapping[str, float]
    """E (in L's unit), A, B, alpha, beta; R_D and R_N for repeated data."""
    objective: float
    """Σ w ρ(r) of the log residuals; ρ = r²/2 or Huber's."""
    residuals: Floats
    """log L̂ − log L."""
    converged: bool
    status: str
    loss_fn: LossFn
    delta: float
    theta: Floats
    """(P,) working coordinates of ``surface``."""
    covariance: Floats
    """(P, P) of ``theta``: of the replicates, cluster-robust, or s²(JᵀJ)⁻¹; NaN where none holds."""
    surface: Surface
    uncertainty: SurfaceInterval | None
    replicates: Floats | None
    """(R, P) bootstrap draws of E, A, B, alpha, beta (R_D, R_N); None without ``bootstrap``."""
    redrawn: int
    """Resamples that could not carry the form and were drawn again."""
    unconverged: int
    """Replicates whose gradient did not vanish."""

    @property
    def E(self) -> float:  # noqa: N802 - the field's symbol
        """The irreducible loss."""
        return self.params["E"]

    @property
    def alpha(self) -> float:
        """The exponent of N."""
        return self.params["alpha"]

    @property
    def beta(self) -> float:
        """The exponent of D."""
        return self.params["beta"]

    @property
    def compute_exponents(self) -> ComputeExponents:
        """How N and D should grow with compute."""
        total = self.alpha + self.beta
        return ComputeExponents(self.beta / total, self.alpha / total)

    @property
    def interval_method(self) -> str:
        """How intervals get their bounds, or why there are none."""
        return self.uncertainty.method if self.uncertainty else "none: " + self._why_none()

    def no_interval(self, level: float = 0.95) -> str:
        """Why there is no interval at this level; empty if there is one."""
        return self.uncertainty.refusal(check_level(level)) if self.uncertainty else self._why_none()

    def interval(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Intervals of the fitted parameters, by name. ∞ or 0 where the data set no bound.

        Raises:
            DataError: ``no_interval`` says why.
        """
        size = self.surface.size

        def value(theta_BP: Floats, which: np.ndarray) -> Floats:
            return np.asarray(self.surface.natural(theta_BP)[np.arange(len(which)), columns[which]])

        found: dict[str, tuple[float, float]] = {}
        with np.errstate(over="ignore"):
            for columns, natural in (
                (np.array([0, 3, 4, *range(5, size)]), (0.0, np.inf)),
                (np.array([1, 2]), (-np.inf, np.inf)),
            ):
                low, high = self._uncertain(level).bounds(Quantity(value, len(columns), natural), level)
                if natural[0] < 0:  # A and B were pushed as logs
                    low, high = np.exp(low), np.exp(high)
                for k, p in enumerate(columns):
                    found[self.surface.names[p]] = (float(low[k]), float(high[k]))
        return {name: found[name] for name in self.surface.names}

    def compute_exponent_interval(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Intervals of a and b = 1 − a.

        Raises:
            DataError: as ``interval``.
        """

        def share(theta_BP: Floats, _: np.ndarray) -> Floats:
            return np.asarray(theta_BP[:, 4] / (theta_BP[:, 3] + theta_BP[:, 4]))

        (low,), (high,) = self._uncertain(level).bounds(Quantity(share, 1, (0.0, 1.0)), level)
        return {"a": (float(low), float(high)), "b": (float(1 - high), float(1 - low))}

    def value(self, params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """L at N = ``params`` and D = ``tokens``, broadcast; of fresh data without ``unique_tokens``."""
        u, v, unique = self._logs(params, tokens, unique_tokens)
        flat = self.surface.log_loss(
            self.theta[None], u.ravel(), v.ravel(), None if unique is None else unique.ravel()
        )
        return np.asarray(np.exp(flat[0]).reshape(u.shape))

    def predict(
        self,
        params: ArrayLike,
        tokens: ArrayLike,
        unique_tokens: ArrayLike | None = None,
        level: float = 0.95,
        observation: bool = False,
    ) -> Prediction:
        """L with an interval: of the law, or of one new run with ``observation``.

        Raises:
            DataError: as ``interval``.
        """
        u_grid, v_grid, unique_grid = self._logs(params, tokens, unique_tokens)
        u, v = u_grid.ravel(), v_grid.ravel()
        unique = None if unique_grid is None else unique_grid.ravel()

        def value(theta_BP: Floats, which: np.ndarray) -> Floats:
            at = None if unique is None else unique[which, None]
            return self.surface.log_loss(theta_BP, u[which, None], v[which, None], at)[:, 0]

        uncertain = self._uncertain(level)
        quantity = Quantity(value, len(u))
        middle = quantity.at(self.theta)
        low, high = uncertain.bounds(quantity, level)
        if observation:
            noise = uncertain.noise(level)
            low = middle - np.hypot(middle - low, noise)
            high = middle + np.hypot(high - middle, noise)
        return Prediction(np.exp(u), np.exp(v), np.exp(middle), np.exp(low), np.exp(high), level, observation)

    def optimal(
        self,
        flops: ArrayLike,
        flops_per_token: FlopsPerToken | None = None,
        unique_tokens: float | None = None,
    ) -> Optimum:
        """The N and D that reach the lowest loss for C = ``flops``.

        Args:
            flops: budgets C, in the unit that ``flops_per_token`` gives.
            flops_per_token: training FLOPs per token of a model with N parameters, elementwise over
                an array; 6·N for None.
            unique_tokens: how much data there is; more tokens repeat it (repeated form only).

        Raises:
            DataError: budgets that are not positive; no optimum inside the search.
        """
        C = np.asarray(flops, dtype=np.float64)
        log_C = np.log(positive(C.ravel(), "flops"))
        theta = np.tile(self.theta, (len(log_C), 1))
        u, v, L = self._best(theta, log_C, flops_per_token, unique_tokens)
        N, D, loss = (np.exp(a).reshape(C.shape)[()] for a in (u, v, L))
        return Optimum(C[()], N, D, loss)

    def optimal_interval(
        self,
        flops: ArrayLike,
        level: float = 0.95,
        flops_per_token: FlopsPerToken | None = None,
        unique_tokens: float | None = None,
    ) -> OptimumInterval:
        """Intervals of the optimum's N, D and loss.

        Raises:
            DataError: as ``interval`` and ``optimal``.
        """
        C = np.asarray(flops, dtype=np.float64)
        log_C = np.log(positive(C.ravel(), "flops"))
        uncertain = self._uncertain(level)
        found = []
        for part in range(3):

            def value(theta_BP: Floats, which: np.ndarray, part: int = part) -> Floats:
                return self._best(theta_BP, log_C[which], flops_per_token, unique_tokens)[part]

            low, high = uncertain.bounds(Quantity(value, len(log_C)), level)
            found.append((np.exp(low).reshape(C.shape)[()], np.exp(high).reshape(C.shape)[()]))
        return OptimumInterval(*found)

    @property
    def equation(self) -> str:
        """The law with its numbers."""
        p = self.params
        repeated = ", D' for repeated tokens" if self.surface.repeats else ""
        return (
            f"L = {p['E']:.4g} + {p['A']:.4g}/N^{p['alpha']:.4g} + {p['B']:.4g}/D^{p['beta']:.4g}{repeated}"
        )

    def rows(self, level: float = 0.95) -> list[tuple[str, float, float, float]]:
        """(name, value, low, high) of every parameter and of a and b; NaN bounds without an interval."""
        bounds: dict[str, tuple[float, float]] = {}
        if not self.no_interval(level):
            bounds = self.interval(level) | self.compute_exponent_interval(level)
        nothing = (float("nan"), float("nan"))
        values = dict(self.params) | self.compute_exponents._asdict()
        return [(name, value, *bounds.get(name, nothing)) for name, value in values.items()]

    def summary(self, level: float = 0.95) -> str:
        """The fit as text."""
        why = self.no_interval(level)
        method = f"none: {why}" if why else self.interval_method
        loss = f"huber (δ = {self.delta:g})" if self.loss_fn == "huber" else self.loss_fn
        lines = [
            self.equation,
            f"points {len(self.loss)}, independent {self.groups}, loss {loss}",
            f"objective {self.objective:.6e}, status: {self.status}",
            f"{level:.0%} intervals: {method}",
        ]
        lines += [f"  {n:8s}{value:12.5g}{bracket(low, high)}" for n, value, low, high in self.rows(level)]
        lines.append("  N_opt ∝ C^a, D_opt ∝ C^b at C = 6·N·D" + " of fresh data" * self.surface.repeats)
        if self.replicates is not None:
            lines.append(replicates_note(len(self.replicates), self.redrawn, self.unconverged))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        import pandas as pd

        table = pd.DataFrame(self.rows(), columns=["parameter", "value", "low", "high"])
        return f"{table.to_html(index=False)}<p>{self.status}</p>"

    def plot(self, ax: Axes, **options: Any) -> None:
        """Loss against C with curves of constant N and the optimal frontier (``surface_plot``)."""
        from analysis.surface_plot import draw_surface

        draw_surface(ax, self, **options)

    def _best(
        self,
        theta_BP: Floats,
        log_C: Floats,
        flops_per_token: FlopsPerToken | None,
        unique_tokens: float | None,
    ) -> tuple[Floats, Floats, Floats]:
        self._repeated(unique_tokens)
        unique = None
        if unique_tokens is not None:
            unique = np.full(len(log_C), np.log(positive([unique_tokens], "unique_tokens")[0]))
        u, v = best_log_params(self.surface, theta_BP, log_C, flops_per_token, unique)
        at = None if unique is None else unique[:, None]
        return u, v, self.surface.log_loss(theta_BP, u[:, None], v[:, None], at)[:, 0]

    def _logs(
        self, params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None
    ) -> tuple[Floats, Floats, Floats | None]:
        self._repeated(unique_tokens)
        given = [np.asarray(a, dtype=np.float64) for a in (params, tokens)]
        if unique_tokens is not None:
            given.append(np.asarray(unique_tokens, dtype=np.float64))
        for name, array in zip(("params", "tokens", "unique_tokens"), given, strict=False):
            positive(array.ravel(), name)
        try:
            u, v, *rest = np.broadcast_arrays(*(np.log(a) for a in given))
        except ValueError:
            shapes = ", ".join(str(a.shape) for a in given)
            raise DataError(f"params, tokens (and unique_tokens) do not fit together: {shapes}") from None
        return u, v, rest[0] if rest else None

    def _repeated(self, unique_tokens: ArrayLike | None) -> None:
        if unique_tokens is not None and not self.surface.repeats:
            raise DataError("unique_tokens: this law was fitted without repeated data")

    def _uncertain(self, level: float) -> SurfaceInterval:
        if self.uncertainty is None or self.uncertainty.refusal(check_level(level)):
            raise DataError("this law has no interval: " + self.no_interval(level))
        return self.uncertainty

    def _why_none(self) -> str:
        if not self.converged:
            return self.status
        return "fit it with bootstrap=4000 (Huber's loss has no other interval)"


def fit_parametric(
    params: ArrayLike,
    tokens: ArrayLike,
    loss: ArrayLike,
    loss_fn: LossFn = "huber",
    delta: float = 1e-3,
    unique_tokens: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    excess_params: bool = False,
) -> ParametricLaw:
    """Fit ``L = E + A/N^α + B/D^β`` to the log of L.

    Args:
        params, tokens, loss: N, D, L of each point; positive.
        loss_fn: huber (summed) or squared.
        delta: Huber's δ in units of log L.
        unique_tokens: U of each point or one for all: tokens beyond it repeat and count less and
            less, with half-life R_D epochs (Muennighoff et al. 2023).
        groups: the run (or seed) of each point; points of one group are not independent.
        weights: of the points; scaled to mean 1.
        bootstrap: replicates over groups; needed for intervals with Huber's loss.
        seed: of the bootstrap.
        excess_params: let parameters beyond the optimum for U count less too, with half-life R_N.
            Needs several U; where the data do not pin it down the status says so.

    Raises:
        DataError: NaN or non-positive values (rows named); fewer points than parameters + 1; fewer
            than three distinct N or D; N and D that move together; constant loss; no repetition.
    """
    N, D, L = positive(params, "params"), positive(tokens, "tokens"), positive(loss, "loss")
    same_length(params=N, tokens=D, loss=L)
    n = len(L)
    codes = group_codes(groups, n)
    G = int(codes.max(initial=-1)) + 1
    w = np.ones(n) if weights is None else positive(weights, "weights")
    if len(w) != n:
        raise DataError(f"weights: expected {n}, got {len(w)}")
    w = w / w.mean()
    check_loss_fn(loss_fn, delta)
    unique = None
    if unique_tokens is not None:
        unique = unique_column(unique_tokens, n)
    elif excess_params:
        raise DataError("excess_params belongs to repeated data: give unique_tokens")
    u, v = np.log(N), np.log(D)
    centre = [float((w * a).sum() / n) for a in (u, v, np.log(L))]
    surface = Surface(centre[0], centre[1], float(np.exp(centre[2])), unique is not None, excess_params)
    _enough(surface, N, D, L, unique, G)
    points = Points(u, v, None if unique is None else np.log(unique), np.log(L))
    fitted = fit_surface(surface, points, w, loss_fn, delta)
    theta = fitted.theta
    residuals = residual_model(surface, points)(theta[None], np.zeros(1, int))[0][0]

    draws = None
    redrawn = unconverged = 0
    if bootstrap:
        counts, redrawn = group_weights(codes, bootstrap, seed, (N, 3), (D, 3))
        draws, unconverged = refit(surface, points, theta, counts * w, loss_fn, delta)

    uncertainty: SurfaceInterval | None = None
    covariance = np.full((surface.size, surface.size), np.nan)
    if fitted.converged or fitted.floorless:
        if loss_fn == "squared":
            profile = ProfileSurface.of(surface, points, w, theta, codes)
            uncertainty = profile
            covariance = profile.bread * profile.variance
            if profile.clusters is not None:
                covariance = profile.clusters.cov
        elif draws is not None:
            uncertainty = ReplicateSurface(draws, residuals, G)
            covariance = np.asarray(np.cov(draws.T))
    replicates = None
    if draws is not None:
        replicates = surface.natural(draws)
        with np.errstate(over="ignore"):
            replicates[:, 1:3] = np.exp(replicates[:, 1:3])
    return ParametricLaw(
        N, D, L, unique, w, G, surface.params(theta), fitted.objective, residuals, fitted.converged,
        fitted.status, loss_fn, delta, theta, covariance, surface, uncertainty, replicates, redrawn,
        unconverged,
    )  # fmt: skip


def unique_column(unique_tokens: ArrayLike, n: int) -> Floats:
    """``unique_tokens`` for n points: one number for all, or one each.

    Raises:
        DataError: another length, NaN or not positive.
    """
    column = np.asarray(unique_tokens, dtype=np.float64)
    if column.shape not in ((), (1,), (n,)):
        raise DataError(f"unique_tokens: expected one number or {n}, got shape {column.shape}")
    return positive(np.broadcast_to(column, (n,)), "unique_tokens")


def _enough(surface: Surface, N: Floats, D: Floats, L: Floats, unique: Floats | None, G: int) -> None:
    """What the form needs of its data."""
    form = "L = E + A/N^α + B/D^β"
    P = surface.size
    if len(L) <= P:
        raise DataError(f"{form} has {P} parameters and needs at least {P + 1} points, got {len(L)}")
    for name, column in (("params", N), ("tokens", D)):
        distinct = np.unique(column)
        if len(distinct) < 3:
            which = " and ".join(f"{x:g}" for x in distinct)
            raise DataError(f"{form} needs at least 3 distinct {name}, got {len(distinct)} ({which})")
    if G < 3:
        raise DataError(f"{form} needs at least 3 independent groups (runs), got {G}")
    if np.ptp(L) <= 16 * np.finfo(np.float64).eps * L.max():
        raise DataError("loss does not change at all: no exponents to fit")
    u, v = np.log(N), np.log(D)
    if 1 - abs(float(np.corrcoef(u, v)[0, 1])) < 1e-9:
        raise DataError(
            "params and tokens move together (D is a power of N): their terms cannot be told apart"
        )
    if unique is not None and (unique >= D).all():
        raise DataError(
            "unique_tokens: no row has more tokens than unique ones, nothing repeats; leave it out"
        )
    if surface.excess and unique is not None and len(np.unique(np.minimum(unique, D))) < 2:
        raise DataError("excess_params needs at least 2 distinct unique_tokens, got 1")
