"""A break is found where it is, and a form is chosen by what it forecasts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import DataError
from analysis.broken import choose_form, fit_broken_power_law
from analysis.plots import figure, styled, to_svg


def ladder(n: int) -> np.ndarray:
    return 73728.0 * np.arange(1, n + 1) ** 3.0


def broken(x: np.ndarray, at: float, before: float, after: float, width: float = 0.3) -> np.ndarray:
    """Caballero et al. 2022, eq. 1, one break: b x^-c0 (1 + (x/d)^(1/f))^(-c1 f)."""
    return 5 * (x / at) ** before * (1 + (x / at) ** (1 / width)) ** ((after - before) * width)


@given(st.floats(-0.3, -0.02), st.floats(1.3, 4.0), st.floats(0.2, 0.8))
@settings(max_examples=20, deadline=None)
def test_exact_data_give_the_exact_break(before: float, times: float, share: float) -> None:
    x = np.geomspace(1e5, 1e9, 12)
    at = float(np.exp(np.log(1e5) + share * np.log(1e4)))
    law = fit_broken_power_law(x, broken(x, at, before, before * times))
    assert law.converged, law.status
    assert law.params["alpha"] == pytest.approx(before, rel=1e-5)
    assert law.params["alpha_after"] == pytest.approx(before * times, rel=1e-5)
    assert law.params["break"] == pytest.approx(at, rel=1e-4)
    assert law.params["loss_break"] == pytest.approx(5, rel=1e-4)
    np.testing.assert_allclose(law.value(10 * x), broken(10 * x, at, before, before * times), rtol=1e-4)


@given(st.floats(1e-9, 1e9), st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
def test_units_and_order_change_nothing(x_unit: float, y_unit: float) -> None:
    x = ladder(10)
    y = broken(x, 1e7, -0.05, -0.1) * np.exp(0.002 * np.sin(7 * np.arange(10)))
    one = fit_broken_power_law(x, y)
    order = np.random.default_rng(0).permutation(10)
    other = fit_broken_power_law(x[order] * x_unit, y[order] * y_unit)
    assert other.params["alpha"] == pytest.approx(one.params["alpha"], rel=1e-5)
    assert other.params["break"] == pytest.approx(one.params["break"] * x_unit, rel=1e-5)
    assert other.interval()["alpha_after"] == pytest.approx(one.interval()["alpha_after"], rel=1e-3)


def test_no_break_is_said_and_not_drawn() -> None:
    x = ladder(8)
    straight = fit_broken_power_law(x, x**-0.05)
    assert not straight.converged
    assert "straight line" in straight.status
    early = fit_broken_power_law(x, broken(x, x[0] * 0.9, -0.05, -0.3))
    assert "rests at the second distinct x" in early.status
    with styled():
        fig, ax = figure("none", "", "")
        straight.plot(ax)
        text = to_svg(fig)
    assert "no break found" in text
    assert len(ax.lines) == 2  # the points, and the legend's empty line


def test_intervals_cover() -> None:
    """Ten rungs, exponent −0.05 then −0.1, noise 0.2 %."""
    rng = np.random.default_rng(0)
    x = ladder(10)
    at, far = 1e7, 4 * 73728.0 * 1000
    truth = broken(x, at, -0.05, -0.1)
    ahead = broken(np.array([far]), at, -0.05, -0.1)[0]
    hits = np.zeros(5)
    for _ in range(200):
        law = fit_broken_power_law(x, truth * np.exp(0.002 * rng.normal(size=10)))
        bounds = law.interval()
        said, new = law.predict(far), law.predict(far, observation=True)
        came = ahead * np.exp(0.002 * rng.normal())
        hits += [
            bounds["alpha"][0] <= -0.05 <= bounds["alpha"][1],
            bounds["alpha_after"][0] <= -0.1 <= bounds["alpha_after"][1],
            bounds["break"][0] <= at <= bounds["break"][1],
            said.low[0] <= ahead <= said.high[0],
            new.low[0] <= came <= new.high[0],
        ]
        assert new.low[0] < said.low[0] < law.value(far) < said.high[0] < new.high[0]
    assert (hits / 200 >= 0.9).all()
    assert (hits / 200 <= 0.995).all()


def test_several_points_a_run_have_no_interval() -> None:
    x = np.repeat(ladder(8), 2)
    y = broken(x, 5e6, -0.05, -0.1) * np.exp(0.001 * np.sin(np.arange(16)))
    law = fit_broken_power_law(x, y, groups=np.repeat(np.arange(8), 2))
    assert law.groups == 8
    assert "several points per run" in law.summary()
    with pytest.raises(DataError, match="several points per run"):
        law.interval()
    with pytest.raises(DataError, match="several points per run"):
        law.predict(1e9)
    assert np.isfinite(law.value(1e9))


def test_a_plain_law_is_called_plain() -> None:
    rng = np.random.default_rng(1)
    x = ladder(9)
    chosen = [choose_form(x, x**-0.05 * np.exp(0.002 * rng.normal(size=9))).chosen for _ in range(30)]
    assert chosen.count("power") >= 27


def test_a_strong_break_is_called_a_break() -> None:
    rng = np.random.default_rng(2)
    x = ladder(9)
    y = broken(x, x[3], -0.05, -0.1)
    chosen = [choose_form(x, y * np.exp(0.002 * rng.normal(size=9))).chosen for _ in range(15)]
    assert chosen.count("broken") >= 12


def test_an_offset_is_called_an_offset() -> None:
    rng = np.random.default_rng(3)
    x = ladder(12)
    y = 2 + 1.5 * (x / x[0]) ** -0.3
    forms: Any = ("power", "offset")
    chosen = [choose_form(x, y * np.exp(0.001 * rng.normal(size=12)), forms).chosen for _ in range(10)]
    assert chosen.count("offset") >= 8


def test_the_choice_follows_its_rule() -> None:
    x = ladder(11)
    found = choose_form(x, x**-0.05 * np.exp(0.003 * np.sin(5 * np.arange(11))))
    table = found.table
    assert list(table["form"]) == ["power", "offset", "broken"]
    assert list(found.rungs) == list(x[5:])
    allowed = table["excess"] <= table["standard_error"]
    assert table.loc[allowed, "form"].iloc[0] == found.chosen
    assert table["excess"].min() == 0
    assert list(table.loc[table["chosen"], "form"]) == [found.chosen]
    assert f"chosen: {found.chosen}" in found.summary()
    assert "<table" in found._repr_html_()


def test_order_and_seeds_per_rung_do_not_change_the_choice() -> None:
    x = np.repeat(ladder(9), 2)
    y = broken(x, x[6], -0.05, -0.12) * np.exp(0.002 * np.sin(3 * np.arange(18)))
    order = np.random.default_rng(0).permutation(18)
    one, other = choose_form(x, y), choose_form(x[order], y[order])
    assert one.chosen == other.chosen
    assert len(one.rungs) == 4
    for form, error in one.errors.items():
        np.testing.assert_allclose(other.errors[form], error, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_broken_power_law([1, 2, 3, 4], [5, 4, 3, 2]), "at least 5 distinct x, got 4"),
        (lambda: fit_broken_power_law([1, 2, 3, 4, 5], [5, 4, 3, 2, -1]), "row 4 are not"),
        (lambda: fit_broken_power_law([1, 2, 3, 4, 5], [5, 4, 3]), "columns differ in length"),
        (
            lambda: fit_broken_power_law(ladder(6), ladder(6) ** -0.1, width=0),
            "width must be positive, got 0",
        ),
        (
            lambda: fit_broken_power_law(ladder(6), ladder(6) ** -0.1, [0, 0, 1, 1, 2, 3]),
            "5 independent groups",
        ),
        (lambda: choose_form(ladder(7), ladder(7) ** -0.1), "needs 8 distinct x .* got 7"),
        (lambda: choose_form(ladder(9), ladder(9) ** -0.1, ("line",)), "forms: expected some of power"),  # type: ignore[arg-type]
        (lambda: choose_form(ladder(9), ladder(9) ** -0.1, ()), "got none"),
    ],
)
def test_bad_data_are_named(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_figure_shows_the_break() -> None:
    x = ladder(10)
    law = fit_broken_power_law(x, broken(x, 1e7, -0.05, -0.1) * np.exp(0.002 * np.sin(7 * np.arange(10))))
    with styled():
        fig, ax = figure("broken", "", "")
        law.plot(ax)
        text = to_svg(fig)
    assert "break at" in text
    assert "status: converged" in law.summary()
    assert "<table" in law._repr_html_()
