"""FID, inception score, precision and recall of generated images against a reference.

    result = measure(sample, 50_000, reference, extractor)

FID depends on the number of images (few of them look worse than they are), so it is part of the result, as
are the extractor and the reference: two numbers compare when all three are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scaling.fidelity.collect import ALONE, BATCH, KEPT, Collected, Images, Share, collect
from scaling.fidelity.features import NamedExtractor
from scaling.fidelity.manifold import precision_recall
from scaling.fidelity.reference import Reference
from scaling.fidelity.statistics import frechet_distance


@dataclass(frozen=True)
class FidelityResult:
    """The numbers and what they are of; None for what extractor or reference do not allow."""

    fid: float
    is_mean: float | None
    is_std: float | None
    precision: float | None
    recall: float | None
    images: int
    manifold_images: int | None
    """How many generated images precision and recall are of."""
    extractor: str
    reference: str
    reference_images: int | None

    def record(self) -> dict[str, Any]:
        """Under the names of ``metrics.jsonl``."""
        values = dict(vars(self))
        return {"fid": values.pop("fid"), "is": values.pop("is_mean")} | values


def measure(
    images: Images,
    count: int,
    reference: Reference,
    extractor: NamedExtractor,
    *,
    batch: int = BATCH,
    keep: int = KEPT,
    share: Share = ALONE,
    progress: Callable[[int], None] = lambda _: None,
) -> FidelityResult:
    """Measure the images 0 to ``count`` − 1; every process calls it and gets the same result.

    Args:
        images: gives generated images by index (``scaling.fidelity.collect.Images``).
        count: of all processes together.
        reference: of the same extractor.
        extractor: what looks at them.
        batch: images at once.
        keep: precision and recall are of at most so many, on both sides.
        share: this process's part.
        progress: called with the images that this process has done.

    Raises:
        ConfigError: as ``collect``, and for a reference of other features.
    """
    found = collect(images, count, extractor, batch=batch, keep=keep, share=share, progress=progress)
    result = _compare(found, reference, extractor) if share.rank == 0 else None
    return share.gather(result)[0]


def _compare(found: Collected, reference: Reference, extractor: NamedExtractor) -> FidelityResult:
    fid = frechet_distance(found.moments.gaussian(), reference.gaussian)
    is_mean, is_std = (None, None) if found.score is None else found.score.result()
    precision = recall = None
    if reference.features_ND is not None:
        real_ND, generated_MD = (
            features.to(extractor.device) for features in (reference.features_ND, found.features_ND)
        )
        precision, recall = precision_recall(real_ND, generated_MD)
    return FidelityResult(
        fid=fid,
        is_mean=is_mean,
        is_std=is_std,
        precision=precision,
        recall=recall,
        images=found.moments.count,
        manifold_images=None if precision is None else len(found.features_ND),
        extractor=extractor.identity,
        reference=reference.identity,
        reference_images=reference.images,
    )
