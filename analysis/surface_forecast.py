"""A surface is trusted as far as it has predicted: hide the largest runs, forecast them, show the error.

- What is hidden is a *unit*: a run with all its points where groups are given, else a point. Units
  are ranked by the largest C among their points; ties at the cut are hidden together.
- The forecast is of a new run, so its interval holds the runs' own scatter beside the law's uncertainty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis.bootstrap import group_codes
from analysis.errors import DataError, Floats, positive, same_length
from analysis.parametric import ParametricLaw, fit_parametric, unique_column
from analysis.solver import LossFn


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What was forecast for each hidden point, by growing C, and what came."""

    law: ParametricLaw
    """Fitted on the rest."""
    rows: np.ndarray
    """Positions of the hidden points in the data given."""
    params: Floats
    tokens: Floats
    flops: Floats
    predicted: Floats
    low: Floats
    """NaN where the law has no interval; ``law.no_interval`` says why."""
    high: Floats
    actual: Floats
    level: float

    @property
    def error(self) -> Floats:
        """predicted/actual − 1."""
        return np.asarray(self.predicted / self.actual - 1)

    @property
    def worst(self) -> float:
        """Largest |error|."""
        return float(np.abs(self.error).max())

    @property
    def inside(self) -> np.ndarray:
        """Which points lie in their interval; False where there is none."""
        return np.asarray((self.low <= self.actual) & (self.actual <= self.high))

    @property
    def coverage(self) -> float:
        """Share of the hidden points inside; NaN where the law has no interval."""
        return float("nan") if np.isnan(self.low).any() else float(self.inside.mean())

    def summary(self) -> str:
        """One line a point, and the law's status."""
        lines = [f"{len(self.law.loss)} points of smaller runs; {self.law.status}"]
        if why := self.law.no_interval(self.level):
            lines.append(f"no interval: {why}")
        for k in range(len(self.rows)):
            verdict = "" if np.isnan(self.low[k]) else ", inside" if self.inside[k] else ", outside"
            lines.append(
                f"C {self.flops[k]:.4g} (N {self.params[k]:.4g}, D {self.tokens[k]:.4g}): "
                f"{self.predicted[k]:.5g} [{self.low[k]:.5g}, {self.high[k]:.5g}] at {self.level:.0%}, "
                f"reached {self.actual[k]:.5g} ({self.error[k]:+.2%}{verdict})"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        import pandas as pd

        columns = ("flops", "params", "tokens", "predicted", "low", "high", "actual", "error", "inside")
        table = pd.DataFrame({name: getattr(self, name) for name in columns})
        return f"{table.to_html(index=False)}<p>{self.law.status}</p>"


def hold_out(
    params: ArrayLike,
    tokens: ArrayLike,
    loss: ArrayLike,
    flops: ArrayLike | None = None,
    loss_fn: LossFn = "huber",
    delta: float = 1e-3,
    unique_tokens: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    hide: int = 1,
    level: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
    excess_params: bool = False,
) -> HeldOut:
    """Fit the smaller units, forecast the ``hide`` largest.

    Args:
        params, tokens, loss, loss_fn, delta, unique_tokens, groups, weights, seed, excess_params: as for
            ``fit_parametric``.
        flops: C, which ranks the units; 6·N·D for None.
        hide: how many of the largest units are hidden.
        level: of the intervals.
        bootstrap: replicates, for Huber's loss; squares do not need them.

    Raises:
        DataError: nothing or everything hidden; too little left for the form.
    """
    N, D, L = positive(params, "params"), positive(tokens, "tokens"), positive(loss, "loss")
    C = 6 * N * D if flops is None else positive(flops, "flops")
    same_length(params=N, tokens=D, loss=L, flops=C)
    n = len(L)
    codes = group_codes(groups, n)
    unique = None
    if unique_tokens is not None:
        unique = unique_column(unique_tokens, n)
    if weights is not None:
        same_length(loss=L, weights=positive(weights, "weights"))
    size = np.zeros(int(codes.max(initial=-1)) + 1)
    np.maximum.at(size, codes, C)
    if not 0 < hide < len(size):
        raise DataError(
            f"hide must lie between 1 and {len(size) - 1} (units there are, less one), got {hide}"
        )
    cut = np.sort(size)[-hide]
    hidden = size[codes] >= cut
    kept = ~hidden
    if not kept.any():
        raise DataError("all units have the same compute: none is larger, nothing to forecast")
    law = fit_parametric(
        N[kept],
        D[kept],
        L[kept],
        loss_fn,
        delta,
        None if unique is None else unique[kept],
        None if groups is None else codes[kept],
        None if weights is None else np.asarray(weights)[kept],
        bootstrap if loss_fn == "huber" else 0,
        seed,
        excess_params,
    )
    rows = np.flatnonzero(hidden)
    rows = rows[np.argsort(C[rows], kind="stable")]
    at = (N[rows], D[rows], None if unique is None else unique[rows])
    if law.no_interval(level):
        value = law.value(*at)
        low = high = np.full(len(rows), np.nan)
    else:
        found = law.predict(*at, level=level, observation=True)
        value, low, high = found.value, found.low, found.high
    return HeldOut(law, rows, N[rows], D[rows], C[rows], value, low, high, L[rows], level)
