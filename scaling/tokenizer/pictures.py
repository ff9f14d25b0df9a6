"""The picture a tokenizer leaves of itself: reconstructions under their originals, and coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from scaling.pictures import UInt8, labelled_rows


def reconstruction_sheet(
    originals: UInt8,
    reconstructions: UInt8,
    stages: Sequence[UInt8],
    scales: Sequence[int],
    title: str,
    alone: bool,
) -> Image.Image:
    """Originals over reconstructions, then some images as each further scale is added, or each alone.

    Args:
        originals: (N, H, W, 3).
        reconstructions: (N, H, W, 3), from all scales.
        stages: K of (M, h, w, 3): the first M images from their first 1 … K scales, or from each.
        scales: side lengths of the token maps.
        title: one line over all.
        alone: each stage is made of its own scale only.
    """
    rows: list[tuple[str, Sequence[UInt8]]] = [
        ("originals (validation)", list(originals)),
        ("reconstructions", list(reconstructions)),
    ]
    # A plain x: Pillow's own font has no multiplication sign.
    names = ", ".join(f"{s}x{s}" for s in scales)
    rows += [
        (
            f"image {i + 1} from {'the tokens of' if alone else 'scales up to'} {names}; original",
            [*(stage[i] for stage in stages), originals[i]],
        )
        for i in range(len(stages[0]))
    ]
    return labelled_rows(rows, title)
