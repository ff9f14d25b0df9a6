"""What a further run is said to do for an interval is what it does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from analysis import DataError, PowerLaw, fit_power_law
from analysis.design import LocalLaw, next_run, power_law_jacobian
from analysis.parametric import ParametricLaw, fit_parametric

X = 73728.0 * np.arange(1, 7) ** 3.0
RNG = np.random.default_rng(3)
Y = 3.0 + (1e-9 * X) ** -0.25 * np.exp(0.003 * RNG.normal(size=6))
PLAIN = fit_power_law(X, Y)
FIXED = fit_power_law(X, Y, 2.5)
FREE = fit_power_law(X, Y, True)
NEXT = pd.DataFrame({"params": 73728.0 * np.arange(1, 13) ** 3.0, "depth": np.arange(1, 13)})
NEXT["flops"] = 1e8 * NEXT["params"]

GRID = pd.DataFrame([(n, d) for n in 1e6 * 4.0 ** np.arange(4) for d in 1e8 * 5.0 ** np.arange(4)])
N, D = GRID[0].to_numpy(), GRID[1].to_numpy()
LOSS = (2 + 40 * N**-0.3 + 120 * D**-0.32) * np.exp(0.002 * RNG.normal(size=16))
SURFACE = fit_parametric(N, D, LOSS, "squared")
LADDER = pd.DataFrame({"params": N * 4, "tokens": D * 5, "flops": 120 * N * D})


@pytest.mark.parametrize("law", [PLAIN, FIXED, FREE])
def test_jacobian_against_finite_differences(law: PowerLaw) -> None:
    centre = np.log(X).mean()
    theta = np.array([law.alpha * (law.log_beta + centre), law.alpha, law.offset])

    def value(t: np.ndarray) -> np.ndarray:
        reducible = t[0] + t[1] * (np.log(X) - centre)
        return np.asarray(np.log(t[2] + np.exp(reducible)) if law.kind == "free" else reducible)

    steps = 1e-6 * np.eye(3)[: 3 if law.kind == "free" else 2]
    numeric = np.stack([(value(theta + h) - value(theta - h)) / 2e-6 for h in steps], 1)
    np.testing.assert_allclose(power_law_jacobian(law, X), numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("law", [PLAIN, FIXED])
def test_the_present_interval_is_the_laws_own(law: PowerLaw) -> None:
    """Without a free offset nothing is approximate: Student's t around a line."""
    low, high = law.interval(0.9)["alpha"]
    assert next_run(law, NEXT, level=0.9).half_width == pytest.approx((high - low) / 2, rel=1e-9)
    said = law.predict([1e9], 0.9)
    half = next_run(law, NEXT, ("loss", 1e9), level=0.9).half_width
    reducible = float(said.high[0] - law.offset) / float(said.value[0] - law.offset)
    share = 1 - law.offset / float(said.value[0])
    assert half == pytest.approx(np.log(reducible) * share, rel=1e-9)


@pytest.mark.parametrize("target", ["E", "A", "B", "alpha", "beta", "a", ("loss", 1e9, 1e12)])
def test_a_surfaces_standard_errors_are_its_covariances(target: str | tuple[str, float, float]) -> None:
    """Gradients of every target against finite differences of what the law itself says."""
    form = SURFACE.surface

    def quantity(theta: np.ndarray) -> float:
        if isinstance(target, tuple):
            u, v = (np.array([np.log(x)]) for x in target[1:])
            return float(form.log_loss(theta[None], u, v, None)[0, 0])
        E, log_A, log_B, alpha, beta = form.natural(theta)
        values = {"E": E, "A": log_A, "B": log_B, "alpha": alpha, "beta": beta, "a": beta / (alpha + beta)}
        return float(values[target])

    h = 1e-5 * np.eye(5)
    slope = np.array([(quantity(SURFACE.theta + s) - quantity(SURFACE.theta - s)) / 2e-5 for s in h])
    expected = float(np.sqrt(slope @ SURFACE.covariance @ slope))
    assert next_run(SURFACE, LADDER, target).se == pytest.approx(expected, rel=1e-5)


def studies(offset: bool, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Half-widths of α's interval, promised and realised: with depth 12 beside five (eight) depths."""
    rng = np.random.default_rng(11)
    x = 73728.0 * np.array([1, 2, 3, 4, 5, 6, 7, 9]) ** 3.0 if offset else X[:5]
    added = pd.DataFrame({"params": [73728.0 * 12**3], "flops": [1.0]})
    x_all = np.append(x, added["params"])
    truth = (2.0 if offset else 0.0) + (1e-9 * x_all) ** (-0.2 if offset else -0.05)
    predicted, realised = [], []
    for _ in range(count):
        y = truth * np.exp((0.001 if offset else 0.003) * rng.normal(size=len(truth)))
        law, after = fit_power_law(x, y[:-1], offset), fit_power_law(x_all, y, offset)
        if law.converged and after.converged:
            predicted.append(next_run(law, added).best["half_width"])
            low, high = after.interval()["alpha"]
            realised.append((high - low) / 2)
    return np.array(predicted), np.array(realised)


def test_the_promised_interval_is_the_one_that_comes() -> None:
    predicted, realised = studies(False, 200)
    assert predicted.mean() == pytest.approx(realised.mean(), rel=0.1)


def test_the_promised_interval_is_the_one_that_comes_with_a_free_offset() -> None:
    predicted, realised = studies(True, 40)
    assert np.median(predicted) == pytest.approx(np.median(realised), rel=0.2)


def test_the_surfaces_promise() -> None:
    """Refits with the new run agree with the standard error said beforehand."""
    rng = np.random.default_rng(5)
    new = pd.DataFrame({"params": [1e9], "tokens": [1e11], "flops": [6e20]})
    N_all, D_all = np.append(N, 1e9), np.append(D, 1e11)
    said, came = [], []
    for _ in range(40):
        L = (2 + 40 * N_all**-0.3 + 120 * D_all**-0.32) * np.exp(0.002 * rng.normal(size=17))
        law, after = (fit_parametric(n, d, v, "squared") for n, d, v in ((N, D, L[:-1]), (N_all, D_all, L)))
        said.append(next_run(law, new, "a").best["se"])
        came.append(next_run(after, new, "a").se)
    assert np.mean(said) == pytest.approx(np.mean(came), rel=0.1)


@pytest.mark.parametrize("law", [PLAIN, FIXED, FREE])
@pytest.mark.parametrize("target", ["alpha", "beta", ("loss", 1e9)])
def test_every_run_helps_and_more_copies_help_more(law: PowerLaw, target: str | tuple[str, float]) -> None:
    found = next_run(law, NEXT, target, copies=(1, 2, 4))
    assert (found.table["half_width"] < found.half_width).all()
    for _, part in found.table.groupby("depth"):
        assert part.sort_values("copies")["half_width"].is_monotonic_decreasing
    assert found.table["shrink_per_cost"].is_monotonic_decreasing
    assert found.best["shrink_per_cost"] == found.table["shrink_per_cost"].max()


def test_a_slope_wants_the_far_end() -> None:
    """Of a straight line, the run farthest from the middle says most about the slope."""
    found = next_run(PLAIN, NEXT, "alpha", budget=NEXT["flops"].max())
    assert found.best["depth"] == 12
    far = (np.log(NEXT["params"]) - np.log(X).mean()).abs()
    order = found.table["depth"].tolist()
    assert order == NEXT["depth"][far.sort_values(ascending=False).index].tolist()
    less = next_run(PLAIN, NEXT, "alpha", budget=float(NEXT["flops"][8]))
    assert less.best["depth"] == 9
    assert less.table["affordable"].tolist() == [True] * 9 + [False] * 3


def test_units_of_cost_and_scale_do_not_matter() -> None:
    found = next_run(PLAIN, NEXT, "alpha")
    scaled = NEXT.assign(params=NEXT["params"] / 1e9, flops=NEXT["flops"] * 7)
    other = next_run(fit_power_law(X / 1e9, Y), scaled, "alpha")
    assert other.best["depth"] == found.best["depth"]
    np.testing.assert_allclose(other.table["half_width"], found.table["half_width"], rtol=1e-9)
    np.testing.assert_allclose(other.table["shrink_per_cost"] * 7, found.table["shrink_per_cost"], rtol=1e-9)


def test_seeds_of_a_scale_cannot_do_what_a_new_scale_does() -> None:
    """What keeps a scale off the law is shared by its seeds."""
    x = np.repeat(X, 3)
    off = np.repeat(0.004 * RNG.normal(size=6), 3)
    y = (1e-9 * x) ** -0.05 * np.exp(off + 0.001 * RNG.normal(size=18))
    found = next_run(fit_power_law(x, y, groups=x), NEXT, "alpha", copies=(1, 100))
    table = found.table.set_index(["depth", "copies"])["half_width"]
    assert table[6, 100] > 0.98 * found.half_width
    assert table[7, 1] < 0.9 * found.half_width
    assert table[7, 100] > 0.95 * table[7, 1]


def test_variance_between_scales_and_between_seeds() -> None:
    """Seeds that differ as much as scales do: another seed helps as a run of its own nearly would."""
    local = LocalLaw(
        lambda at: np.column_stack([np.ones(len(at)), at[:, 0]]),
        np.array([[-1.0], [0.5], [1.0]]), np.array([1.0, 1.0, 1.0]), 0.0, 1.0, True, 2,
    )  # fmt: skip
    slope = np.array([0.0, 1.0])
    twice, freedom = local.after(slope, np.array([1.0]), 1)
    assert freedom == local.freedom
    x = np.array([-1.0, 0.5, 1.0, 1.0])
    assert twice == pytest.approx(1 / np.sqrt(((x - x.mean()) ** 2).sum()), rel=1e-12)


def test_hubers_noise_is_that_of_squares_when_delta_is_wide() -> None:
    huber = fit_parametric(N, D, LOSS, "huber", delta=1.0)
    assert next_run(huber, LADDER, "a").se == pytest.approx(next_run(SURFACE, LADDER, "a").se, rel=1e-5)
    narrow = fit_parametric(N, D, LOSS, "huber", delta=1e-3)
    assert next_run(narrow, LADDER, "a").se == pytest.approx(next_run(SURFACE, LADDER, "a").se, rel=0.7)


def checkpoints() -> PowerLaw:
    x = np.concatenate([X, X * 1.1])
    return fit_power_law(x, (1e-9 * x) ** -0.05 * np.exp(0.01 * np.sin(x)), groups=np.tile(np.arange(6), 2))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: next_run(checkpoints(), NEXT), "share their noise; fit the law to the runs' last"),
        (lambda: next_run(PLAIN, NEXT, "offset"), r"target 'offset': expected alpha, beta, \('loss', x\)$"),
        (lambda: next_run(SURFACE, LADDER, ("loss", 1.0)), "expected alpha, beta, E, A, B, a or"),
        (lambda: next_run(SURFACE, NEXT), "lack the column tokens"),
        (lambda: next_run(PLAIN, NEXT.drop(columns="flops")), "lack the column flops"),
        (lambda: next_run(PLAIN, NEXT.iloc[:0]), "at least one candidate"),
        (lambda: next_run(PLAIN, NEXT, copies=(0,)), "copies of 1 or more"),
        (lambda: next_run(PLAIN, NEXT.assign(params=-1.0)), "candidates' params: must be positive"),
        (lambda: next_run(PLAIN, NEXT, budget=1.0), r"no candidate costs 1 or less \(flops\); the cheapest"),
        (lambda: next_run(PLAIN, NEXT, level=1.5), "level must lie between"),
        (lambda: next_run(fit_power_law(X, X**-0.1), NEXT), "goes through every point"),
        (lambda: next_run(SURFACE, LADDER, unique_tokens=1e9), "fitted without repeated data"),
        (lambda: next_run(fit_power_law(X, 3 + X**-0.5, True), NEXT), "goes through every point|is no fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        act()


def test_text_and_page() -> None:
    found = next_run(SURFACE, LADDER, "a", budget=1e22, copies=(1, 2))
    assert isinstance(SURFACE, ParametricLaw)
    assert "a = β/(α + β): half-width" in found.summary()
    assert "within flops 1e+22" in found.summary()
    assert "<script>" not in next_run(PLAIN, NEXT.assign(name="<script>"))._repr_html_()
