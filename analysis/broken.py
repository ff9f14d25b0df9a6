"""A power law with one smooth break, and the choice between forms by what they forecast.

- ``log L = log L_b + α₁(u − u_b) + (α₂ − α₁) w log(1 + e^((u − u_b)/w))`` with u = log X: the
  exponent goes from α₁ to α₂ around X_b. It is Caballero et al. 2022 (2210.14891, eq. 1) with
  one break and no offset: c₀ = −α₁, c₁ = α₁ − α₂, d₁ = X_b, f₁ = w.
- The width w is fixed, 0.3 unless told (nine tenths of the change within a factor 6 of X): five to
  a dozen rungs do not carry a fifth parameter. For the same reason X_b stays between the second
  rung and the last but one; there it rests when there is no break, and the status says so.
- At each X_b the law is linear: the fit is a search along X_b, and intervals are the profile
  likelihood's (union of the lines' ellipses over X_b, n − 4 degrees of freedom), one point per run.
  Of 400 studies with a break from −0.05 to −0.1, noise 0.2 %, the 95 % intervals of both
  exponents, the break and a forecast at twice the largest X held in 93.8 to 94.5 % (8 rungs) and
  92.8 to 95.8 % (12): ``benchmarks/coverage_choices.py broken``.
- ``choose_form`` lets every form forecast the next rung from all smaller ones, and takes the
  simplest whose mean squared log error is within one standard error of the best's (the rule of
  Breiman et al. 1984, §3.4.3; the error is that of the paired difference over rungs). Of 240
  studies of 8, 12 or 16 rungs (noise 0.1 and 0.3 %) a plain power law was called one in 91 %; of
  240 with an exponent that doubles half way, all were called broken (``coverage_choices.py choose``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from analysis.bootstrap import group_codes
from analysis.errors import DataError, Floats, positive, same_length
from analysis.intervals import bracket, t_quantile
from analysis.powerlaw import Prediction, fit_power_law

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Form = Literal["power", "offset", "broken"]
FORMS: dict[Form, int] = {"power": 3, "offset": 4, "broken": 5}
"""Simplest first -> distinct X each needs."""
EQUATIONS: dict[Form, str] = {
    "power": "L = (βX)^α", "offset": "L = L∞ + (βX)^α", "broken": "power law with one break",
}  # fmt: skip
LEAST_FORECASTS = 3


@dataclass(frozen=True, eq=False)
class BrokenLaw:
    """A fitted law with one break."""

    x: Floats
    y: Floats
    params: Mapping[str, float]
    """alpha and alpha_after, the exponents below and above; break (X's unit); loss_break, where the
    two straight lines meet (L's unit)."""
    width: float
    """w, of the bend, in log X."""
    objective: float
    """Σ r²/2 of the log residuals."""
    residuals: Floats
    """log L̂ − log L."""
    groups: int
    converged: bool
    status: str

    def value(self, x: ArrayLike) -> Floats:
        """L at ``x``."""
        p = self.params
        z = np.log(np.asarray(x, dtype=np.float64)) - np.log(p["break"])
        bend = self.width * np.logaddexp(0.0, z / self.width)
        return np.asarray(p["loss_break"] * np.exp(p["alpha"] * z + (p["alpha_after"] - p["alpha"]) * bend))

    def no_interval(self, level: float = 0.95) -> str:
        """Why there is no interval; empty if there is one."""
        if not 0 < level < 1:
            raise DataError(f"level must lie between 0 and 1, got {level}")
        if self.groups < len(self.x):
            return "several points per run, which a profile likelihood would take for independent"
        return ""

    def interval(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Intervals of ``params``.

        Raises:
            DataError: ``no_interval`` says why.
        """
        at, theta, inverse, q = self._region(level)
        half = np.sqrt(q[:, None] * np.einsum("spp->sp", inverse))
        after, spread = theta[:, 1] + theta[:, 2], inverse[:, 1, 1] + inverse[:, 2, 2] + 2 * inverse[:, 1, 2]
        above = np.sqrt(q * spread)
        return {
            "alpha": _range(theta[:, 1], half[:, 1]),
            "alpha_after": _range(after, above),
            "break": (float(np.exp(at.min())), float(np.exp(at.max()))),
            "loss_break": _exp(_range(theta[:, 0], half[:, 0])),
        }

    def predict(self, x: ArrayLike, level: float = 0.95, observation: bool = False) -> Prediction:
        """L at ``x`` with an interval: of the law, or of one new run with ``observation``.

        Raises:
            DataError: as ``interval``.
        """
        x_n = np.atleast_1d(positive(np.atleast_1d(x), "x"))
        at, theta, inverse, q = self._region(level)
        X = _design(np.log(x_n), at, self.width)
        line = np.einsum("snp,sp->sn", X, theta)
        half = np.sqrt(q[:, None] * (np.einsum("snp,spq,snq->sn", X, inverse, X) + observation))
        low, high = np.exp((line - half).min(0)), np.exp((line + half).max(0))
        return Prediction(x_n, self.value(x_n), low, high, level, observation)

    def rows(self, level: float = 0.95) -> list[tuple[str, float, float, float]]:
        """(name, value, low, high) of every parameter; NaN bounds where there is no interval."""
        bounds = {} if self.no_interval(level) else self.interval(level)
        nothing = (float("nan"), float("nan"))
        return [(name, value, *bounds.get(name, nothing)) for name, value in self.params.items()]

    def summary(self, level: float = 0.95) -> str:
        """The fit as text."""
        why = self.no_interval(level)
        method = f"none: {why}" if why else f"profile likelihood, {len(self.x) - 4} degrees of freedom"
        lines = [
            f"power law with one break, width {self.width:g} in log X",
            f"points {len(self.x)}, independent {self.groups}",
            f"objective {self.objective:.6e}, status: {self.status}",
            f"{level:.0%} intervals: {method}",
        ]
        lines += [
            f"  {name:12s}{value:12.5g}{bracket(low, high)}" for name, value, low, high in self.rows(level)
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        import html

        import pandas as pd

        table = pd.DataFrame(self.rows(), columns=["parameter", "value", "low", "high"])
        return f"{table.to_html(index=False)}<p>{html.escape(self.status)}</p>"

    def plot(self, ax: Axes, **options: Any) -> None:
        """Points, curve, band and break; of a fit without a break the points alone, and its status."""
        from analysis.fit_plots import draw_broken

        draw_broken(ax, self, **options)

    def _region(self, level: float) -> tuple[Floats, Floats, Floats, Floats]:
        """log X_b inside the region, the lines and (XᵀX)⁻¹ there, and what is left of the threshold."""
        if why := self.no_interval(level):
            raise DataError(f"this law has no interval: {why}")
        u, v = np.log(self.x), np.log(self.y)
        freedom = len(u) - 4
        rss = 2 * self.objective
        allowed = rss * (1 + float(t_quantile(float(freedom), level)) ** 2 / freedom) + len(u) * 1e-20
        low, high = _room(u)
        best = np.log(self.params["break"])
        near = best + np.concatenate([-np.geomspace(1e-9, 1, 60), [0.0], np.geomspace(1e-9, 1, 60)]) * (
            high - low
        )
        at = np.unique(np.clip(np.concatenate([near, np.linspace(low, high, 400)]), low, high))
        found, theta, inverse = _lines(u, v, at, self.width)
        keep = found <= allowed
        keep[np.argmin(np.abs(at - best))] = True
        return at[keep], theta[keep], inverse[keep], np.maximum(allowed - found[keep], 0.0)


def fit_broken_power_law(
    x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None, width: float = 0.3
) -> BrokenLaw:
    """Fit a power law with one smooth break (module docstring), by least squares of log L.

    Args:
        x: the scale X; positive.
        y: loss or error rate L; positive.
        groups: the run of each point; with several points per run there are no intervals.
        width: w, of the bend in log X.

    Raises:
        DataError: NaN or non-positive values (rows named), fewer than five distinct x or
            independent groups, a width that is not positive.
    """
    x_n, y_n = positive(x, "x"), positive(y, "y")
    same_length(x=x_n, y=y_n)
    if not width > 0:
        raise DataError(f"width must be positive, got {width}")
    codes = group_codes(groups, len(x_n))
    runs = int(codes.max(initial=-1)) + 1
    for have, what in ((len(np.unique(x_n)), "distinct x"), (runs, "independent groups (runs)")):
        if have < FORMS["broken"]:
            raise DataError(f"a law with a break needs at least {FORMS['broken']} {what}, got {have}")
    u, v = np.log(x_n), np.log(y_n)
    low, high = _room(u)
    at = np.linspace(low, high, 400)
    step = at[1] - at[0]
    # The profile over X_b is smooth but may have several valleys: a fine grid first, then its best.
    for _ in range(9):
        rss, theta, _ = _lines(u, v, at, width)
        best = int(np.argmin(rss))
        centre, step = at[best], step / 8
        at = np.unique(np.clip(centre + step * np.arange(-12, 13), low, high))
    rss, theta, _ = _lines(u, v, np.array([centre]), width)
    log_level, alpha, change = (float(c) for c in theta[0])
    edge = 1e-6 * (high - low)
    straight = float(((v - np.polyval(np.polyfit(u, v, 1), u)) ** 2).sum())
    if straight <= float(rss[0]) * (1 + 1e-9) + len(u) * 1e-24:
        converged, status = False, "no break found: a straight line fits as well"
    elif centre <= low + edge or centre >= high - edge:
        rung = "second" if centre <= low + edge else "last but one"
        converged, status = False, f"no break found: it rests at the {rung} distinct x, the end of its room"
    else:
        converged, status = True, "converged"
    params = {
        "alpha": alpha, "alpha_after": alpha + change, "break": float(np.exp(centre)),
        "loss_break": float(np.exp(log_level)),
    }  # fmt: skip
    residuals = _design(u, np.array([centre]), width)[0] @ theta[0] - v
    return BrokenLaw(
        x_n, y_n, params, width, 0.5 * float(residuals @ residuals), residuals, runs, converged, status
    )


@dataclass(frozen=True, eq=False)
class FormChoice:
    """Out-of-sample errors of every form, and the one chosen."""

    chosen: Form
    errors: Mapping[Form, Floats]
    """log L̂ − mean log L of each forecast rung."""
    rungs: Floats
    """The X that were forecast, each from all smaller ones."""
    unconverged: Mapping[Form, int]
    """Fits among the forecasts that did not converge; their forecasts count all the same."""

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per form: root mean square error, its excess over the best and the error of that."""
        import pandas as pd

        best = _best(self.errors)
        lines = []
        for form, error in self.errors.items():
            gap = error**2 - self.errors[best] ** 2
            lines.append(
                {
                    "form": form, "equation": EQUATIONS[form], "rungs": len(error),
                    "rms_log_error": float(np.sqrt((error**2).mean())), "excess": float(gap.mean()),
                    "standard_error": _standard_error(gap), "unconverged": self.unconverged[form],
                    "chosen": form == self.chosen,
                }
            )  # fmt: skip
        return pd.DataFrame(lines)

    def summary(self) -> str:
        """The choice as text."""
        rows = [
            f"  {form:8s}rms log error {np.sqrt((e**2).mean()):.2e}, {self.unconverged[form]} not converged"
            for form, e in self.errors.items()
        ]
        return "\n".join(
            [
                f"chosen: {self.chosen}, the simplest within one standard error of the best "
                f"({_best(self.errors)}) over {len(self.rungs)} rungs, each forecast from all smaller",
                *rows,
            ]
        )

    def _repr_html_(self) -> str:
        return f"{self.table.to_html(index=False)}<p>{self.summary().splitlines()[0]}</p>"


def choose_form(
    x: ArrayLike,
    y: ArrayLike,
    forms: tuple[Form, ...] = ("power", "offset", "broken"),
    groups: ArrayLike | None = None,
) -> FormChoice:
    """The simplest form whose forecasts of the next rung are as good as the best's.

    Args:
        x, y: as for the fits; a rung is one value of x.
        forms: to choose between.
        groups: the run of each point.

    Raises:
        DataError: as the fits; an unknown form; fewer than three rungs left to forecast (so that
            "broken" needs eight distinct x, "offset" seven, "power" six).
    """
    x_n, y_n = positive(x, "x"), positive(y, "y")
    same_length(x=x_n, y=y_n)
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise DataError(f"forms: expected some of {', '.join(FORMS)}, got {', '.join(unknown) or 'none'}")
    codes = group_codes(groups, len(x_n))
    rungs = np.unique(x_n)
    least = max(FORMS[form] for form in forms)
    if len(rungs) < least + LEAST_FORECASTS:
        raise DataError(
            f"choosing between {', '.join(forms)} needs {least + LEAST_FORECASTS} distinct x "
            f"({least} to fit, {LEAST_FORECASTS} to forecast), got {len(rungs)}"
        )
    errors: dict[Form, list[float]] = {form: [] for form in FORMS if form in forms}
    unconverged = dict.fromkeys(errors, 0)
    for rung in rungs[least:]:
        seen = x_n < rung
        came = float(np.log(y_n[x_n == rung]).mean())
        for form in errors:
            said, converged = _forecast(form, x_n[seen], y_n[seen], codes[seen], float(rung))
            errors[form].append(np.log(said) - came)
            unconverged[form] += not converged
    found = {form: np.array(e) for form, e in errors.items()}
    best = _best(found)
    for form, error in found.items():
        gap = error**2 - found[best] ** 2
        if gap.mean() <= _standard_error(gap):
            return FormChoice(form, found, rungs[least:], unconverged)
    raise AssertionError("the best form is within any error of itself")


def _forecast(form: Form, x: Floats, y: Floats, codes: np.ndarray, rung: float) -> tuple[float, bool]:
    if form == "broken":
        broken = fit_broken_power_law(x, y, codes)
        return float(broken.value(rung)), broken.converged
    law = fit_power_law(x, y, offset=form == "offset", groups=codes)
    return float(law.value(rung)), law.converged


def _best(errors: Mapping[Form, Floats]) -> Form:
    return min(errors, key=lambda form: float((errors[form] ** 2).mean()))


def _standard_error(values: Floats) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _room(u: Floats) -> tuple[float, float]:
    """Where log X_b may lie: from the second distinct x to the last but one."""
    distinct = np.unique(u)
    return float(distinct[1]), float(distinct[-2])


def _design(u: Floats, at: Floats, width: float) -> Floats:
    """(S, n, 3): 1, u − u_b and the bend."""
    z = u - at[:, None]
    return np.stack([np.ones_like(z), z, width * np.logaddexp(0.0, z / width)], 2)


def _lines(u: Floats, v: Floats, at: Floats, width: float) -> tuple[Floats, Floats, Floats]:
    """At each log X_b: RSS (S,), the line (S, 3), (XᵀX)⁻¹ (S, 3, 3)."""
    X = _design(u, at, width)
    Q, R = np.linalg.qr(X)
    R_inverse = np.linalg.inv(R)
    theta = np.einsum("spq,snq,n->sp", R_inverse, Q, v)
    rss = ((np.einsum("snp,sp->sn", X, theta) - v) ** 2).sum(1)
    return rss, theta, np.matmul(R_inverse, R_inverse.transpose(0, 2, 1))


def _range(value: Floats, half: Floats) -> tuple[float, float]:
    return float((value - half).min()), float((value + half).max())


def _exp(bounds: tuple[float, float]) -> tuple[float, float]:
    return float(np.exp(bounds[0])), float(np.exp(bounds[1]))
