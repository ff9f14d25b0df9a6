"""From images to what the metrics need of them: one pass, in batches, shared by processes.

- Images are asked for by index, whatever they are: samples of a model, a data set, an array. Process r of W
  takes every W-th from r on, and what they found is merged: Gaussian moments, sums of the inception
  score, and the features of some images, put back in order. Nothing grows with the number of images.
- Some images are a fixed random choice, never the first ones: an image folder is sorted by class.
- Extractors see 8-bit pixels, as the toolkits do, which read image files: generated images are rounded first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaling.config import ConfigError, require
from scaling.data.sampler import Int64, permutation
from scaling.fidelity.features import NamedExtractor
from scaling.fidelity.statistics import InceptionScore, Moments

Images = Callable[[Sequence[int]], Tensor]
"""Images (B, 3, H, W) by index: uint8, or float in [−1, 1]. An image depends on its index alone."""
KEPT = 10_000
"""Images whose features are kept for precision and recall; 80 MB of Inception's."""
BATCH = 32
FOLDED = 1024
"""Rows of features that are taken into the moments at once: each time costs D² besides."""


@dataclass(frozen=True)
class Share:
    """This process among those that share the images."""

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Every process's value, in the order of ranks, on every process."""


ALONE = Share()


@dataclass(frozen=True)
class Collected:
    """What was found of ``count`` images, by all processes together."""

    moments: Moments
    features_ND: Tensor
    """float32, on the CPU, of ``chosen`` images in the order of their indices."""
    score: InceptionScore | None
    """None where the extractor gives no probabilities."""


def collect(
    images: Images,
    count: int,
    extractor: NamedExtractor,
    *,
    batch: int = BATCH,
    keep: int = KEPT,
    share: Share = ALONE,
    progress: Callable[[int], None] = lambda _: None,
) -> Collected:
    """Look at the images 0 to ``count`` − 1. Every process calls it and gets the same result.

    Args:
        images: gives them by index.
        count: of all processes together, at least one for each.
        extractor: what looks at them.
        batch: images at once; changes rounding only.
        keep: of so many, as ``chosen``, the features are returned too.
        share: this process's part.
        progress: called with the images that this process has done.

    Raises:
        ConfigError: too few images, images or features that are not finite numbers, an inception score
            of fewer images than splits.
    """
    require(count >= share.world, f"{share.world} processes need at least as many images, got {count}")
    mine = range(share.rank, count, share.world)
    moments: Moments | None = None
    score: InceptionScore | None = None
    wanted = chosen(count, keep)
    kept: list[np.ndarray] = []
    pending: list[np.ndarray] = []
    for begin in range(0, len(mine), batch):
        indices = mine[begin : begin + batch]
        features_BD, probabilities_BV = extractor.describe(as_uint8(images(indices)))
        values_BD = features_BD.float().cpu().numpy()
        if moments is None:
            moments = Moments(values_BD.shape[1])
            if probabilities_BV is not None:
                score = InceptionScore(count, probabilities_BV.shape[1])
        pending.append(values_BD)
        if sum(map(len, pending)) >= FOLDED or begin + batch >= len(mine):
            moments.add(np.concatenate(pending))
            pending = []
        if score is not None and probabilities_BV is not None:
            score.add(np.array(indices), probabilities_BV.double().cpu().numpy())
        kept.append(values_BD[np.isin(indices, wanted)])
        progress(begin + len(indices))
    assert moments is not None
    parts: list[Part] = share.gather((moments, np.concatenate(kept), score))
    return _merge(parts, count, wanted)


def chosen(count: int, keep: int) -> Int64:
    """At most ``keep`` of ``count`` indices, a fixed random choice in ascending order."""
    return np.sort(permutation(0, 0, count)[:keep])


Part = tuple[Moments, np.ndarray, InceptionScore | None]
"""What one process found: its moments, the features to keep, its sums of the inception score."""


def _merge(parts: list[Part], count: int, wanted: Int64) -> Collected:
    features = np.empty((len(wanted), parts[0][1].shape[1]), dtype=np.float32)
    moments = Moments(features.shape[1])
    scores = [score for *_, score in parts if score is not None]
    merged = InceptionScore(count, scores[0].sums_SV.shape[1]) if scores else None
    for rank, (part, values, score) in enumerate(parts):
        moments.merge(part)
        features[wanted % len(parts) == rank] = values
        if merged is not None and score is not None:
            merged.merge(score)
    return Collected(moments, torch.from_numpy(features), merged)


def as_uint8(images_B3HW: Tensor) -> Tensor:
    """8-bit pixels; floats in [−1, 1] are clamped and rounded.

    Raises:
        ConfigError: not images of three channels, or some pixels are not finite numbers.
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
        raise ConfigError(f"images must be of shape (B, 3, H, W), got {tuple(images_B3HW.shape)}")
    if images_B3HW.dtype == torch.uint8:
        return images_B3HW
    require(bool(images_B3HW.isfinite().all()), "some pixels of the images are not finite numbers")
    return ((images_B3HW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
