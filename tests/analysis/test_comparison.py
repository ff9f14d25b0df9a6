"""Two laws side by side: signs, crossings where they are, ranges that cover, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from analysis import DataError, PowerLaw, fit_power_law
from analysis.comparison import compare
from analysis.plots import figure, styled, to_svg

N = 73728.0 * np.arange(1, 7) ** 3.0
MEET = 2e6


def law(
    alpha: float, seed: int, noise: float = 0.002, meet: float = MEET, offset: float = 0.0, n: int = 6
) -> PowerLaw:
    """Fitted to ``offset + (3 − offset)(N/meet)^alpha``; with an offset it is fitted free."""
    x = 73728.0 * np.arange(1, n + 1) ** 3.0
    rng = np.random.default_rng(seed)
    y = (offset + (3 - offset) * (x / meet) ** alpha) * np.exp(noise * rng.normal(size=n))
    return fit_power_law(x, y, offset=offset > 0)


@given(st.integers(0, 10**6), st.floats(-0.3, -0.02), st.floats(-0.3, -0.02))
@settings(max_examples=20, deadline=None)
def test_swapping_the_two_flips_signs_and_keeps_crossings(seed: int, one: float, two: float) -> None:
    a, b = law(one, seed), law(two, seed + 1, 0.004)
    there, back = compare(a, b, ("a", "b")), compare(b, a, ("b", "a"))
    assert there.difference == -back.difference
    low, high = there.interval()
    assert back.interval() == pytest.approx((-high, -low), rel=1e-12)
    forth, reverse = there.ratio(1e7), back.ratio(1e7)
    assert forth.value * reverse.value == pytest.approx(1, rel=1e-12)
    assert forth.low * reverse.high == pytest.approx(1, rel=1e-12)
    assert there.crossings == pytest.approx(back.crossings, rel=1e-9)
    np.testing.assert_allclose(there.undecided, back.undecided, rtol=1e-6)
    assert there.verdict == back.verdict


@given(st.floats(1e-9, 1e9), st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
def test_units_move_the_crossing_and_nothing_else(x_unit: float, y_unit: float) -> None:
    a, b = law(-0.1, 0), law(-0.14, 1)
    one = compare(a, b)
    other = compare(*(fit_power_law(fit.x * x_unit, fit.y * y_unit) for fit in (a, b)))
    assert other.difference == pytest.approx(one.difference, rel=1e-9)
    assert other.interval() == pytest.approx(one.interval(), rel=1e-9)
    assert other.crossings[0] == pytest.approx(one.crossings[0] * x_unit, rel=1e-6)
    np.testing.assert_allclose(np.array(other.undecided), np.array(one.undecided) * x_unit, rtol=1e-5)


def test_exact_laws_cross_where_they_do() -> None:
    found = compare(law(-0.1, 0, noise=0.0), law(-0.14, 1, noise=0.0), ("flat", "steep"), x_name="N")
    assert found.difference == pytest.approx(0.04, rel=1e-9)
    assert found.interval() == pytest.approx((0.04, 0.04), rel=1e-6)
    assert found.crossings == pytest.approx((MEET,), rel=1e-6)
    assert "flat is lower below N = 2e+06, steep above" in found.verdict


def test_the_difference_is_welch() -> None:
    """Against the textbook: standard errors 4 and 10 degrees of freedom."""
    a, b = law(-0.1, 0, 0.001), law(-0.14, 1, 0.004, n=12)
    errors = [np.ptp(fit.interval()["alpha"]) / 2 / t.ppf(0.975, len(fit.x) - 2) for fit in (a, b)]
    v = np.square(errors)
    freedom = v.sum() ** 2 / (v[0] ** 2 / 4 + v[1] ** 2 / 10)
    half = t.ppf(0.975, freedom) * np.sqrt(v.sum())
    found = compare(a, b)
    assert found.interval() == pytest.approx((found.difference - half, found.difference + half), rel=1e-9)


def test_intervals_of_difference_and_crossing_cover() -> None:
    """6 + 6 runs of unequal noise: 95 % intervals hold in about 95 % of studies."""
    hits = np.zeros(3)
    width = []
    truth = (1e7 / MEET) ** 0.04
    for seed in range(400):
        found = compare(law(-0.1, 2 * seed), law(-0.14, 2 * seed + 1, 0.004))
        low, high = found.interval()
        ratio = found.ratio(1e7)
        hits += [
            low <= 0.04 <= high,
            any(start <= MEET <= stop for start, stop in found.undecided),
            ratio.low[0] <= truth <= ratio.high[0],
        ]
        width.append(high - low)
    assert (hits / 400 >= 0.92).all()
    assert (hits / 400 <= 0.98).all()
    log_x = np.log(N) - np.log(N).mean()
    error = np.hypot(0.002, 0.004) / np.sqrt((log_x**2).sum())
    assert np.median(width) == pytest.approx(2 * t.ppf(0.975, 6) * error, rel=0.15)


def test_laws_with_offsets_may_cross_twice() -> None:
    x = np.geomspace(1e5, 1e9, 12)
    wave = np.exp(1e-5 * np.sin(5 * np.arange(12)))
    a = fit_power_law(x, (2.0 + 2.0 * (x / 1e5) ** -0.30) * wave, offset=True)
    # Through a's law at 1e6 and 1e8, with another exponent.
    places = np.array([1e6, 1e8])
    there = (places / 1e5) ** -0.15  # two equations for the scale and the floor
    scale, floor = np.linalg.solve(np.stack([there, np.ones(2)], 1), 2.0 + 2.0 * (places / 1e5) ** -0.30)
    b = fit_power_law(x, (floor + scale * (x / 1e5) ** -0.15) * wave[::-1], offset=True)
    found = compare(a, b, ("a", "b"))
    assert found.crossings == pytest.approx((1e6, 1e8), rel=0.05)
    assert len(found.undecided) == 2
    assert all(
        start < place < stop for (start, stop), place in zip(found.undecided, found.crossings, strict=True)
    )
    assert found.method.startswith("MOVER")
    assert found.verdict.count("is lower below") == 2


def test_a_fixed_offset_is_a_line_and_its_ratio_is_mover() -> None:
    """Zou and Donner's combination, by hand, of the two laws' own intervals of log L."""
    noise = np.exp(0.001 * np.sin(5 * np.arange(6)))
    a, b = fit_power_law(N, 1 + 2 * (N / MEET) ** -0.2 * noise, offset=1.0), law(-0.1, 3)
    found = compare(a, b)
    assert found.method == "Welch's t"
    said = found.ratio(1e7)
    one, two = a.predict(1e7), b.predict(1e7)
    d = np.log(one.value / two.value)
    below = np.sqrt(np.log(one.value / one.low) ** 2 + np.log(two.high / two.value) ** 2)
    above = np.sqrt(np.log(one.high / one.value) ** 2 + np.log(two.value / two.low) ** 2)
    np.testing.assert_allclose([np.log(said.low), np.log(said.high)], [d - below, d + above], rtol=1e-9)


def test_parallel_laws_never_meet_and_far_ones_beyond_reach() -> None:
    a, b = law(-0.1, 0), law(-0.1, 1, meet=4e6)
    found = compare(a, b, ("a", "b"))
    assert found.crossings == ()
    assert found.undecided == ()
    assert "do not cross" in found.verdict
    assert "decided everywhere" in found.verdict
    near = compare(law(-0.1, 0, 0.02), law(-0.1, 1, 0.02))
    assert "undecided everywhere" in near.verdict
    far = compare(law(-0.10, 0, meet=1e9), law(-0.14, 1, meet=1e9), extrapolation=10)
    assert far.crossings == ()
    assert "they meet at X = 1e9." in far.verdict.replace("1e8.", "1e9.")


def test_an_open_range_is_said() -> None:
    found = compare(law(-0.1, 0, 0.01, meet=2e7), law(-0.11, 1, 0.01, meet=2e7), extrapolation=2)
    assert found.verdict.endswith("; at 95% undecided: X from 6.74e+06, open above")
    wider = compare(found.first, found.second, level=0.5, extrapolation=2)
    assert sum(np.ptp(np.log(p)) for p in wider.undecided) <= sum(np.ptp(np.log(p)) for p in found.undecided)


def test_refusals() -> None:
    a, b = law(-0.1, 0), law(-0.14, 1)
    with pytest.raises(DataError, match="same points"):
        compare(a, a)
    with pytest.raises(DataError, match="same points"):
        compare(a, fit_power_law(a.x[::-1], a.y[::-1], offset=1.0))
    with pytest.raises(DataError, match="two different names"):
        compare(a, b, ("x", "x"))
    with pytest.raises(DataError, match="extrapolation must be at least 1, got nan"):
        compare(a, b, extrapolation=float("nan"))
    with pytest.raises(DataError, match=r"b has no interval: .*bootstrap=4000"):
        compare(a, fit_power_law(b.x, b.y, loss_fn="huber"), ("a", "b"))
    down = fit_power_law(N, (1e-9 * N) ** -0.05 * np.exp(-0.003 * np.log(N / MEET) ** 2), offset=True)
    with pytest.raises(DataError, match="b: no offset found"):
        compare(a, down, ("a", "b"))
    with pytest.raises(DataError, match="level must lie between 0 and 1"):
        compare(a, b, level=95)


def test_words_and_figure() -> None:
    found = compare(law(-0.1, 0), law(-0.14, 1), ("<b>CIFAR</b>", "Image$net"), x_name="N")
    text = found.summary()
    assert "runs independent" in text
    assert "excludes 0" in text
    assert "<b>" not in found._repr_html_()
    with styled():
        fig, ax = figure("two", "", "")
        found.plot(ax)
        svg = to_svg(fig)
    assert "undecided at 95%" in svg
    assert "cross at" in svg
