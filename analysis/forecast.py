"""A law is trusted as far as it has predicted: hide the largest runs, forecast them, show the error.

A *rung* is one value of X with all its runs (seeds). The forecast is of a new run, so its
interval holds the runs' own scatter beside the law's uncertainty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis.bootstrap import group_codes
from analysis.errors import DataError, positive
from analysis.powerlaw import PowerLaw, fit_power_law


@dataclass(frozen=True)
class Forecast:
    """One hidden rung: what was said and what came."""

    x: float
    """The hidden X."""
    trained: int
    """Distinct X that the law was fitted on."""
    predicted: float
    low: float
    high: float
    actual: float
    """Mean of the rung's runs."""
    runs: int
    inside: int
    """How many of the ``runs`` lie in the interval, which is made for one."""
    level: float
    law: PowerLaw

    @property
    def error(self) -> float:
        """predicted/actual − 1."""
        return self.predicted / self.actual - 1

    @property
    def verdict(self) -> str:
        """Inside or outside the interval; of several runs, how many were inside."""
        if self.runs == 1:
            return "inside" if self.inside else "outside"
        return f"{self.inside} of {self.runs} runs inside"


@dataclass(frozen=True)
class Backtest:
    """The forecasts, by growing X."""

    forecasts: tuple[Forecast, ...]

    def __iter__(self) -> Iterator[Forecast]:
        return iter(self.forecasts)

    def __len__(self) -> int:
        return len(self.forecasts)

    @property
    def worst(self) -> float:
        """Largest |error|."""
        return max(abs(f.error) for f in self.forecasts)

    @property
    def coverage(self) -> float:
        """Share of the runs that lay in the interval of their rung."""
        return sum(f.inside for f in self.forecasts) / sum(f.runs for f in self.forecasts)

    def summary(self) -> str:
        """One line a forecast."""
        return "\n".join(
            f"x {f.x:.4g} from {f.trained} smaller: {f.predicted:.5g} "
            f"[{f.low:.5g}, {f.high:.5g}] at {f.level:.0%}, "
            f"reached {f.actual:.5g} ({f.error:+.2%}, {f.verdict}); {f.law.status}"
            for f in self.forecasts
        )


def backtest(
    x: ArrayLike,
    y: ArrayLike,
    offset: bool | float = False,
    weights: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    hide: int = 1,
    rolling: bool = False,
    level: float = 0.95,
    bootstrap: int = 0,
    seed: int = 0,
) -> Backtest:
    """Fit the smaller rungs, forecast the larger ones.

    Args:
        x, y, offset, weights, groups, bootstrap, seed: as for ``fit_power_law``.
        hide: how many of the largest rungs are hidden, all at once.
        rolling: instead forecast each rung from all smaller ones, from the first that the form
            can be fitted below.
        level: of the intervals.

    Raises:
        DataError: as ``fit_power_law``, or too few rungs would be left.
    """
    x_n, y_n = positive(x, "x"), positive(y, "y")
    if len(x_n) != len(y_n):
        raise DataError(f"x has {len(x_n)} rows, y has {len(y_n)}")
    rungs = np.unique(x_n)
    least = 4 if offset is True else 3
    if hide < 1:
        raise DataError(f"hide must be at least 1, got {hide}")
    if len(rungs) - (1 if rolling else hide) < least:
        raise DataError(
            f"hiding {1 if rolling else hide} needs {least} smaller distinct x, got {len(rungs)} in all"
        )
    weight = None if weights is None else positive(weights, "weights")
    codes = None if groups is None else group_codes(groups, len(x_n))

    def forecast(below: float, targets: np.ndarray) -> list[Forecast]:
        seen = x_n < below
        law = fit_power_law(
            x_n[seen], y_n[seen], offset,
            None if weight is None else weight[seen], None if codes is None else codes[seen], bootstrap, seed,
        )  # fmt: skip
        said = law.predict(targets, level, observation=True)
        found = []
        for i, target in enumerate(targets):
            came = y_n[x_n == target]
            low, high = float(said.low[i]), float(said.high[i])
            found.append(
                Forecast(
                    float(target), len(np.unique(x_n[seen])), float(said.value[i]), low, high,
                    float(came.mean()), len(came), int(((low <= came) & (came <= high)).sum()), level, law,
                )
            )  # fmt: skip
        return found

    if rolling:
        return Backtest(tuple(f for rung in rungs[least:] for f in forecast(rung, np.array([rung]))))
    hidden = rungs[-hide:]
    return Backtest(tuple(forecast(hidden[0], hidden)))
