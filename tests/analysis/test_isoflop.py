"""IsoFLOP minima: found where they are, rejected where they are not, with the bias said aloud."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, t

from analysis import DataError, fit_power_law
from analysis.isoflop import IsoFlop, fit_isoflop
from analysis.plots import figure, styled, to_svg
from analysis.valleys import NEAR, Akima, Parabola, fit_valley, places

FLOPS = np.geomspace(6e18, 1e21, 6)


class Chinchilla:
    """L = E + A/N^α + B/D^β with its optimum at C = 6ND."""

    def __init__(self, alpha: float = 0.3473, beta: float = 0.3672) -> None:
        self.alpha, self.beta = alpha, beta
        self.a = beta / (alpha + beta)
        self.scale = (alpha * 482.01 / (beta * 2085.43)) ** (1 / (alpha + beta))

    def value(self, params: Any, tokens: Any) -> Any:
        return (
            1.8172 + 482.01 * np.asarray(params) ** -self.alpha + 2085.43 * np.asarray(tokens) ** -self.beta
        )

    def optimum(self, flops: Any) -> Any:
        return self.scale * (np.asarray(flops) / 6) ** self.a


def sweep(
    surface: Chinchilla, decades: float = 1.0, per: int = 7, shift: float = 0.0
) -> dict[str, np.ndarray]:
    """``per`` N over ± ``decades`` around (``shift`` decades beside) the optimum of each budget."""
    z = np.linspace(-decades, decades, per) + shift
    N = (surface.optimum(FLOPS)[:, None] * 10**z).ravel()
    C = np.repeat(FLOPS, per)
    return {"params": N, "flops": C, "tokens": C / 6 / N, "loss": surface.value(N, C / 6 / N)}


def valleys(a: float, bend: float = 0.01) -> dict[str, np.ndarray]:
    """Exact parabolas of L in log N with N_opt = 2 C^a."""
    z = np.linspace(-1.5, 2.0, 6)
    N = (2 * FLOPS[:, None] ** a * np.exp(z)).ravel()
    C = np.repeat(FLOPS, 6)
    floor = 3 * (C / FLOPS[0]) ** -0.05
    return {"params": N, "flops": C, "loss": floor * (1 + bend * np.tile(z, len(FLOPS)) ** 2)}


@given(st.floats(0.2, 0.8))
@settings(max_examples=25, deadline=None)
def test_exact_parabolas_give_the_exact_exponents(a: float) -> None:
    iso = fit_isoflop(**valleys(a))
    assert iso.converged
    assert iso.params["a"] == pytest.approx(a, rel=1e-8)
    assert iso.params["b"] == pytest.approx(1 - a, rel=1e-8)
    assert iso.params["loss"] == pytest.approx(-0.05, rel=1e-8)
    np.testing.assert_allclose([b.params for b in iso.budgets], 2 * FLOPS**a, rtol=1e-8)
    np.testing.assert_allclose([b.tokens for b in iso.budgets], FLOPS ** (1 - a) / 12, rtol=1e-8)


@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("method", ["parabola", "spline"])
def test_units_and_order_change_nothing(method: Any, n_unit: float, c_unit: float, l_unit: float) -> None:
    data = sweep(Chinchilla(), 0.6)
    data["loss"] = data["loss"] * np.exp(0.003 * np.sin(37 * np.arange(len(data["loss"]))))
    one = fit_isoflop(data["params"], data["loss"], flops=data["flops"], method=method)
    order = np.random.default_rng(0).permutation(len(data["loss"]))
    other = fit_isoflop(
        data["params"][order] * n_unit, data["loss"][order] * l_unit, flops=data["flops"][order] * c_unit,
        method=method,
    )  # fmt: skip
    for name, value in one.params.items():
        assert other.params[name] == pytest.approx(value, rel=1e-7)
        assert other.interval()[name] == pytest.approx(one.interval()[name], rel=1e-6)
    assert [b.accepted for b in other.budgets] == [b.accepted for b in one.budgets]


def test_c_and_d_stand_for_each_other() -> None:
    data = sweep(Chinchilla())
    full = fit_isoflop(**data)
    by_c = fit_isoflop(data["params"], data["loss"], flops=data["flops"])
    by_d = fit_isoflop(data["params"], data["loss"], tokens=data["tokens"])
    assert by_c.params == pytest.approx(full.params, rel=1e-9)
    assert by_d.params == pytest.approx(full.params, rel=1e-9)
    assert "D = C/6N" in by_c.summary()
    assert "C = 6·N·D" in by_d.summary()


def test_another_cost_per_token_moves_only_d() -> None:
    """C = 9·N^1.1·D: the optimum's D follows the budget's own cost, not 6ND."""
    data = valleys(0.5)
    tokens = data["flops"] / (9 * data["params"] ** 1.1)
    iso = fit_isoflop(data["params"], data["loss"], tokens, data["flops"])
    assert iso.params["a"] == pytest.approx(0.5, rel=1e-8)
    assert iso.params["b"] == pytest.approx(1 - 1.1 * 0.5, rel=1e-8)


@pytest.mark.parametrize(
    ("alpha", "beta", "decades", "percent"),
    [(0.3473, 0.3672, 1.0, -1.3), (0.2, 0.4, 1.0, -12.1), (0.3473, 0.3672, 0.3, -0.1), (0.2, 0.4, 0.3, -1.2)],
)
def test_the_stated_bias(alpha: float, beta: float, decades: float, percent: float) -> None:
    """Without noise N_opt is too low by the figures of ``BIAS_NOTE``; the exponent is not touched."""
    truth = Chinchilla(alpha, beta)
    iso = fit_isoflop(**sweep(truth, decades, per=9))
    low = np.array([b.params for b in iso.budgets]) / truth.optimum(FLOPS) - 1
    assert 100 * low == pytest.approx(percent, abs=0.06)
    assert iso.params["a"] == pytest.approx(truth.a, abs=1e-6)
    found = iso.bias_under(truth)
    assert 100 * found["params"] == pytest.approx(percent, abs=0.06)
    assert abs(found["a"]) < 1e-6
    assert "bias" in iso.summary()
    assert fit_isoflop(**sweep(truth, decades, per=9), method="spline").bias_note == ""


def test_a_drifting_grid_biases_the_exponent_and_bias_under_says_by_how_much() -> None:
    truth = Chinchilla(0.2, 0.4)
    parts = [
        sweep(truth, 1.0, shift=0.1 * k) for k in range(len(FLOPS))
    ]  # fmt: skip
    data = {
        key: np.concatenate([p[key][p["flops"] == c] for p, c in zip(parts, FLOPS, strict=True)])
        for key in parts[0]
    }
    iso = fit_isoflop(**data)
    wrong = iso.params["a"] - truth.a
    assert abs(wrong) > 1e-3
    assert iso.bias_under(truth)["a"] == pytest.approx(wrong, rel=1e-3)


def test_intervals_cover() -> None:
    """Parabolas of 5 runs at 5 budgets with noise: 95 % intervals hold in about 95 % of studies."""
    rng = np.random.default_rng(3)
    truth = Chinchilla()
    data = sweep(truth, 0.5, per=5)
    # The parabola's own place, not the surface's: a minimum's interval knows nothing of its bias.
    own = np.log(fit_isoflop(data["params"], data["loss"], flops=data["flops"]).budgets[0].params)
    hits = np.zeros(2)
    for _ in range(150):
        noisy = data["loss"] * np.exp(0.003 * rng.normal(size=len(data["loss"])))
        iso = fit_isoflop(data["params"], noisy, flops=data["flops"])
        low, high = iso.interval()["a"]
        noise, freedom = iso.noise
        assert freedom == 12
        curve = iso.budgets[0].curve
        assert isinstance(curve, Parabola)
        below, above = curve.place_interval((t.ppf(0.975, freedom) * noise) ** 2)
        hits += [low <= truth.a <= high, below <= own <= above]
    assert (hits / 150 >= 0.9).all()
    assert (hits / 150 <= 0.99).all()


def test_intervals_are_as_wide_as_the_noise_that_was_put_in() -> None:
    """Coverage of few studies cannot show an interval that is too wide; its width against theory can."""
    rng = np.random.default_rng(5)
    data = sweep(Chinchilla(), 0.5, per=5)
    found, widths = [], []
    for _ in range(150):
        noisy = data["loss"] * np.exp(0.001 * rng.normal(size=len(data["loss"])))
        iso = fit_isoflop(data["params"], noisy, flops=data["flops"])
        found.append(iso.params["a"])
        widths.append(np.ptp(iso.interval()["a"]))
    error = np.std(found) * np.sqrt(chi2.median(4) / 4)
    assert np.median(widths) == pytest.approx(2 * t.ppf(0.975, 4) * error, rel=0.2)


def test_runs_that_serve_several_budgets_are_not_independent() -> None:
    """Eight runs read off at five budgets: by run the interval covers, by budget it does not."""
    rng = np.random.default_rng(4)
    surface = Chinchilla()
    C = np.repeat(np.geomspace(2e19, 3e20, 5), 8)
    N = np.tile(np.geomspace(1e8, 1e10, 8), 5)
    runs = np.tile(np.arange(8), 5)
    exact = surface.value(N, C / 6 / N)
    centre = fit_isoflop(N, exact, flops=C).params["a"]
    by_run = by_budget = 0
    for _ in range(100):
        noisy = exact * np.exp(0.004 * rng.normal(size=8)[runs] + 0.0005 * rng.normal(size=40))
        iso = fit_isoflop(N, noisy, flops=C, groups=runs)
        assert iso.by_run
        low, high = iso.interval()["a"]
        by_run += low <= centre <= high
        low, high = fit_isoflop(N, noisy, flops=C).interval()["a"]
        by_budget += low <= centre <= high
    assert by_run / 100 >= 0.93
    assert by_budget / 100 < 0.88


def test_groups_within_budgets_change_nothing() -> None:
    data = sweep(Chinchilla(), 0.5)
    one = fit_isoflop(data["params"], data["loss"], flops=data["flops"])
    two = fit_isoflop(data["params"], data["loss"], flops=data["flops"], groups=np.arange(42))
    assert two.interval() == one.interval()
    assert not two.by_run


def test_bad_minima_are_rejected_and_named() -> None:
    data = valleys(0.5)
    N, C, L = data["params"].reshape(6, 6), data["flops"].reshape(6, 6), data["loss"].reshape(6, 6).copy()
    z = np.linspace(-1.5, 2.0, 6)
    L[0] = 3 * (1 - 0.01 * z**2)
    L[1] = 3 * (1 + 0.01 * (z - 4) ** 2)
    L[2] = 3 * (1 + 0.01 * (z + 4) ** 2)
    iso = fit_isoflop(N.ravel(), L.ravel(), flops=C.ravel())
    assert [b.accepted for b in iso.budgets] == [False] * 3 + [True] * 3
    assert iso.params["a"] == pytest.approx(0.5, rel=1e-8)
    assert "3 of 6 budgets accepted; rejected 3" in iso.status
    reasons = [b.reason for b in iso.budgets]
    assert "opens downwards" in reasons[0]
    assert "above the sampled" in reasons[1]
    assert "below the sampled" in reasons[2]
    assert list(iso.table["reason"]) == reasons

    spline = fit_isoflop(N.ravel(), L.ravel(), flops=C.ravel(), method="spline")
    assert "largest N sampled" in spline.budgets[1].reason
    assert "smallest N sampled" in spline.budgets[2].reason


def test_too_few_minima_leave_the_table_but_no_exponents() -> None:
    data = valleys(0.5)
    keep = data["flops"] < FLOPS[1] * 1.01
    iso = fit_isoflop(**{key: column[keep] for key, column in data.items()})
    assert not iso.converged
    assert "need 3 accepted budgets" in iso.status
    assert len(iso.table) == 2
    assert "no exponents" in iso.summary()
    assert "no exponents" in iso._repr_html_()
    for ask in (lambda: iso.params, iso.interval, lambda: iso.predict(1e20)):
        with pytest.raises(DataError, match="no exponents"):
            ask()


def test_budgets_by_tolerance_and_by_label() -> None:
    data = valleys(0.5)
    jitter = np.exp(0.02 * np.sin(np.arange(36)))
    near = fit_isoflop(data["params"], data["loss"], flops=data["flops"] * jitter)
    assert len(near.budgets) == 6
    assert 0.02 < near.table["spread"].max() < 0.05
    wide = np.exp(0.3 * np.sin(np.arange(36)))
    labels = np.repeat(list("abcdef"), 6)
    named = fit_isoflop(data["params"], data["loss"], flops=data["flops"] * wide, budget=labels)
    assert len(named.budgets) == 6
    with pytest.raises(DataError, match=r"budgets run into one another: rows .* --budget, --tolerance"):
        fit_isoflop(data["params"], data["loss"], flops=np.geomspace(1e18, 3e18, 36))


def test_spline_passes_through_the_means_and_finds_the_lowest_point() -> None:
    data = sweep(Chinchilla(), 0.6, per=9)
    twice = {key: np.concatenate([column, column]) for key, column in data.items()}
    twice["loss"] = np.concatenate([data["loss"] * 1.002, data["loss"] * 0.998])
    iso = fit_isoflop(**twice, method="spline")
    assert iso.params["a"] == pytest.approx(Chinchilla().a, abs=2e-3)
    for b in iso.budgets:
        assert b.curve is not None
        inside = np.log(twice["params"][b.index])
        fine = np.linspace(inside.min(), inside.max(), 4001)
        assert b.loss <= b.curve.value(fine).min() + 1e-12
        at = b.curve.value(np.log(twice["params"][b.index]))
        np.testing.assert_allclose(at[:9], (twice["loss"][b.index][:9] + twice["loss"][b.index][9:]) / 2)


def test_spline_does_not_trust_points_that_lie_too_close() -> None:
    """Two noisy losses at nearly one N: one knot at 1 % apart, a rejected dip at 6 %."""
    z = np.array([-1.2, -0.6, 0.0, 0.01, 0.6, 1.2])
    loss = 3 + 0.1 * z**2
    loss[2:4] += [0.01, -0.01]
    near = fit_valley(z, loss, "spline")
    assert isinstance(near, Akima)
    assert abs(near.log_n) < 0.02
    assert near.value(np.array(near.log_n)) == pytest.approx(3, abs=1e-4)
    z[3] = 0.06
    apart = fit_valley(z, np.array([3.07, 2.94, 2.94, 3.02, 2.97, 3.06]), "spline")
    assert isinstance(apart, Akima)
    assert "dips far below" in apart.reason


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_places_are_no_wider_than_five_percent_and_no_more_than_needed(log_n: list[float]) -> None:
    at = np.array(log_n)
    which = places(at)
    assert set(which) == set(range(which.max() + 1))
    starts = [at[which == k].min() for k in range(which.max() + 1)]
    for k, start in enumerate(starts):
        assert np.ptp(at[which == k]) <= NEAR + 1e-9
        assert k == 0 or start - starts[k - 1] > NEAR


@pytest.mark.parametrize("method", ["parabola", "spline"])
def test_seeds_whose_n_differ_by_rounding_are_one_size(method: Any) -> None:
    """N = {n, 1.001 n, 6.3 n}: whatever the noise, that budget has no minimum and the others the law."""
    truth, noise = Chinchilla(), np.random.default_rng(7)
    data = sweep(truth, 0.5, per=5)
    C = np.append(data["flops"], np.full(3, 4e21))
    N = np.append(data["params"], truth.optimum(4e21) * np.array([0.4, 0.4004, 2.52]))
    exact = truth.value(N, C / 6 / N)
    for _ in range(20):
        L = exact * np.exp(0.002 * noise.normal(size=len(N)))
        iso = fit_isoflop(N, L, flops=C, method=method)
        assert iso.budgets[-1].reason.startswith("2 distinct N")
        assert iso.table["distinct"].tolist() == [5] * 6 + [2]
        rest = slice(0, -3)
        assert iso.params == fit_isoflop(N[rest], L[rest], flops=C[rest], method=method).params


@pytest.mark.parametrize("method", ["parabola", "spline"])
def test_small_steps_of_n_do_not_chain_into_one_size(method: Any) -> None:
    """40 N in steps of 4 %: 20 places, and the valley that a coarser grid has."""
    C = np.repeat(FLOPS, 40)
    N = Chinchilla().optimum(C) * np.tile(1.04 ** (np.arange(40) - 19.5), len(FLOPS))
    iso = fit_isoflop(N, Chinchilla().value(N, C / 6 / N), flops=C, method=method)
    assert [b.distinct for b in iso.budgets] == [20] * len(FLOPS)
    assert iso.params["a"] == pytest.approx(Chinchilla().a, abs=1e-3)


def test_a_budget_too_poor_for_its_method_is_counted_in_places() -> None:
    N = np.tile([1e7, 1.001e7, 3e7, 3.003e7, 9e7, 9.009e7], 3)
    C = np.repeat([1e18, 1e19, 1e20], 6)
    L = 3 + 0.01 * np.arange(18)
    with pytest.raises(DataError, match=r"spline needs 5 distinct N .* the fullest has 3, N within 5 %"):
        fit_isoflop(N, L, flops=C, method="spline")


def test_a_fixed_offset_weighs_by_the_variance_of_what_it_fits() -> None:
    """Weights of L_opt's law against the variance of log(L_opt − E) over drawn noise."""
    rng = np.random.default_rng(8)
    data = sweep(Chinchilla(), 0.5, per=5)
    offset = 1.8172
    drawn = []
    for _ in range(200):
        noisy = data["loss"] * np.exp(0.001 * rng.normal(size=len(data["loss"])))
        iso = fit_isoflop(data["params"], noisy, flops=data["flops"], loss_offset=offset)
        drawn.append([np.log(b.loss - offset) for b in iso.budgets])
    law = fit_isoflop(**data, loss_offset=offset).laws["loss"]
    product = law.weights * np.var(drawn, axis=0)
    assert law.weights.max() > 3 * law.weights.min()
    assert product == pytest.approx(np.full(len(FLOPS), product.mean()), rel=0.3)


def test_numpy_bools_are_bools() -> None:
    data = sweep(Chinchilla(), 0.3)
    for plain in (True, False):
        law = fit_isoflop(**data, loss_offset=np.bool_(plain)).laws["loss"]
        assert law.kind == fit_isoflop(**data, loss_offset=plain).laws["loss"].kind
        assert law.kind == ("free" if plain else "none")


def test_every_law_names_its_own_interval() -> None:
    data = sweep(Chinchilla(), 0.5, per=5)
    data["loss"] = data["loss"] * np.exp(0.001 * np.random.default_rng(9).normal(size=30))
    plain = "Student's t over 6 budgets, 4 degrees of freedom"
    assert fit_isoflop(**data).interval_method == plain
    assert fit_isoflop(**data, loss_offset=1.5).interval_method == plain
    free = fit_isoflop(**data, loss_offset=True)
    assert free.interval_method == (
        plain + " (L_opt above its free offset: profile likelihood over 6 budgets, 3 degrees of freedom)"
    )
    assert "profile likelihood, 3 degrees of freedom" in free.laws["loss"].interval_method
    assert free.interval_method in free.summary()


def test_shared_runs_have_no_interval_by_spline() -> None:
    data = sweep(Chinchilla(), 0.6)
    iso = fit_isoflop(**data, method="spline", groups=np.tile(np.arange(7), 6))
    assert "spline" in iso.no_interval()
    with pytest.raises(DataError, match="spline"):
        iso.interval()
    assert "none: runs serve several budgets" in iso.summary()


def test_prediction_is_the_law_of_the_minima() -> None:
    iso = fit_isoflop(**sweep(Chinchilla(), 0.3))
    said = iso.predict(1e22)
    law = fit_power_law([b.flops for b in iso.budgets], [b.params for b in iso.budgets])
    assert said["params"].value[0] == pytest.approx(law.value(1e22), rel=1e-6)
    assert said["params"].value[0] * said["tokens"].value[0] * 6 == pytest.approx(1e22, rel=1e-9)
    assert (said["loss"].low < said["loss"].value).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": [1.0, np.nan, 2.0]}, "loss: NaN or infinite in row 1"),
        ({"params": [1.0, -1.0, 2.0]}, "params: must be positive for a power law, row 1"),
        ({"flops": [1e18, 1e18]}, "columns differ in length"),
        ({"flops": None}, "needs C or D beside N"),
        ({"params": [1e6, 1e6, 2e6]}, "needs 3 distinct N in a budget; of 1 budgets .* the fullest has 2"),
        ({"method": "cubic"}, "expected 'parabola' or 'spline', got 'cubic'"),
        ({"tolerance": -1}, "tolerance must lie"),
        ({"groups": [1, 2]}, "groups: expected 3 labels"),
        ({"budget": [1, 2]}, "expected 3 labels"),
        ({"params": [], "loss": [], "flops": []}, "distinct N in a budget; of 0 budgets"),
    ],
)
def test_bad_data_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"params": [1e6, 2e6, 4e6], "loss": [3.0, 2.9, 3.0], "flops": [1e18] * 3}
    with pytest.raises(DataError, match=message):
        fit_isoflop(**(good | change))


def _drawn(iso: IsoFlop) -> str:
    with styled():
        fig, ax = figure("IsoFLOP", "", "")
        iso.plot(ax)
        return to_svg(fig)


def test_plot_marks_what_was_rejected() -> None:
    data = valleys(0.5)
    data["loss"][:6] = 3 * (1 - 0.01 * np.linspace(-1.5, 2.0, 6) ** 2)
    text = _drawn(fit_isoflop(**data))
    assert "rejected (1)" in text
    assert "a = 0.500" in text
    keep = data["flops"] < FLOPS[1] * 1.01
    assert "no exponents" in _drawn(fit_isoflop(**{key: column[keep] for key, column in data.items()}))
