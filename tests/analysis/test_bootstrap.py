"""Resampling draws whole groups, counts what it redraws, and widens for few groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import DataError, fit_power_law
from analysis.bootstrap import expanded_percentile, group_codes, group_weights


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(0, 99))
def test_a_group_is_drawn_whole(labels: list[int], seed: int) -> None:
    codes = group_codes(labels, len(labels))
    weights, _ = group_weights(codes, 50, seed)
    G = codes.max() + 1
    for g in range(G):
        members = weights[:, codes == g]
        assert (members == members[:, :1]).all()
    firsts = [int(np.flatnonzero(codes == g)[0]) for g in range(G)]
    assert (weights[:, firsts].sum(1) == G).all()


def test_thin_resamples_are_drawn_again_and_counted() -> None:
    x = np.arange(1.0, 6)
    weights, redrawn = group_weights(np.arange(5), 2000, 0, (x, 3))
    assert len(weights) == 2000
    assert ((weights > 0).sum(1) >= 3).all()
    # 305 of the 3125 draws of five from five hold fewer than three.
    assert redrawn / (2000 + redrawn) == pytest.approx(305 / 3125, abs=0.02)


def test_impossible_form_is_refused() -> None:
    with pytest.raises(DataError, match="3 distinct x are needed, got 2"):
        group_weights(np.arange(3), 10, 0, (np.array([1.0, 1.0, 2.0]), 3))


def test_equal_seeds_give_equal_replicates() -> None:
    x = np.arange(1.0, 9)
    y = 2 + x**-0.4 * np.exp(0.01 * np.sin(5 * x))
    one, two, other = (fit_power_law(x, y, offset=True, bootstrap=50, seed=s).replicates for s in (0, 0, 1))
    assert one is not None
    assert two is not None
    assert other is not None
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_replicates_are_fits_of_the_resampled_points() -> None:
    """Weights equal copies: one replicate, fitted by itself on copied points, is the same."""
    x = np.arange(1.0, 13)
    y = 2 + 3 * x**-0.4 * np.exp(0.003 * np.sin(5 * x))
    law = fit_power_law(x, y, offset=True, bootstrap=20, seed=3)
    weights, _ = group_weights(np.arange(12), 20, 3, (x, 3))
    assert law.replicates is not None
    compared = 0
    for draw, found in zip(weights.astype(int), law.replicates, strict=True):
        alone = fit_power_law(np.repeat(x, draw), np.repeat(y, draw), offset=True)
        if alone.converged:
            assert found[0] == pytest.approx(alone.alpha, rel=1e-4)
            compared += 1
    assert compared >= 15


def test_expansion_matches_student() -> None:
    """Of normal replicates with standard error s·√((n−1)/n), the interval is Student's, x̄ ± t s."""
    draws = np.random.default_rng(0).normal(size=400_000) * np.sqrt(4 / 5)
    low, high = expanded_percentile(draws, 0.9, 5, 1)
    assert high == pytest.approx(2.1318, rel=0.02)
    assert low == pytest.approx(-2.1318, rel=0.02)


def test_too_few_groups_have_no_interval() -> None:
    with pytest.raises(DataError, match="more than 3 independent runs, got 3"):
        expanded_percentile(np.zeros(10), 0.95, 3, 3)


def test_groups_of_wrong_length() -> None:
    with pytest.raises(DataError, match="expected 3 labels"):
        fit_power_law([1, 2, 3], [3, 2, 1], groups=["a"])


def test_replicates_that_cannot_resolve_the_tail_give_no_interval() -> None:
    """Of five runs with three parameters the tail is 5e-12: the range of 400 draws is no 95 % interval."""
    with pytest.raises(DataError, match=r"5 independent runs are too few"):
        expanded_percentile(np.arange(400.0), 0.95, 5, 3)
    low, high = expanded_percentile(np.arange(400.0), 0.95, 13, 3)
    assert 0 < low < high < 399
    x = np.arange(1.0, 21)
    y = 2 + 3 * x**-0.4 * np.exp(0.003 * np.sin(5 * x))
    law = fit_power_law(x, y, offset=True, groups=np.repeat(np.arange(5), 4), bootstrap=400)
    assert "5 independent runs are too few" in law.no_interval()
    assert np.isnan(law.rows()[0][2:]).all()
    assert "none: 5 independent runs" in law.summary()
    with pytest.raises(DataError, match="too few"):
        law.predict([30.0])


def test_every_column_keeps_what_the_form_needs() -> None:
    """Four N by three D: a resample with two D says nothing of β."""
    N, D = np.repeat([1.0, 2, 3, 4], 3), np.tile([1.0, 10, 100], 4)
    weights, redrawn = group_weights(np.arange(12), 3000, 0, (N, 3), (D, 3))
    for column in (N, D):
        kinds = np.stack([(weights * (column == value)).sum(1) > 0 for value in np.unique(column)])
        assert kinds.sum(0).min() == 3
    # Misses at least one of three D: 3(2/3)^12 − 3(1/3)^12, and fewer than three of four N, about as rare.
    assert 0.02 < redrawn / (3000 + redrawn) < 0.06


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_row_without_a_label_is_refused(missing: float | None) -> None:
    """Taken for a run of their own, or each for one, such rows would decide the interval in silence."""
    with pytest.raises(DataError, match="no label in rows 1, 3"):
        group_codes(np.array(["a", missing, "b", missing], dtype=object), 4)


def test_a_negative_number_of_replicates_is_refused() -> None:
    with pytest.raises(DataError, match="positive number of replicates, got -1"):
        fit_power_law([1, 2, 3, 4], [4, 3, 2.5, 2.2], bootstrap=-1)


def test_a_new_run_scatters_about_a_fixed_offset_as_the_points_did() -> None:
    """Noise of the reducible part: the new run stays above the offset and close to least squares' answer."""
    rng = np.random.default_rng(0)
    x = 73728.0 * np.arange(1, 14) ** 3.0
    y = 4.5 + 0.5 * (x / x[0]) ** -0.2 * np.exp(0.01 * rng.normal(size=13))
    far = [4 * x[-1]]
    huber = fit_power_law(x, y, offset=4.5, loss_fn="huber", bootstrap=2000).predict(far, observation=True)
    squared = fit_power_law(x, y, offset=4.5).predict(far, observation=True)
    assert huber.low[0] > 4.5
    assert (huber.high - huber.low)[0] == pytest.approx((squared.high - squared.low)[0], rel=0.5)


def test_outliers_above_the_law_put_new_runs_above_it() -> None:
    x = np.exp(np.linspace(0, 6, 13))
    y = 3 * x**-0.05 * np.exp(1e-4 * np.random.default_rng(1).normal(size=13))
    y[[2, 6, 10]] *= 1.1
    law = fit_power_law(x, y, loss_fn="huber", bootstrap=2000)
    said = law.predict([600.0], level=0.6, observation=True)
    assert (said.high - said.value)[0] > 5 * (said.value - said.low)[0]
