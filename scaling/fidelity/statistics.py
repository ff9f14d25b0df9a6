"""Statistics of many images in little memory: Gaussian moments, the Fréchet distance, the inception score.

Design choices
- Everything is float64 and added up about the mean, never as a mean of squares minus a squared mean.
  Counts, means and scatters merge exactly (Chan, Golub and LeVeque 1979), so 50 000 images need the memory
  of one batch, and processes that shared them merge theirs: the split changes rounding only.
- The trace of the matrix root in FID is a sum of singular values of one factor times the other. The
  usual root of a product of two covariances turns rounding of ε into errors of √ε, and into complex
  numbers, when a covariance is singular: with fewer images than features it always is. Here that
  case needs no ε on the diagonal; what it costs is bias: FID of few images is too high, so the count
  of images belongs to every FID.
- The inception score splits images by index, so processes and batches do not matter.

Shapes: B images of a batch, D features, S splits, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import svdvals
from scipy.special import xlogy

from scaling.config import ConfigError, require

Floats = NDArray[np.float64]
SPLITS = 10
"""Parts of the images over which the inception score is averaged, as in Salimans et al. (2016)."""


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution fitted to features; the covariance is the unbiased one, over n − 1."""

    mean_D: Floats
    covariance_DD: Floats


class Moments:
    """Count, mean and scatter Σ (x − mean)(x − mean)ᵀ of all features seen.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean_D: Floats = np.zeros(dim)
        self.scatter_DD: Floats = np.zeros((dim, dim))

    def add(self, features_BD: NDArray[np.floating]) -> None:
        """Take a batch in."""
        if len(features_BD) == 0:
            return
        values_BD = features_BD.astype(np.float64)
        mean_D = values_BD.mean(axis=0)
        self._take(len(values_BD), mean_D, values_BD - mean_D)

    def merge(self, other: Moments) -> None:
        """Take in all that ``other`` has seen."""
        if other.count > 0:
            self.scatter_DD += other.scatter_DD
            self._take(other.count, other.mean_D, np.zeros((0, len(self.mean_D))))

    def _take(self, count: int, mean_D: Floats, centred_BD: Floats) -> None:
        total = self.count + count
        shift_D = mean_D - self.mean_D
        # The distance of the two means is one more row of the scatter.
        rows = np.vstack([centred_BD, np.sqrt(self.count * count / total) * shift_D])
        self.scatter_DD += rows.T @ rows
        self.mean_D = self.mean_D + shift_D * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The fitted distribution.

        Raises:
            ConfigError: fewer than two images have no covariance.
        """
        require(self.count >= 2, f"a covariance needs at least 2 images, got {self.count}")
        return Gaussian(self.mean_D, self.scatter_DD / (self.count - 1))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """FID (Heusel et al. 2017): ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½).

    With Σ₁ = AAᵀ and Σ₂ = BBᵀ, tr (Σ₁Σ₂)^½ is the sum of the singular values of AᵀB. Symmetric, and never
    below 0. Singular covariances have no directions in the factors and need nothing else.

    Raises:
        ConfigError: another number of features.
    """
    if one.mean_D.shape != other.mean_D.shape:
        raise ConfigError(
            f"FID compares features of one kind, got {len(one.mean_D)} and {len(other.mean_D)} of them; "
            "use a reference made with the same extractor"
        )
    A, B = _factor(one.covariance_DD), _factor(other.covariance_DD)
    shift_D = one.mean_D - other.mean_D
    spread = np.trace(one.covariance_DD) + np.trace(other.covariance_DD)
    common = float(svdvals(A.T @ B).sum()) if min(A.shape[1], B.shape[1]) else 0.0
    return max(0.0, float(shift_D @ shift_D + spread) - 2 * common)


def _factor(covariance_DD: Floats) -> Floats:
    """F (D, rank) with F Fᵀ the covariance.

    Eigenvalues below D·ε of the largest are rounding of zero; their roots would be a million times ε.
    """
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    kept = values_D > len(values_D) * np.finfo(np.float64).eps * max(values_D[-1], 0.0)
    factor: Floats = vectors_DD[:, kept] * np.sqrt(values_D[kept])
    return factor


class InceptionScore:
    """exp E[KL(p(y|x) ‖ p(y))] (Salimans et al. 2016), over S splits: mean and standard deviation.

    A split's score needs only its count, Σ p and Σ p log p. Split s has the images from s·n/S to
    (s + 1)·n/S, both rounded down, and the deviation is over S, not S − 1, as in the published code. Classes
    must be mixed over the images: a split with few of them has a low score.

    Args:
        images: n, of all processes together.
        classes: V.
        splits: S.

    Raises:
        ConfigError: fewer images than splits.
    """

    def __init__(self, images: int, classes: int, splits: int = SPLITS) -> None:
        require(
            images >= splits, f"the inception score of {splits} splits needs as many images, got {images}"
        )
        self._ends_S = np.arange(1, splits + 1) * images // splits
        self.counts_S = np.zeros(splits, dtype=np.int64)
        self.sums_SV: Floats = np.zeros((splits, classes))
        self.plogp_S: Floats = np.zeros(splits)

    def add(self, indices_B: NDArray[np.int64], probabilities_BV: NDArray[np.floating]) -> None:
        """Take in the classes' probabilities of the images ``indices_B``."""
        p_BV = probabilities_BV.astype(np.float64)
        split_B = np.searchsorted(self._ends_S, indices_B, side="right")
        np.add.at(self.counts_S, split_B, 1)
        np.add.at(self.sums_SV, split_B, p_BV)
        np.add.at(self.plogp_S, split_B, xlogy(p_BV, p_BV).sum(axis=1))

    def merge(self, other: InceptionScore) -> None:
        """Take in all that ``other`` has seen."""
        self.counts_S += other.counts_S
        self.sums_SV += other.sums_SV
        self.plogp_S += other.plogp_S

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits, once every image was seen."""
        assert np.array_equal(self.counts_S, np.diff(self._ends_S, prepend=0)), "not every image once"
        mean_SV = self.sums_SV / self.counts_S[:, None]
        scores_S = np.exp(self.plogp_S / self.counts_S - xlogy(mean_SV, mean_SV).sum(axis=1))
        return float(scores_S.mean()), float(scores_S.std())
