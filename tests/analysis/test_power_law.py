"""Power laws recover what they were given, say when they cannot, and their intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, linregress, t

from analysis import DataError, fit_power_law
from analysis.line_fit import offset_model
from analysis.solver import minimise, rho

DEPTHS = np.arange(1, 9)
N = 73728.0 * DEPTHS**3.0


@given(st.floats(-0.9, -0.01), st.floats(-12, -2))
def test_exact_data_give_the_exact_law(alpha: float, log10_beta: float) -> None:
    beta = 10.0**log10_beta
    law = fit_power_law(N, (beta * N) ** alpha)
    assert law.alpha == pytest.approx(alpha, rel=1e-9)
    assert law.params["beta"] == pytest.approx(beta, rel=1e-6)
    assert law.pearson == pytest.approx(-1, abs=1e-12)
    assert law.converged


@settings(max_examples=25, deadline=None)
@given(st.floats(-0.6, -0.05), st.floats(0.5, 4.0), st.floats(0.3, 3.0))
def test_exact_data_give_the_exact_offset(alpha: float, offset: float, amplitude: float) -> None:
    y = offset + amplitude * (N / N[0]) ** alpha
    law = fit_power_law(N, y, offset=True)
    assert law.converged, law.status
    assert law.alpha == pytest.approx(alpha, rel=1e-3)
    assert law.offset == pytest.approx(offset, rel=1e-3)


@given(st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_units_change_nothing_but_the_amplitude(x_unit: float, y_unit: float) -> None:
    y = 2 + 3 * (N / N[0]) ** -0.3 * np.exp(0.01 * np.sin(7 * DEPTHS))
    one = fit_power_law(N, y, offset=True)
    other = fit_power_law(N * x_unit, y * y_unit, offset=True)
    assert other.alpha == pytest.approx(one.alpha, rel=1e-5)
    assert other.offset == pytest.approx(one.offset * y_unit, rel=1e-5)
    assert other.interval()["alpha"] == pytest.approx(one.interval()["alpha"], rel=1e-4)


def test_it_is_least_squares_in_log_space() -> None:
    y = 5 * N**-0.03 * np.exp(0.01 * np.cos(5 * DEPTHS))
    law, theirs = fit_power_law(N, y), linregress(np.log(N), np.log(y))
    assert law.alpha == pytest.approx(theirs.slope, rel=1e-12)
    assert law.pearson == pytest.approx(theirs.rvalue, rel=1e-12)
    half = (law.interval()["alpha"][1] - law.interval()["alpha"][0]) / 2
    assert half == pytest.approx(theirs.stderr * 2.4469118511449692, rel=1e-9)  # t quantile, 6 degrees


def test_fixed_offset_is_a_line_above_it() -> None:
    y = 4.5 + (2e-9 * N) ** -0.23
    law = fit_power_law(N, y, offset=4.5)
    assert law.alpha == pytest.approx(-0.23, rel=1e-9)
    assert law.params["beta"] == pytest.approx(2e-9, rel=1e-6)
    assert law.params["offset"] == 4.5
    assert set(law.interval()) == {"alpha", "beta", "log_beta"}


def test_weights_count_like_copies() -> None:
    y = 5 * N**-0.03 * np.exp(0.01 * np.cos(5 * DEPTHS))
    copies = np.r_[N, N[2:4]], np.r_[y, y[2:4]]
    weighted = fit_power_law(N, y, offset=True, weights=[1, 1, 2, 2, 1, 1, 1, 1])
    assert weighted.alpha == pytest.approx(fit_power_law(*copies, offset=True).alpha, rel=1e-6)


def test_huber_withstands_an_outlier_and_sums() -> None:
    y = 5 * N**-0.05
    y[3] *= 1.2
    robust = fit_power_law(N, y, loss_fn="huber", delta=1e-3)
    assert robust.alpha == pytest.approx(-0.05, abs=2e-3)
    assert abs(fit_power_law(N, y).alpha + 0.05) > 4 * abs(robust.alpha + 0.05)
    assert robust.objective == pytest.approx(rho(robust.residuals, "huber", 1e-3)[0].sum(), rel=1e-12)
    with pytest.raises(DataError, match="bootstrap=4000"):
        robust.interval()


def test_huber_reaches_the_optimum_from_every_start() -> None:
    rng = np.random.default_rng(0)
    z = np.log(N) - np.log(N).mean()
    v = 1.6 - 0.03 * z + 0.01 * rng.standard_t(2, size=len(z))
    X = np.stack([np.ones_like(z), z], 1)
    starts = rng.normal(size=(30, 2)) * 3
    end = minimise(
        lambda t, _: (t @ X.T - v, np.broadcast_to(X, (len(t), *X.shape))),
        starts, np.ones((30, len(z))), "huber", 1e-3,
    )  # fmt: skip
    assert end.converged.all()
    assert end.objective == pytest.approx(end.objective.min(), rel=1e-9)


def test_jacobian_agrees_with_finite_differences() -> None:
    z = np.linspace(-2, 2, 7)
    model = offset_model(z, np.zeros(7), 3.0)
    theta = np.array([[1.3, -0.05, -0.4], [1.2, -0.2, -2.0], [1.4, 0.1, -0.01]])
    which = np.arange(3)
    for p in range(3):
        step = np.eye(3)[p] * 1e-6
        numeric = (model(theta + step, which)[0] - model(theta - step, which)[0]) / 2e-6
        np.testing.assert_allclose(model(theta, which)[1][:, :, p], numeric, rtol=1e-6, atol=1e-9)


def test_a_floor_that_is_reached_is_found() -> None:
    """The truth lies above the smallest noisy loss; that must neither stop the fit nor cut intervals."""
    rng = np.random.default_rng(0)
    x = 73728.0 * np.arange(1, 14) ** 3.0
    truth = 2 + 1.5 * (x / x[0]) ** -0.9
    converged = above = hits = 0
    for _ in range(20):
        y = truth * np.exp(0.002 * rng.normal(size=13))
        law = fit_power_law(x, y, offset=True)
        low, high = law.interval()["offset"]
        converged += law.converged
        above += law.offset > y.min()
        hits += low <= 2 <= high
    assert converged == 20
    assert above > 10
    assert hits >= 17


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("points", [4, 13])
def test_a_steep_law_on_its_floor_converges(points: int) -> None:
    """Most points lie on the floor, where level and slope say nothing: the descent must not crawl there."""
    rng = np.random.default_rng(0)
    x = 73728.0 * np.arange(1, points + 1) ** 3.0
    for _ in range(40):
        y = (2 + 1.5 * (x / x[0]) ** -2.0) * np.exp(0.003 * rng.normal(size=points))
        assert fit_power_law(x, y, offset=True).converged


@pytest.mark.filterwarnings("error")
def test_an_exponent_that_two_points_hold_is_not_determined() -> None:
    y = np.array([3.5, 1.9990, 2.0005, 1.9995, 2.001, 2.0])
    law = fit_power_law(N[:6], y, offset=True)
    assert not law.converged
    assert "exponent not determined" in law.status


@pytest.mark.filterwarnings("error")
def test_a_bootstrap_of_a_nearly_flat_curve_overflows_nowhere() -> None:
    """Trial steps of single replicates leave the data by far; they are refused without a warning."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        x = np.exp(np.linspace(0, 2, 12))
        y = 5 * x**-0.007 * np.exp(0.001 * rng.normal(size=12))
        fit_power_law(x, y, offset=True, groups=np.repeat(np.arange(4), 3), bootstrap=400)


def test_no_offset_in_the_data_is_said() -> None:
    curved_down = (1e-9 * N) ** -0.05 * np.exp(-0.003 * (np.log(N) - np.log(N).mean()) ** 2)
    law = fit_power_law(N, curved_down, offset=True)
    assert not law.converged
    assert "lower bound 0" in law.status


@pytest.mark.parametrize("offset", [False, True])
def test_intervals_cover(offset: bool) -> None:
    """95 % intervals of five runs hold the truth in 93 to 97 % of studies, give or take their own error."""
    rng = np.random.default_rng(1)
    x, studies = N[:5], 60 if offset else 1500
    truth = (2.0 if offset else 0.0) + (1e-5 * x) ** -0.15
    far = 4 * x[-1:]
    there = (2.0 if offset else 0.0) + (1e-5 * far) ** -0.15
    hits = np.zeros(2)
    widths = []
    for _ in range(studies):
        law = fit_power_law(x, truth * np.exp(0.002 * rng.normal(size=5)), offset=offset)
        low, high = law.interval()["alpha"]
        widths.append(high - low)
        ahead = law.predict(far, observation=True)
        new = there * np.exp(0.002 * rng.normal())
        hits += [low <= -0.15 <= high, (ahead.low <= new).all() and (new <= ahead.high).all()]
    assert np.abs(hits / studies - 0.95).max() < max(0.02, 1.8 * np.sqrt(0.95 * 0.05 / studies))
    # Coverage of few studies cannot show an interval that is too wide; its width against theory can:
    # Student's, from the noise that was put in, whose estimate has a known median.
    log_x = np.log(x) - np.log(x).mean()
    rising = (1e-5 * x) ** -0.15
    J = np.stack([rising, rising * log_x, np.ones(5)][: 3 if offset else 2], 1) / truth[:, None]
    freedom = 5 - J.shape[1]
    error = 0.002 * np.sqrt(np.linalg.inv(J.T @ J)[1, 1] * chi2.median(freedom) / freedom)
    assert np.median(widths) == pytest.approx(2 * t.ppf(0.975, freedom) * error, rel=0.25 if offset else 0.05)


def test_clustered_points_do_not_pass_for_independent_ones() -> None:
    """Ten points a run that share its error: by run the interval covers, by point it does not."""
    rng = np.random.default_rng(2)
    runs = np.repeat(np.arange(8), 10)
    x = np.exp(np.log(N)[:, None] + np.linspace(-0.5, 0, 10)).ravel()
    by_run = by_point = 0
    for _ in range(300):
        y = x**-0.05 * np.exp(0.003 * rng.normal(size=8)[runs] + 0.0005 * rng.normal(size=80))
        low, high = fit_power_law(x, y, groups=runs).interval()["alpha"]
        by_run += low <= -0.05 <= high
        low, high = fit_power_law(x, y).interval()["alpha"]
        by_point += low <= -0.05 <= high
    assert 0.92 <= by_run / 300 <= 0.99
    assert by_point / 300 < 0.75


def test_wider_level_wider_interval() -> None:
    y = 2 + (1e-5 * N) ** -0.15 * np.exp(0.002 * np.sin(9 * DEPTHS))
    law = fit_power_law(N, y, offset=True)
    narrow, wide = law.interval(0.5), law.interval(0.95)
    for name, (low, high) in narrow.items():
        value = law.log_beta if name == "log_beta" else law.params[name]
        assert wide[name][0] < low < value < high < wide[name][1]
    ahead, new = law.predict(1e9), law.predict(1e9, observation=True)
    assert new.low < ahead.low < law.value(1e9) < ahead.high < new.high


@pytest.mark.parametrize(
    ("x", "y", "offset", "message"),
    [
        ([1, 2], [2, 1], False, "at least 3 points, got 2"),
        ([1, 2, 3], [3, 2, 1], True, "at least 4 points, got 3"),
        ([1, 1, 1], [3, 2, 1], False, "2 distinct x, got 1"),
        ([1, 1, 2, 2], [3, 2, 1, 1], True, "3 distinct x, got 2"),
        ([1, 2, 3], [3, float("nan"), 1], False, "y: NaN or infinite in row 1"),
        ([1, 2, 3], [3, -2, 0], False, "rows 1, 2 are not"),
        ([1, 2, 3], [6, 5, 4.4], 4.5, "row 2 at or below the fixed offset 4.5"),
        ([1, 2, 3], [6, 5], False, "x has 3 rows, y has 2"),
        ([1, 2, 3], [2, 2, 2], False, "does not change with x"),
        ([1, 2, 4, 8], [0.3, 0.1 * 3, 0.3, 0.1 + 0.2], False, "does not change with x"),
        ([1, 2, 4, 8], [0.3, 0.1 * 3, 0.3, 0.1 + 0.2], True, "does not change with x"),
    ],
)
def test_bad_data_are_named(x: list[float], y: list[float], offset: bool | float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_power_law(x, y, offset=offset)


def test_two_runs_give_no_law() -> None:
    with pytest.raises(DataError, match="3 independent groups"):
        fit_power_law(N, N**-0.1, groups=[0, 0, 0, 0, 1, 1, 1, 1])


def test_summary_says_method_and_status() -> None:
    law = fit_power_law(N, 2 + N**-0.2 * np.exp(0.001 * np.sin(DEPTHS)), offset=True)
    text = law.summary()
    assert "profile likelihood" in text
    assert "starts agree" in text
    assert f"{law.alpha:12.5g}" in text
    assert "<table" in law._repr_html_()


def test_bounds_of_beta_beyond_floats_are_kept_as_logs() -> None:
    y = 4 * (N / N[0]) ** -0.002 * np.exp(1e-5 * np.sin(9 * DEPTHS))
    found = fit_power_law(N, y).interval()
    assert found["log_beta"][0] < -700
    assert np.isfinite(found["log_beta"]).all()
    assert found["beta"][0] == pytest.approx(np.exp(found["log_beta"][0]))


def test_a_numpy_bool_is_a_bool() -> None:
    """np.True_ as a number would be a fixed offset of 1 nat."""
    y = 2 + (1e-5 * N) ** -0.2
    assert fit_power_law(N, y, offset=np.True_).kind == "free"  # type: ignore[arg-type]
    assert fit_power_law(N, y, offset=np.False_).kind == "none"  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, -1e-3, float("nan"), float("inf")])
def test_a_delta_that_is_no_width_is_refused(delta: float) -> None:
    with pytest.raises(DataError, match="delta must be a positive number"):
        fit_power_law(N, N**-0.1, loss_fn="huber", delta=delta)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(DataError, match="expected 'squared' or 'huber', got 'squares'"):
        fit_power_law(N, N**-0.1, loss_fn="squares")  # type: ignore[arg-type]


def test_text_among_the_numbers_is_refused() -> None:
    with pytest.raises(DataError, match="y: expected numbers"):
        fit_power_law(N, ["a"] * len(N))


def test_the_law_has_no_value_at_nothing() -> None:
    law = fit_power_law(N, N**-0.1)
    with pytest.raises(DataError, match="x: must be positive"):
        law.value([-1.0, 2.0])
    assert law.value(np.array([[1.0, 2.0]])).shape == (1, 2)


def test_a_new_run_is_never_surer_than_the_law() -> None:
    """Far out, with few sizes, the law's own band is not linearised and may be the wider one."""
    x = N[:5]
    for seed in range(12):
        y = (2 + (1e-5 * x) ** -0.15) * np.exp(0.01 * np.random.default_rng(seed).normal(size=5))
        law = fit_power_law(x, y, offset=True)
        mean, run = (law.predict([100 * x[-1]], observation=o) for o in (False, True))
        assert run.low[0] <= mean.low[0]
        assert mean.high[0] <= run.high[0]
