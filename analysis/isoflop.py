"""IsoFLOP: at each compute budget the N of lowest loss, and the laws these minima obey.

- ``N_opt ∝ C^a``, ``D_opt ∝ C^b`` and ``L_opt(C)``: approach 2 of Hoffmann et al. 2022
  (2203.15556, §3.2). Points are of one budget when their C agree within ``tolerance``, or by ``budget``.
- ``parabola``: least squares of L on (1, log N, log² N), as there. L and not log L, because a
  valley ``E + C^-γ f(log N − log N_opt)`` then has the same shape at every budget: sampled at
  the same places around its floor, the parabola misses each floor by the same factor and the
  exponent not at all. ``spline``: Akima's through the mean loss at each N, as Porian et al. 2024
  (2406.19146); it assumes no shape and passes all noise on.
- A minimum outside the sampled N is an extrapolation, and that of a parabola opening downwards a
  maximum: both are rejected, counted and named with the reason. Three accepted budgets make a law.
- Intervals: Student's t over budgets around the line of log N_opt, log D_opt, log L_opt on log C,
  weighted by the variance of each minimum (delta method; a spline has none and weighs all alike);
  of L_opt above a free offset profile likelihood. They need no known noise, but budgets with runs
  of their own, and they know nothing of the parabola's bias. In seven designs without drift (4 to 9
  budgets of 5 or 7 runs) the 95 % interval of ``a`` held in 93.8 to 95.0 % of 1000 studies. With α
  0.2, β 0.4, N over 2 decades and their middle leaving the optimum by 0.1 decades from budget to
  budget it held in 3.3 % (``benchmarks/coverage_isoflop.py`` printed these figures and those below).
- When runs serve several budgets (checkpoints read off at several C) pass ``groups``: each run's
  residuals go through the derivatives of its parabolas and the line as one, t with G − 3 degrees.
  With 6, 8, 12 runs at 5 budgets over 2 decades of N that held in 99.3, 95.7, 95.1 % of studies,
  the interval by budget in 36, 38, 45 %.
- The parabola is biased (Czech et al. 2026, 2603.22339): ``BIAS_NOTE``, ``IsoFlop.bias_under``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.bootstrap import group_codes
from analysis.budgets import Budget, Surface, group_budgets, lowest, lowest_of_surface
from analysis.errors import DataError, Floats, positive, same_length
from analysis.intervals import Bounds, LineInterval, bracket, t_quantile
from analysis.powerlaw import PowerLaw, Prediction, fit_power_law
from analysis.valleys import LEAST, Parabola, ValleyMethod

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

NAMES = {"params": "a", "tokens": "b", "loss": "loss"}
"""Law -> name of its exponent."""
BIAS_NOTE = (
    "The parabola is biased even without noise (arXiv 2603.22339), the more the wider the sampled N and "
    "the less alike α and β are. Nine N over ± one decade around the true optimum, no noise: on "
    "Chinchilla's surface (α 0.347, β 0.367) N_opt comes out 1.3 % low, with α 0.2 and β 0.4 12 % low; "
    "over ± 0.3 decades 0.1 % and 1.2 %. The exponent a is exact there, and not where the grid drifts "
    "off the optimum as C grows. bias_under(fit_parametric(...)) gives the bias at your own points; the "
    "parametric surface itself has none of it."
)


@dataclass(frozen=True)
class NoInterval:
    """Stands where a law can have no interval, and says why."""

    why: str

    @property
    def method(self) -> str:
        return "none: " + self.why

    def refusal(self, level: float) -> str:
        return self.why

    def params(self, level: float) -> dict[str, tuple[float, float]]:
        raise DataError(self.why)

    def predict(self, z: Floats, level: float, observation: bool) -> Bounds:
        raise DataError(self.why)


@dataclass(frozen=True, eq=False)
class IsoFlop:
    """Minima and their laws. ``laws`` is empty where fewer than three budgets were accepted."""

    points: Mapping[str, Floats]
    """params, tokens, loss, flops as used."""
    budgets: tuple[Budget, ...]
    """By growing C."""
    laws: Mapping[str, PowerLaw]
    """params: N_opt(C), tokens: D_opt(C), loss: L_opt(C)."""
    method: ValleyMethod
    grouping: str
    """How points became budgets, in words."""
    convention: str
    """Where C and D come from."""
    by_run: bool
    """Whether runs serve several budgets, so that intervals are by run and not by budget."""
    status: str

    @property
    def accepted(self) -> tuple[Budget, ...]:
        return tuple(b for b in self.budgets if b.accepted)

    @property
    def converged(self) -> bool:
        """Whether there are laws, all of them fitted to their end."""
        return bool(self.laws) and all(law.converged for law in self.laws.values())

    @property
    def params(self) -> dict[str, float]:
        """Exponents of C: ``a`` of N_opt, ``b`` of D_opt, ``loss`` of L_opt (above its offset)."""
        return {NAMES[key]: law.alpha for key, law in self._laws.items()}

    def no_interval(self, level: float = 0.95) -> str:
        """Why there are no intervals; empty if there are."""
        if not self.laws:
            return self.status
        return next((why for law in self.laws.values() if (why := law.no_interval(level))), "")

    @property
    def interval_method(self) -> str:
        """How the intervals are made, or why there are none."""
        if why := self.no_interval():
            return f"none: {why}"
        if self.by_run:
            return self.laws["params"].interval_method
        budgets = len(self.accepted)
        line = f"Student's t over {budgets} budgets, {budgets - 2} degrees of freedom"
        if self.laws["loss"].kind != "free":
            return line
        profile = f"profile likelihood over {budgets} budgets, {budgets - 3} degrees of freedom"
        return f"{line} (L_opt above its free offset: {profile})"

    def interval(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Intervals of ``params``.

        Raises:
            DataError: ``no_interval`` says why.
        """
        return {NAMES[key]: law.interval(level)["alpha"] for key, law in self._laws.items()}

    def predict(self, flops: ArrayLike, level: float = 0.95) -> dict[str, Prediction]:
        """N_opt, D_opt and L_opt (params, tokens, loss) at C = ``flops``, with intervals of the laws.

        Raises:
            DataError: as ``interval``.
        """
        return {key: law.predict(flops, level) for key, law in self._laws.items()}

    @property
    def bias_note(self) -> str:
        """What the method gets wrong without any noise; empty for the spline."""
        return BIAS_NOTE if self.method == "parabola" else ""

    def bias_under(self, surface: Surface) -> dict[str, float]:
        """This method's bias at these very points, if ``surface`` were the truth; no noise.

        Returns ``a`` and ``b``: exponent found − true; ``params``: mean of N_opt found / true − 1.
        True minima are of the surface along each budget, over ± 3 decades of N.

        Raises:
            DataError: fewer than three budgets are accepted on the surface.
        """
        N, D, C = self.points["params"], self.points["tokens"], self.points["flops"]
        found = [lowest(b.index, N, D, np.asarray(surface.value(N, D)), C, self.method) for b in self.budgets]
        kept = [b for b in found if b.accepted]
        if len(kept) < 3:
            raise DataError(
                f"on this surface {len(kept)} of {len(found)} budgets have a minimum: no exponents"
            )
        true_n, true_d = np.array([lowest_of_surface(b, N, D, C, surface) for b in kept]).T
        flops, n = [b.flops for b in kept], np.array([b.params for b in kept])
        laws = _laws_of(kept, False)
        weights = laws["params"].weights
        return {
            "a": laws["params"].alpha - fit_power_law(flops, true_n, weights=weights).alpha,
            "b": laws["tokens"].alpha - fit_power_law(flops, true_d, weights=weights).alpha,
            "params": float(np.exp(np.log(n / true_n).mean()) - 1),
        }

    @cached_property
    def noise(self) -> tuple[float, int]:
        """Standard deviation of a point's relative residual, pooled over parabolas, and its freedom."""
        curves = [b.curve for b in self.budgets if isinstance(b.curve, Parabola)]
        freedom = sum(c.freedom for c in curves)
        return (float(np.sqrt(sum(c.rss for c in curves) / freedom)) if freedom else float("nan")), freedom

    @property
    def table(self) -> pd.DataFrame:
        """One row per budget: C and its spread, points, sampled N, the minimum, accepted or why not.

        ``params_low`` and ``params_high`` bound N_opt at 95 %: Fieller's interval of the parabola
        alone, noise pooled over budgets; unbounded where its curvature may be 0, NaN for a spline.
        """
        import pandas as pd

        noise, freedom = self.noise
        q = float(t_quantile(float(freedom), 0.95) * noise) ** 2 if freedom else float("nan")
        lines = []
        for b in self.budgets:
            N = self.points["params"][b.index]
            low = high = float("nan")
            if freedom and isinstance(b.curve, Parabola) and b.accepted:
                with np.errstate(over="ignore"):
                    low, high = (float(v) for v in np.exp(b.curve.place_interval(q)))
            lines.append(
                {
                    "flops": b.flops, "spread": b.spread, "points": len(N), "distinct": b.distinct,
                    "params_from": N.min(), "params_to": N.max(), "params_opt": b.params,
                    "params_low": low, "params_high": high, "tokens_opt": b.tokens, "loss_opt": b.loss,
                    "accepted": b.accepted, "reason": b.reason,
                }
            )  # fmt: skip
        return pd.DataFrame(lines)

    def rows(self, level: float = 0.95) -> list[tuple[str, float, float, float]]:
        """(name, value, low, high) of every exponent; NaN bounds where there is no interval."""
        if not self.laws:
            return []
        nothing = (float("nan"), float("nan"))
        bounds = {} if self.no_interval(level) else self.interval(level)
        return [(name, value, *bounds.get(name, nothing)) for name, value in self.params.items()]

    def summary(self, level: float = 0.95) -> str:
        """The fit as text."""
        lines = [f"IsoFLOP by {self.method}: {self.status}", f"{self.grouping}; {self.convention}"]
        lines += [
            f"  C = {b.flops:.4g} ({len(b.index)} points, spread {b.spread:.1%}): "
            + (f"N_opt {b.params:.4g}, D_opt {b.tokens:.4g}, L {b.loss:.5g}" if b.accepted else b.reason)
            for b in self.budgets
        ]
        if self.laws:
            lines.append(f"{level:.0%} intervals: {self.interval_method}")
        lines += [
            f"  {_LONG[name]:12s}{value:9.4f}{bracket(low, high, '.4f')}"
            for name, value, low, high in self.rows(level)
        ]
        return "\n".join([*lines, self.bias_note] if self.bias_note else lines)

    def _repr_html_(self) -> str:
        import html

        import pandas as pd

        exponents = pd.DataFrame(
            [(_LONG[name], *rest) for name, *rest in self.rows()], columns=["law", "exponent", "low", "high"]
        )
        notes = "".join(
            f"<p>{html.escape(text)}</p>"
            for text in (self.status, f"{self.grouping}; {self.convention}", self.bias_note)
            if text
        )
        return exponents.to_html(index=False) + self.table.to_html(index=False) + notes

    def plot(self, ax: Axes, **options: Any) -> None:
        """Valleys with their minima, rejected ones marked, and the path of optima."""
        from analysis.fit_plots import draw_isoflop

        draw_isoflop(ax, self, **options)

    @property
    def _laws(self) -> Mapping[str, PowerLaw]:
        if not self.laws:
            raise DataError(f"no exponents: {self.status}")
        return self.laws


_LONG = {"a": "N_opt ∝ C^a", "b": "D_opt ∝ C^b", "loss": "L_opt ∝ C^"}


def fit_isoflop(
    params: ArrayLike,
    loss: ArrayLike,
    tokens: ArrayLike | None = None,
    flops: ArrayLike | None = None,
    method: ValleyMethod = "parabola",
    tolerance: float = 0.05,
    budget: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    loss_offset: bool | np.bool_ | float = False,
) -> IsoFlop:
    """Minima of the loss at each budget, and N_opt, D_opt, L_opt as powers of C.

    Args:
        params: N of each point; positive.
        loss: L of each point; positive.
        tokens: D; C/6N where not given.
        flops: C; 6·N·D where not given.
        method: parabola or spline, see the module.
        tolerance: C within this share of one another are one budget.
        budget: instead, a label per point.
        groups: the run of each point, needed where one run gives points to several budgets.
        loss_offset: of L_opt(C), as ``offset`` of ``fit_power_law``.

    Raises:
        DataError: NaN or non-positive values (rows named), unequal lengths, neither D nor C,
            budgets that run into one another, too few distinct N in every budget.
    """
    N, L = positive(params, "params"), positive(loss, "loss")
    if method not in LEAST:
        raise DataError(f"method: expected 'parabola' or 'spline', got {method!r}")
    if tokens is None and flops is None:
        raise DataError("IsoFLOP needs C or D beside N and the loss: pass flops or tokens")
    given = {name: positive(v, name) for name, v in (("tokens", tokens), ("flops", flops)) if v is not None}
    same_length(params=N, loss=L, **given)
    D = given.get("tokens", given["flops"] / (6 * N) if "flops" in given else N)
    C = given.get("flops", 6 * N * D)
    convention = "C and D as given"
    if tokens is None or flops is None:
        convention = "C as given, D = C/6N" if tokens is None else "D as given, C = 6·N·D"
    codes, grouping = group_budgets(C, tolerance, budget)
    members = [np.flatnonzero(codes == k) for k in range(int(codes.max(initial=-1)) + 1)]
    budgets = tuple(
        sorted((lowest(m, N, D, L, C, method) for m in members), key=lambda b: b.flops)
    )  # fmt: skip
    if all(b.curve is None for b in budgets):
        most = max((b.distinct for b in budgets), default=0)
        raise DataError(
            f"the {method} needs {LEAST[method]} distinct N in a budget; of {len(budgets)} budgets "
            f"({grouping}) the fullest has {most}, N within 5 % of one another counted once"
        )
    accepted = [b for b in budgets if b.accepted]
    status = f"{len(accepted)} of {len(budgets)} budgets accepted"
    reasons = [f"C = {b.flops:.3g}: {b.reason}" for b in budgets if b.reason]
    if reasons:
        status += f"; rejected {len(reasons)}: " + "; ".join(reasons)
    laws: dict[str, PowerLaw] = {}
    if len({b.flops for b in accepted}) < 3:
        status = f"no exponents, which need 3 accepted budgets of different C: {status}"
    else:
        laws = _laws_of(accepted, loss_offset)
    runs = None if groups is None else group_codes(groups, len(N))
    by_run = runs is not None and _shared(runs, codes)
    if laws and runs is not None and by_run:
        laws = _by_run(laws, runs, accepted)
    points = {"params": N, "tokens": D, "loss": L, "flops": C}
    return IsoFlop(points, budgets, laws, method, grouping, convention, by_run, status)


def _weights(accepted: list[Budget]) -> tuple[Floats | None, Floats | None]:
    """1/variance of each minimum's log N and log L; None for splines."""
    curves = [b.curve for b in accepted if isinstance(b.curve, Parabola)]
    if len(curves) < len(accepted):
        return None, None
    # The variance of a minimum is that of the noise times the sum of its squared influences.
    variances = np.array([[(part**2).sum() for part in c.influence()] for c in curves])
    return 1 / variances[:, 0], 1 / variances[:, 1]


def _laws_of(accepted: list[Budget], loss_offset: bool | np.bool_ | float) -> dict[str, PowerLaw]:
    flops = [b.flops for b in accepted]
    place, height = _weights(accepted)
    # Comparisons and columns of a table give numpy's bool, which is no number here either.
    loss_offset = bool(loss_offset) if isinstance(loss_offset, np.bool_) else loss_offset
    if height is not None and not isinstance(loss_offset, bool):
        # That law is a line of log(L − offset), whose noise is that of log L times L / (L − offset).
        floor = np.array([b.loss for b in accepted])
        height = height * ((floor - loss_offset) / floor) ** 2
    if loss_offset is True and len(accepted) < 4:
        raise DataError(f"L_opt with a free offset needs 4 accepted budgets, got {len(accepted)}")
    return {
        "params": fit_power_law(flops, [b.params for b in accepted], weights=place),
        "tokens": fit_power_law(flops, [b.tokens for b in accepted], weights=place),
        "loss": fit_power_law(flops, [b.loss for b in accepted], offset=loss_offset, weights=height),
    }


def _shared(runs: NDArray[np.int64], codes: NDArray[np.int64]) -> bool:
    """Whether any run has points in two budgets."""
    return len(np.unique(np.stack([runs, codes]), axis=1).T) > len(np.unique(runs))


def _by_run(
    laws: Mapping[str, PowerLaw],
    runs: NDArray[np.int64],
    accepted: list[Budget],
) -> dict[str, PowerLaw]:
    """The laws with the sandwich covariance over runs, through parabolas and line (module docstring)."""
    G = int(runs.max()) + 1
    freedom = len(np.unique(runs[np.concatenate([b.index for b in accepted])])) - 3
    why = ""
    if any(not isinstance(b.curve, Parabola) for b in accepted):
        why = "runs serve several budgets, and a spline has no residuals to tell their noise by"
    elif freedom < 1:
        why = f"runs serve several budgets: 4 runs are needed, got {freedom + 3}"
    found = {}
    for key, law in laws.items():
        if law.kind == "free":
            why = "runs serve several budgets and the offset is free: fix it"
        if why:
            found[key] = replace(law, groups=G, uncertainty=NoInterval(why))
            continue
        straight = law.uncertainty
        assert isinstance(straight, LineInterval)
        root = np.sqrt(law.weights)
        X = np.stack([np.ones_like(law.x), np.log(law.x) - straight.centre], 1)
        line = np.linalg.pinv(X * root[:, None]) * root
        score = np.zeros((G, 2))
        for b, by_budget in zip(accepted, line.T, strict=True):
            curve = b.curve
            assert isinstance(curve, Parabola)
            place, height = curve.influence()
            # Residuals are smaller than the noise by √(1 − leverage): HC2 (MacKinnon and White 1985).
            rest = 1 - curve.leverage()
            noise = np.where(rest > 1e-9, curve.residuals / np.sqrt(np.maximum(rest, 1e-9)), 0.0)
            if key == "loss":
                own = height * b.loss / (b.loss - law.offset) * noise
            else:
                own = place * (b.slope if key == "tokens" else 1.0) * noise
            np.add.at(score, runs[b.index], own[:, None] * by_budget)
        uncertainty = replace(
            straight,
            cov=score.T @ score,
            freedom=lambda c: np.full(len(c), float(freedom)),
            method=(
                f"Student's t on run-robust errors (HC2), {freedom + 3} runs, {freedom} degrees of freedom"
            ),
        )
        found[key] = replace(law, groups=G, uncertainty=uncertainty)
    return found
