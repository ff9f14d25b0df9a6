"""Ticks that can be read, fits that are only drawn when they are fits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import fit_power_law
from analysis.plots import LINE, depth_colours, draw_law, figure, label_ends, log_ticks, number

N = 73728.0 * np.arange(1, 7) ** 3.0


@given(st.floats(1e-3, 1e16), st.floats(1.02, 1e9))
def test_every_log_axis_has_labelled_ticks(low: float, ratio: float) -> None:
    major, minor = log_ticks(low, low * ratio)
    assert 2 <= len(major) <= 9
    for ticks in (major, minor):
        assert ((ticks >= low) & (ticks <= low * ratio)).all()
    labels = [number(float(t)) for t in major]
    assert len(set(labels)) == len(labels)


def test_narrow_losses_get_round_ticks() -> None:
    assert log_ticks(4.27, 4.72)[0].round(6).tolist() == [4.3, 4.4, 4.5, 4.6, 4.7]


@pytest.mark.parametrize(
    ("value", "text"), [(4.35, "4.35"), (1e5, "10⁵"), (2.5e13, "2.5×10¹³"), (1e-9, "10⁻⁹"), (0.93, "0.93")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_colours_are_distinct_on_both_pages() -> None:
    for dark in (False, True):
        assert len(set(depth_colours(13, dark))) == 13


def test_an_unconverged_fit_is_not_drawn() -> None:
    concave = (1e-9 * N) ** -0.05 * np.exp(-0.003 * (np.log(N) - np.log(N).mean()) ** 2)
    law = fit_power_law(N, concave, offset=True)
    assert not law.converged
    _, ax = figure("t", "x", "y")
    draw_law(ax, law)
    drawn = [line for line in ax.lines if np.size(line.get_xdata()) > 0]
    assert [line.get_linestyle() for line in drawn] == ["None"]
    assert not ax.collections
    assert law.status in ax.get_legend_handles_labels()[1]
    _, ax = figure("t", "x", "y")
    fit_power_law(N, concave).plot(ax)
    assert len(ax.collections) == 1
    assert "α = " in ax.get_legend_handles_labels()[1][0]


@given(st.lists(st.floats(0.1, 0.9), min_size=1, max_size=14))
def test_every_curve_keeps_its_label_in_order(ends: list[float]) -> None:
    """However close the curves end, each is named, and no two names overlap."""
    _, ax = figure("t", "x", "y")
    ax.set_ylim(0, 1)
    label_ends(ax, [(1.0, y, f"d{i}", "k") for i, y in enumerate(ends)])
    assert {text.get_text() for text in ax.texts} == {f"d{i}" for i in range(len(ends))}
    heights = [ax.transData.transform((1.0, t.xy[1]))[1] + t.get_position()[1] / 0.72 for t in ax.texts]
    assert (np.diff(heights) >= LINE - 1e-6).all()
    assert [t.xy[1] for t in ax.texts] == sorted(ends)
