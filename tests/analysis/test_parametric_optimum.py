"""What a budget should buy, held-out runs, the figure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import PathCollection

from analysis import DataError
from analysis.errors import Floats
from analysis.parametric import ParametricLaw, fit_parametric
from analysis.plots import figure, styled, to_png
from analysis.surface_forecast import hold_out

DEPTHS = np.repeat(np.arange(1, 14), 4)
N = 73728.0 * DEPTHS**3.0
D = np.tile([1e7, 4e7, 1.6e8, 6.4e8], 13)
LOSS = (2 + 1.5 * (N / N[0]) ** -0.25 + 2 * (D / 1e7) ** -0.35) * np.exp(
    0.003 * np.random.default_rng(4).normal(size=52)
)


@pytest.fixture(scope="module")
def law() -> ParametricLaw:
    return fit_parametric(N, D, LOSS, "squared")


@settings(max_examples=20, deadline=None)
@given(st.floats(14, 24), st.floats(-0.7, 0.7))
def test_no_other_split_of_the_budget_is_better(log10_flops: float, shift: float) -> None:
    law = fit_parametric(N, D, LOSS, "squared")
    best = law.optimal(10**log10_flops)
    assert 6 * best.params * best.tokens == pytest.approx(10**log10_flops)
    assert law.value(best.params, best.tokens) == pytest.approx(best.loss)
    moved = law.value(best.params * np.exp(shift), best.tokens * np.exp(-shift))
    assert moved >= best.loss * (1 - 1e-12)


def test_the_optimum_grows_with_the_compute_exponents(law: ParametricLaw) -> None:
    best = law.optimal([1e18, 1e20])
    a, b = law.compute_exponents
    assert a == pytest.approx(law.beta / (law.alpha + law.beta))
    assert a + b == pytest.approx(1)
    assert np.log(best.params[1] / best.params[0]) / np.log(100) == pytest.approx(a)
    assert np.log(best.tokens[1] / best.tokens[0]) / np.log(100) == pytest.approx(b)


def test_any_cost_per_token_is_minimised_numerically(law: ParametricLaw) -> None:
    by_hand, closed = law.optimal([1e17, 1e19], lambda n: 6 * n), law.optimal([1e17, 1e19])
    np.testing.assert_allclose(by_hand.params, closed.params, rtol=1e-4)
    np.testing.assert_allclose(by_hand.loss, closed.loss, rtol=1e-9)

    def with_attention(n: Floats) -> Floats:
        return np.asarray(4 * n + 3e5 * n ** (1 / 3))

    best = law.optimal(1e17, with_attention)
    assert with_attention(best.params) * best.tokens == pytest.approx(1e17)
    for factor in (0.9, 1.1):
        n = best.params * factor
        assert law.value(n, 1e17 / with_attention(n)) > best.loss
    with pytest.raises(DataError, match="positive FLOPs"):
        law.optimal(1e17, lambda n: -n)
    with pytest.raises(DataError, match="no optimal N within"):
        law.optimal(1e17, lambda n: n**0 * 1e6)
    with pytest.raises(DataError, match="flops: must be positive"):
        law.optimal([1e17, 0])


def test_optima_have_intervals_that_agree_with_the_exponent(law: ParametricLaw) -> None:
    best, bounds = law.optimal(1e19), law.optimal_interval(1e19)
    for name in ("params", "tokens", "loss"):
        low, high = getattr(bounds, name)
        assert low < getattr(best, name) < high
    # With 6·N·D, N·D is fixed: their bounds mirror each other.
    assert bounds.params[0] * bounds.tokens[1] == pytest.approx(1e19 / 6, rel=1e-2)
    numeric = law.optimal_interval(1e19, flops_per_token=lambda n: 6 * n)
    np.testing.assert_allclose(numeric.params, bounds.params, rtol=2e-3)
    np.testing.assert_allclose(numeric.loss, bounds.loss, rtol=1e-5)


def test_with_repeated_data_the_optimum_trains_a_larger_model_on_fewer_tokens() -> None:
    U = np.where(DEPTHS % 2 == 0, 2e6, 2e7)
    repeats = np.maximum(D / np.minimum(U, D) - 1, 0)
    fresh = np.minimum(U, D) * (1 + 10 * (1 - np.exp(-repeats / 10)))
    L = 2 + 1.5 * (N / N[0]) ** -0.25 + 2 * (fresh / 1e7) ** -0.35
    law = fit_parametric(N, D, L, "squared", unique_tokens=U)
    endless, scarce = law.optimal(1e19), law.optimal(1e19, unique_tokens=1e7)
    assert scarce.params > 2 * endless.params
    assert scarce.loss > endless.loss
    plenty = law.optimal(1e19, unique_tokens=1e14)
    assert plenty.params == pytest.approx(endless.params, rel=1e-4)
    with pytest.raises(DataError, match="without repeated data"):
        fit_parametric(N, D, LOSS).value(1e6, 1e8, 1e7)


def test_the_largest_runs_are_hidden_and_forecast() -> None:
    held = hold_out(N, D, LOSS, loss_fn="squared", groups=DEPTHS, hide=2)
    assert set(DEPTHS[held.rows]) == {12, 13}
    assert len(held.law.loss) == 44
    assert (np.diff(held.flops) > 0).all()
    assert held.actual == pytest.approx(LOSS[held.rows])
    assert held.worst < 0.02
    assert held.coverage >= 0.5
    refitted = fit_parametric(N[DEPTHS < 12], D[DEPTHS < 12], LOSS[DEPTHS < 12], "squared")
    assert held.predicted == pytest.approx(refitted.value(N[held.rows], D[held.rows]))
    assert held.summary().count("reached") == 8
    assert "<table" in held._repr_html_()


def test_forecasts_hold_the_new_run_as_often_as_they_say() -> None:
    inside = []
    truth = 2 + 1.5 * (N / N[0]) ** -0.25 + 2 * (D / 1e7) ** -0.35
    for seed in range(30):
        L = truth * np.exp(0.003 * np.random.default_rng(seed).normal(size=52))
        inside.append(hold_out(N, D, L, loss_fn="squared", hide=3).coverage)
    assert 0.88 <= np.mean(inside) <= 0.995


def test_a_forecast_without_an_interval_says_why() -> None:
    held = hold_out(N, D, LOSS, bootstrap=0)
    assert np.isnan(held.coverage)
    assert not held.inside.any()
    assert "no interval: fit it with bootstrap" in held.summary()
    with pytest.raises(DataError, match="hide must lie between 1 and 12"):
        hold_out(N, D, LOSS, groups=DEPTHS, hide=13)
    with pytest.raises(DataError, match="same compute"):
        hold_out(N, D, LOSS, flops=np.full(52, 1e9))


def test_the_figure_shows_every_point_and_names_its_axes(law: ParametricLaw) -> None:
    with styled():
        fig, ax = figure("Loss surface", "", "")
        law.plot(ax, flops_label="exact count", flops_per_token=lambda n: 5 * n)
        (points,) = [c for c in ax.collections if isinstance(c, PathCollection)]
        assert np.shape(points.get_offsets()) == (52, 2)
        assert "FLOP, exact count" in ax.get_xlabel()
        assert "nats per token" in ax.get_ylabel()
        assert any("optimal frontier" in str(line.get_label()) for line in ax.lines)
        assert to_png(fig).startswith(b"\x89PNG")


def test_a_fit_that_failed_is_not_drawn() -> None:
    rng = np.random.default_rng(0)
    L = (2 + 2 * (D / 1e7) ** -0.3) * np.exp(0.003 * rng.normal(size=52) + 0.003 * np.log(N / N[0]))
    failed = fit_parametric(N, D, L, "squared")
    with styled():
        _, ax = figure("Loss surface", "", "")
        failed.plot(ax)
    assert all(np.size(line.get_xdata()) == 0 for line in ax.lines)
    legend = ax.get_legend()
    assert legend is not None
    assert "alpha is undetermined" in legend.get_texts()[0].get_text()
