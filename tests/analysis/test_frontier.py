"""The Pareto set and the hull are what they say, for any points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import DataError, pareto_frontier

POINTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40)


@given(POINTS)
def test_pareto_keeps_exactly_the_undominated(points: list[tuple[int, int]]) -> None:
    x, y = np.array(points, dtype=float).T
    front = pareto_frontier(x, y)
    assert (np.diff(front.x) > 0).all()
    assert (np.diff(front.y) < 0).all()
    for px, py in points:
        beaten = ((front.x <= px) & (front.y <= py)).any()
        assert beaten
    np.testing.assert_array_equal(x[front.index], front.x)


@given(POINTS, st.booleans())
def test_hull_is_convex_below_all_and_within_the_pareto_set(points: list[tuple[int, int]], log: bool) -> None:
    x, y = np.array(points, dtype=float).T
    hull = pareto_frontier(x, y, kind="hull", log=log)
    assert set(hull.index) <= set(pareto_frontier(x, y).index)
    u, v = (np.log(hull.x), np.log(hull.y)) if log else (hull.x, hull.y)
    assert (np.diff(np.diff(v) / np.diff(u)) > 0).all()
    all_u, all_v = (np.log(x), np.log(y)) if log else (x, y)
    inside = (all_u >= u[0]) & (all_u <= u[-1])
    assert (all_v[inside] >= np.interp(all_u[inside], u, v) - 1e-12).all()


def test_estimands_differ_and_are_named() -> None:
    x, y = np.array([1.0, 2, 3, 4]), np.array([4.0, 3.9, 3.8, 1])
    assert len(pareto_frontier(x, y).x) == 4
    assert len(pareto_frontier(x, y, kind="hull").x) == 2
    assert pareto_frontier(x, y).estimand != pareto_frontier(x, y, kind="hull").estimand


def test_bad_input() -> None:
    with pytest.raises(DataError, match="y: NaN or infinite in row 1"):
        pareto_frontier([1, 2], [1, float("nan")])
    with pytest.raises(DataError, match="'pareto' or 'hull'"):
        pareto_frontier([1, 2], [2, 1], kind="best")  # type: ignore[arg-type]
