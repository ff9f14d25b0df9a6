"""Intervals against the same numbers worked out another way, and against simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import fractional_matrix_power
from scipy.optimize import brentq, least_squares
from scipy.stats import t

from analysis import DataError
from analysis.errors import Floats
from analysis.parametric import ParametricLaw, fit_parametric
from analysis.surface_interval import Clusters, ProfileSurface

DEPTHS = np.repeat(np.arange(1, 14), 4)
N = 73728.0 * DEPTHS**3.0
D = np.tile([1e7, 4e7, 1.6e8, 6.4e8], 13)
TRUTH = 2 + 1.5 * (N / N[0]) ** -0.3 + 2 * (D / 1e7) ** -0.3


def study(seed: int, noise: float = 0.003) -> Floats:
    """Losses of independent runs."""
    return np.asarray(TRUTH * np.exp(noise * np.random.default_rng(seed).normal(size=len(N))))


def profile_end(law: ParametricLaw, name: str, outside: float) -> float:
    """Where the RSS with one parameter held, the others searched by SciPy, passes RSS(1 + t²/(n − 5))."""
    names = ("E", "a", "b", "alpha", "beta")
    best = dict(zip(names, law.theta, strict=True))
    n = len(law.loss)
    u, v = np.log(N) - law.surface.centre_params, np.log(D) - law.surface.centre_tokens
    allowed = 2 * law.objective * (1 + t.ppf(0.975, n - 5) ** 2 / (n - 5))

    def excess(value: float) -> float:
        free = [k for k in names if k != name]

        def residuals(theta: Floats) -> Floats:
            p = dict(zip(free, theta, strict=True)) | {name: value}
            L = p["E"] + np.exp(p["a"] - p["alpha"] * u) + np.exp(p["b"] - p["beta"] * v)
            return np.asarray(np.log(np.maximum(L, 1e-3)) - np.log(law.loss))

        end = least_squares(residuals, [best[k] for k in free], x_scale="jac", xtol=1e-13, ftol=1e-13)
        return 2 * float(end.cost) / allowed - 1

    return float(brentq(excess, best[name], outside, rtol=1e-7))


def test_profile_bounds_by_nested_searches() -> None:
    law = fit_parametric(N, D, study(3, 0.01), "squared")
    found = law.interval()
    for name in ("E", "alpha", "beta"):
        width = found[name][1] - found[name][0]
        for bound, toward in zip(found[name], (-1, 1), strict=True):
            outside = max(law.params[name] + toward * 1.5 * width, 1e-6)
            assert bound == pytest.approx(profile_end(law, name, outside), abs=2e-3 * width)


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_cr2_and_satterthwaite_by_whole_matrices(rho: float) -> None:
    """From their definitions (Pustejovsky and Tipton 2018, eqs. 5, 6 and 11) with n × n matrices."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(7), [3, 5, 2, 6, 4, 5, 3])
    X, e = rng.normal(size=(28, 5)), rng.normal(size=28)
    bread = np.linalg.inv(X.T @ X)
    rest = np.eye(28) - X @ bread @ X.T
    phi = np.where(codes[:, None] == codes, rho, 0.0) + (1 - rho) * np.eye(28)
    spread = rest @ phi @ rest
    meat, columns = np.zeros((5, 5)), []
    for g in range(7):
        rows = np.flatnonzero(codes == g)
        root = np.real(fractional_matrix_power(phi[np.ix_(rows, rows)], 0.5))
        middle = root @ spread[np.ix_(rows, rows)] @ root
        A = root @ np.real(fractional_matrix_power(middle, -0.5)) @ root
        score = X[rows].T @ A @ e[rows]
        meat += np.outer(score, score)
        columns.append(rest[:, rows] @ A @ X[rows] @ bread)
    contrast = rng.normal(size=5)
    G = np.stack(columns) @ contrast
    omega = G @ phi @ G.T
    ours = Clusters.of(X, e, codes, rho)
    np.testing.assert_allclose(ours.cov, bread @ meat @ bread, rtol=1e-8)
    expected = np.trace(omega) ** 2 / np.trace(omega @ omega)
    assert ours.freedom(contrast[None])[0] == pytest.approx(expected, rel=1e-8)


def test_intervals_cover_and_estimates_are_unbiased() -> None:
    """The benchmark's main row in small: 60 studies of thirteen depths and four horizons."""
    true = {"alpha": 0.3, "beta": 0.3, "E": 2.0, "a": 0.5}
    far = 4 * N.max(), 4 * D.max()
    there = 2 + 1.5 * (far[0] / N[0]) ** -0.3 + 2 * (far[1] / 1e7) ** -0.3
    hits, errors, widths = np.zeros(5), [], []
    for seed in range(60):
        law = fit_parametric(N, D, study(seed), "squared")
        held = law.interval() | law.compute_exponent_interval()
        ahead = law.predict(*far)
        hits[:4] += [held[k][0] <= v <= held[k][1] for k, v in true.items()]
        hits[4] += ahead.low[0] <= there <= ahead.high[0]
        errors.append([law.alpha / 0.3 - 1, law.beta / 0.3 - 1, law.compute_exponents.a / 0.5 - 1])
        widths.append(held["alpha"][1] - held["alpha"][0])
    assert np.abs(np.mean(errors, 0)).max() < 0.01
    assert (hits / 60 >= 0.95 - 2.6 * np.sqrt(0.95 * 0.05 / 60)).all()
    # An interval too wide covers as well: its width against the spread of the estimates.
    spread = 0.3 * np.std([e[0] for e in errors], ddof=1)
    assert np.median(widths) == pytest.approx(2 * t.ppf(0.975, 47) * spread, rel=0.2)


def test_checkpoints_of_a_run_do_not_pass_for_runs() -> None:
    """Four points that share their run's error: α by run covers, by point it does not."""
    rng = np.random.default_rng(5)
    by_run = by_point = 0
    for _ in range(30):
        shared = np.repeat(rng.normal(size=13), 4)
        L = TRUTH * np.exp(0.003 * shared + 0.0005 * rng.normal(size=len(N)))
        low, high = fit_parametric(N, D, L, "squared", groups=DEPTHS).interval()["alpha"]
        by_run += low <= 0.3 <= high
        low, high = fit_parametric(N, D, L, "squared").interval()["alpha"]
        by_point += low <= 0.3 <= high
    assert by_run >= 26
    assert by_point < by_run - 3


def test_wider_level_wider_interval_and_a_new_run_adds_its_noise() -> None:
    law = fit_parametric(N, D, study(1), "squared")
    narrow, wide = law.interval(0.5), law.interval(0.95)
    for name, (low, high) in narrow.items():
        assert wide[name][0] < low < law.params[name] < high < wide[name][1]
    mean, new = law.predict(N, D), law.predict(N, D, observation=True)
    assert (new.low < mean.low).all()
    assert (mean.low < mean.value).all()
    assert (mean.high < new.high).all()
    assert mean.value == pytest.approx(law.value(N, D))


def test_huber_needs_a_bootstrap_and_draws_whole_runs() -> None:
    L = study(2)
    with pytest.raises(DataError, match="bootstrap=4000"):
        fit_parametric(N, D, L).interval()
    law = fit_parametric(N, D, L, bootstrap=300)
    assert law.replicates is not None
    assert law.replicates.shape == (300, 5)
    for name, (low, high) in law.interval(0.9).items():
        assert low < law.params[name] < high
    rng = np.random.default_rng(0)
    shared = TRUTH * np.exp(0.003 * np.repeat(rng.normal(size=13), 4) + 0.0005 * rng.normal(size=52))
    points = fit_parametric(N, D, shared, bootstrap=300)
    runs = fit_parametric(N, D, shared, bootstrap=300, groups=DEPTHS)
    assert points.replicates is not None
    assert runs.replicates is not None
    assert runs.replicates[:, 3].std() > 1.2 * points.replicates[:, 3].std()
    again = fit_parametric(N, D, L, bootstrap=300).replicates
    assert again is not None
    np.testing.assert_array_equal(again, law.replicates)


def test_too_few_runs_have_no_interval() -> None:
    few = DEPTHS <= 5
    law = fit_parametric(N[few], D[few], study(0)[few], "squared", groups=DEPTHS[few])
    assert law.converged
    with pytest.raises(DataError, match="more than 5 independent runs, got 5"):
        law.interval()
    assert all(np.isnan(low) for _, _, low, _ in law.rows())


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_levels_are_shares(level: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        fit_parametric(N, D, study(0), "squared").interval(level)


@pytest.mark.parametrize("seed", [10, 13])
def test_a_prediction_stays_bounded_where_the_floor_may_be_nought(seed: int) -> None:
    """A slow α leaves E free down to 0: its bound must bend the profile, not end the search for one."""
    small = DEPTHS < 9
    n, d = N[small], D[small]
    L = 2 + 1.5 * (n / n[0]) ** -0.05 + 2 * (d / 1e7) ** -0.3
    L = L * np.exp(0.003 * np.random.default_rng(seed).normal(size=len(L)))
    law = fit_parametric(n, d, L, "squared")
    assert law.converged
    far = float(4 * n.max()), float(4 * d.max())
    said = law.predict(*([value] for value in far))
    for bound, toward in ((said.low[0], -1), (said.high[0], 1)):
        # The profile at the bound, E eliminated: the law through (far, bound) that fits best.
        assert excess_at(law, far, float(bound)) == pytest.approx(0, abs=0.02)
        assert excess_at(law, far, float(said.value[0] + 2 * (bound - said.value[0]))) > 0.2
        assert toward * (bound - said.value[0]) > 0


def excess_at(law: ParametricLaw, far: tuple[float, float], value: float) -> float:
    """RSS of the best law in the box with L(far) = ``value``, over RSS(1 + t²/(n − 5)), minus 1."""
    s = law.surface
    u, v = np.log(law.sizes) - s.centre_params, np.log(law.tokens) - s.centre_tokens
    uf, vf = np.log(far[0]) - s.centre_params, np.log(far[1]) - s.centre_tokens
    n = len(law.loss)
    best = np.inf

    def residuals(p: Floats) -> Floats:
        E = value - np.exp(p[0] - p[2] * uf) - np.exp(p[1] - p[3] * vf)
        L = max(E, 0.0) + np.exp(p[0] - p[2] * u) + np.exp(p[1] - p[3] * v)
        return np.asarray(np.append(np.log(L) - np.log(law.loss), 1e3 * max(0.0, -E)))

    low, high = s.lower[1:], s.upper[1:]
    for shift in ([0, 0, 0, 0], [0.3, -0.1, -0.02, 0.02], [-0.3, 0.1, 0.02, -0.02], [0.6, 0, -0.03, 0]):
        start = np.clip(law.theta[1:] + np.array(shift), low + 1e-6, high - 1e-6)
        end = least_squares(residuals, start, bounds=(low, high), x_scale="jac", xtol=1e-14, ftol=1e-14)
        best = min(best, 2 * float(end.cost))
    allowed = 2 * law.objective * (1 + t.ppf(0.975, n - 5) ** 2 / (n - 5))
    return best / allowed - 1


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_a_new_runs_noise_by_whole_matrices(rho: float) -> None:
    """E[RSS] = σ² tr(MΦ), its variance 2σ⁴ tr((MΦ)²): runs' own errors are few and partly fitted away."""
    rng = np.random.default_rng(4)
    codes = np.repeat(np.arange(7), [4, 3, 4, 1, 5, 4, 4])
    X, e = rng.normal(size=(len(codes), 5)), rng.normal(size=len(codes))
    X[:, :2] = rng.normal(size=(7, 2))[codes]  # what a run's size decides is the same along the run
    found = Clusters.of(X, e, codes, rho)
    M = np.eye(len(codes)) - X @ np.linalg.inv(X.T @ X) @ X.T
    product = M @ ((1 - rho) * np.eye(len(codes)) + rho * (codes[:, None] == codes))
    assert found.left == pytest.approx(np.trace(product), rel=1e-9)
    freedom = np.trace(product) ** 2 / np.trace(product @ product)
    assert found.noise_freedom == pytest.approx(freedom, rel=1e-9)


def test_a_new_run_scatters_as_runs_do_not_as_points() -> None:
    rng = np.random.default_rng(4)
    run = np.repeat(np.arange(13), 4)
    noise = 0.003 * rng.normal(size=13)[run] + 0.0005 * rng.normal(size=52)
    interval = fit_parametric(N, D, TRUTH * np.exp(noise), "squared", groups=run).uncertainty
    assert isinstance(interval, ProfileSurface)
    assert interval.clusters is not None
    freedom = interval.clusters.noise_freedom
    assert freedom < 13
    wanted = t.ppf(0.975, freedom) * np.sqrt(interval.rss / interval.clusters.left)
    assert interval.noise(0.95) == pytest.approx(wanted, rel=1e-9)
