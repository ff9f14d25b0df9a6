"""A backtest never sees what it forecasts."""

from __future__ import annotations

import numpy as np
import pytest

from analysis import DataError, backtest, fit_power_law

X = 73728.0 * np.arange(1, 9) ** 3.0
Y = (1e-9 * X) ** -0.05 * np.exp(0.001 * np.sin(9 * np.arange(8)))


def test_hidden_runs_do_not_touch_the_forecast() -> None:
    spoiled = Y.copy()
    spoiled[-2:] = 9.0
    honest, blind = backtest(X, Y, hide=2), backtest(X, spoiled, hide=2)
    assert [f.predicted for f in honest] == [f.predicted for f in blind]
    assert honest.coverage == 1.0
    assert honest.worst < 0.01
    assert blind.coverage == 0.0
    assert blind.forecasts[0].actual == 9.0
    assert honest.forecasts[0].law.alpha == fit_power_law(X[:-2], Y[:-2]).alpha


@pytest.mark.parametrize(("offset", "count"), [(False, 5), (True, 4)])
def test_rolling_forecasts_each_rung_from_the_smaller(offset: bool, count: int) -> None:
    rolled = backtest(X, Y, offset=offset, rolling=True)
    assert [f.trained for f in rolled] == list(range(8 - count, 8))
    assert [f.x for f in rolled] == X[-count:].tolist()


def test_seeds_of_a_rung_are_hidden_together() -> None:
    x, y = np.repeat(X[:5], 2), np.repeat(Y[:5], 2) * np.tile([0.999, 1.001], 5)
    (only,) = backtest(x, y)
    assert only.runs == 2
    assert only.trained == 4
    assert len(only.law.x) == 8


def test_an_interval_for_one_run_is_judged_run_by_run() -> None:
    """Three new runs rarely all lie in an interval that is made for one."""
    x, y = np.append(X, [X[-1]] * 2), np.append(Y, [Y[-1], 9.0])
    (only,) = backtest(x, y)
    assert (only.inside, only.runs) == (2, 3)
    assert only.verdict == "2 of 3 runs inside"
    assert only.actual == pytest.approx((2 * Y[-1] + 9) / 3)
    found = backtest(x, y)
    assert found.coverage == 2 / 3
    assert "2 of 3 runs inside" in found.summary()


def test_too_few_rungs() -> None:
    with pytest.raises(DataError, match="needs 3 smaller distinct x, got 3 in all"):
        backtest(X[:3], Y[:3])
    with pytest.raises(DataError, match="at least 1"):
        backtest(X, Y, hide=0)
