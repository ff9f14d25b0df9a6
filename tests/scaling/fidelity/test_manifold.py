"""Precision and recall against the definition, written out in loops, and on cases known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from scaling.fidelity.manifold import precision_recall, radii
from scaling.schema import ConfigError

Points = NDArray[np.floating]


def inside(points: Points, centres: Points, k: int) -> float:
    """Share of ``points`` within a ball around a centre that just reaches its k-th nearest other centre."""
    hits = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = sorted(float(((o - centre) ** 2).sum()) for j, o in enumerate(centres) if j != i)
            if ((point - centre) ** 2).sum() <= others[k - 1]:
                hits += 1
                break
    return hits / len(points)


def measured(real: Points, generated: Points, k: int = 3, block: int = 1024) -> tuple[float, float]:
    return precision_recall(torch.from_numpy(real), torch.from_numpy(generated), k, block)


@given(
    st.integers(0, 2**32 - 1), st.integers(4, 20), st.integers(4, 20), st.integers(1, 3), st.integers(1, 25)
)
def test_is_the_definition_for_any_blocks(seed: int, n: int, m: int, k: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    real, generated = rng.normal(size=(n, 3)), 0.7 * rng.normal(size=(m, 3)) + 0.5
    assert measured(real, generated, k, block) == (inside(generated, real, k), inside(real, generated, k))


@given(st.integers(0, 2**32 - 1), st.integers(4, 20), st.integers(4, 20), st.integers(1, 25))
def test_ties_and_duplicates_are_those_of_the_definition(seed: int, n: int, m: int, block: int) -> None:
    """Points on a small grid: most distances tie, many points are copies of others."""
    rng = np.random.default_rng(seed)
    real, generated = (rng.integers(0, 4, (count, 2)).astype(np.float32) for count in (n, m))
    assert measured(real, generated, 3, block) == (inside(generated, real, 3), inside(real, generated, 3))


def test_a_point_on_the_edge_is_inside() -> None:
    real = np.array([[0.0], [1.0], [2.0], [3.0]])  # balls of radius 3, 2, 2, 3: from -3 to 6
    generated = np.array([[-3.0], [6.0], [6.5], [-4.0]])
    precision, _ = measured(real, generated)
    assert precision == 0.5


def test_copies_have_no_distance_and_no_radius() -> None:
    """Four equal features make a ball of one point, and rounding must not open or close it."""
    point = np.random.default_rng(0).normal(size=(1, 2048)).astype(np.float32)
    real = np.repeat(point, 4, axis=0)
    assert radii(torch.from_numpy(real)).tolist() == [0, 0, 0, 0]
    away = point + np.float32(1e-3)
    assert measured(real, np.concatenate([real, away]))[0] == 0.8


def test_sets_that_are_equal_and_sets_that_are_apart() -> None:
    values = np.random.default_rng(0).normal(size=(30, 8))
    assert measured(values, values) == (1, 1)
    assert measured(values, values + 100) == (0, 0)


def test_one_mode_of_many_is_precise_and_recalls_little() -> None:
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(50, 2)), rng.normal(size=(150, 2)) + 100])
    precision, recall = measured(real, 0.5 * rng.normal(size=(200, 2)))
    assert precision > 0.9
    assert recall <= 0.25


def test_what_cannot_be_measured_is_told() -> None:
    values = np.zeros((3, 2))
    with pytest.raises(ConfigError, match="the 3-nearest neighbours of 3 images: at least 4 are needed"):
        measured(values, values)
    with pytest.raises(ConfigError, match="features of one kind, got 2 and 3 of them"):
        measured(values, np.zeros((9, 3)))
