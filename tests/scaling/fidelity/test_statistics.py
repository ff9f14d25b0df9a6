"""FID and the inception score against independent formulas; streamed and merged as in one piece."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from scaling.fidelity.statistics import Gaussian, InceptionScore, Moments, frechet_distance
from scaling.schema import ConfigError

Floats = NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)


def features(rng: np.random.Generator, count: int, dim: int) -> Floats:
    """Correlated and far from the origin, as pool features are."""
    return 10 + rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim))


def moments(*parts: NDArray[np.floating]) -> Moments:
    found = Moments(parts[0].shape[1])
    for part in parts:
        found.add(part)
    return found


def assert_same(one: Moments, other: Moments) -> None:
    assert one.count == other.count
    np.testing.assert_allclose(one.mean_D, other.mean_D, rtol=1e-12)
    scale = np.abs(other.scatter_DD).max()
    np.testing.assert_allclose(one.scatter_DD, other.scatter_DD, rtol=1e-12, atol=1e-12 * scale)


# -- moments ---------------------------------------------------------------------------------------


@given(SEEDS, st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_streamed_moments_are_those_of_one_piece(seed: int, sizes: list[int]) -> None:
    count = sum(sizes) + 2
    values = features(np.random.default_rng(seed), count, 4)
    streamed = moments(*np.split(values, np.cumsum(sizes)))
    assert_same(streamed, moments(values))
    fitted = streamed.gaussian()
    np.testing.assert_allclose(fitted.mean_D, values.mean(axis=0), rtol=1e-12)
    covariance = np.cov(values, rowvar=False)
    np.testing.assert_allclose(fitted.covariance_DD, covariance, atol=1e-11 * np.abs(covariance).max())


@given(SEEDS, st.integers(1, 5), st.integers(1, 7))
def test_processes_that_share_images_merge_into_one(seed: int, world: int, batch: int) -> None:
    values = features(np.random.default_rng(seed), 23, 3)
    merged = Moments(3)
    for rank in range(world):
        mine = values[rank::world]
        merged.merge(moments(*[mine[i : i + batch] for i in range(0, len(mine), batch)]))
    assert_same(merged, moments(values))


def test_a_process_without_images_changes_nothing() -> None:
    found = moments(features(np.random.default_rng(0), 5, 3))
    before = found.scatter_DD.copy()
    found.merge(Moments(3))
    assert found.count == 5
    assert np.array_equal(found.scatter_DD, before)


def test_moments_far_from_the_origin_keep_their_digits() -> None:
    """A mean of squares minus a squared mean would have nothing left of a variance of 1 at 1e9."""
    values = 1e9 + np.random.default_rng(0).normal(size=(4000, 2))
    found = moments(*np.split(values, 40)).gaussian()
    np.testing.assert_allclose(found.covariance_DD, np.cov(values, rowvar=False), atol=1e-6)


def test_half_precision_features_are_added_up_in_double() -> None:
    values = np.full((5000, 1), 1000.5, dtype=np.float16)
    assert moments(*np.split(values, 50)).gaussian().mean_D == pytest.approx([1000.5], abs=1e-9)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ConfigError, match="a covariance needs at least 2 images, got 1"):
        moments(np.ones((1, 3))).gaussian()


# -- FID -------------------------------------------------------------------------------------------


def gaussian(rng: np.random.Generator, dim: int, rank: int | None = None) -> Gaussian:
    root = rng.normal(size=(dim, rank or 2 * dim))
    return Gaussian(rng.normal(size=dim), root @ root.T / dim)


@given(SEEDS, st.integers(1, 12))
def test_fid_is_the_formula_with_a_matrix_root(seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = gaussian(rng, dim), gaussian(rng, dim)
    root = sqrtm(one.covariance_DD @ other.covariance_DD).real
    shift = one.mean_D - other.mean_D
    expected = shift @ shift + np.trace(one.covariance_DD + other.covariance_DD - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-8, abs=1e-8)


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_fid_is_symmetric_and_zero_for_equals_at_any_rank(seed: int, dim: int, a: int, b: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = gaussian(rng, dim, a), gaussian(rng, dim, b)
    there = frechet_distance(one, other)
    assert there == pytest.approx(frechet_distance(other, one), rel=1e-9)
    scale = np.trace(one.covariance_DD)
    assert frechet_distance(one, one) <= 1e-12 * scale
    assert there >= np.sum((one.mean_D - other.mean_D) ** 2) - 1e-12 * scale


@given(SEEDS, st.integers(1, 10))
def test_fid_of_commuting_covariances_in_closed_form(seed: int, dim: int) -> None:
    """Equal eigenvectors: Σ (√λ − √κ)², whether or not some eigenvalues are 0."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    first, second = (rng.uniform(0, 4, dim) * rng.integers(0, 2, dim) for _ in range(2))
    one, other = (Gaussian(rng.normal(size=dim), (basis * values) @ basis.T) for values in (first, second))
    shift = one.mean_D - other.mean_D
    expected = shift @ shift + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-10, abs=1e-10)


@given(st.floats(-9, 9), st.floats(-9, 9), st.floats(0, 9), st.floats(0, 9))
def test_fid_in_one_dimension(m: float, n: float, s: float, t: float) -> None:
    one, other = (Gaussian(np.array([a]), np.array([[b * b]])) for a, b in ((m, s), (n, t)))
    assert frechet_distance(one, other) == pytest.approx((m - n) ** 2 + (s - t) ** 2, rel=1e-9, abs=1e-9)


def test_fid_of_fewer_images_than_features_needs_no_ridge() -> None:
    """Rank 19 of 64: the trace of the root is the nuclear norm of the centred features' product."""
    rng = np.random.default_rng(0)
    one, other = (features(rng, 20, 64) for _ in range(2))
    first, second = ((x - x.mean(axis=0)) / np.sqrt(19) for x in (one, other))
    common = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    shift = one.mean(axis=0) - other.mean(axis=0)
    expected = shift @ shift + np.sum(first**2) + np.sum(second**2) - 2 * common
    found = frechet_distance(moments(one).gaussian(), moments(other).gaussian())
    assert found == pytest.approx(expected, rel=1e-10)


def test_fid_refuses_features_of_two_kinds() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match=r"features of one kind, got 3 and 4 of them"):
        frechet_distance(gaussian(rng, 3), gaussian(rng, 4))


# -- inception score -------------------------------------------------------------------------------


def scored(probabilities: Floats, splits: int, pieces: list[NDArray[np.int64]]) -> tuple[float, float]:
    found = InceptionScore(len(probabilities), probabilities.shape[1], splits)
    for indices in pieces:
        part = InceptionScore(len(probabilities), probabilities.shape[1], splits)
        part.add(indices, probabilities[indices])
        found.merge(part)
    return found.result()


def direct(probabilities: Floats, splits: int) -> tuple[float, float]:
    """The definition: exp of the mean divergence of p(y|x) from p(y), part by part."""
    count, scores = len(probabilities), []
    for s in range(splits):
        part = probabilities[s * count // splits : (s + 1) * count // splits]
        divergence = (part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


@given(SEEDS, st.integers(10, 60), st.integers(1, 10), st.integers(1, 4), st.integers(1, 9))
def test_inception_score_is_its_definition_however_shared(
    seed: int, count: int, splits: int, world: int, batch: int
) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(6), size=count)
    pieces = []
    for rank in range(world):
        mine = np.arange(rank, count, world)
        pieces += [mine[i : i + batch] for i in range(0, len(mine), batch)]
    expected = direct(probabilities, splits)
    assert scored(probabilities, splits, pieces) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_inception_score_of_the_extremes(classes: int) -> None:
    count = 10 * classes
    every = [np.arange(count)]
    uniform = np.full((count, classes), 1 / classes)
    assert scored(uniform, 10, every) == pytest.approx((1, 0), abs=1e-12)
    balanced = np.eye(classes)[np.arange(count) % classes]
    assert scored(balanced, 10, every) == pytest.approx((classes, 0), abs=1e-12)
    one_class = np.eye(classes)[np.zeros(count, dtype=int)]
    assert scored(one_class, 10, every) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_refuses_fewer_images_than_splits() -> None:
    with pytest.raises(ConfigError, match="of 10 splits needs as many images, got 9"):
        InceptionScore(9, 5)
