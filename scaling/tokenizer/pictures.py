"""The picture a tokenizer leaves of itself: reconstructions under their originals, and coarse to fine.

Pixels are never smoothed, and enlarged by whole factors but for smaller reconstructions: what is seen is
what the tokenizer makes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

UInt8 = NDArray[np.uint8]

TILE = 96
"""Tiles have at least so many pixels on a side."""
GAP, LABEL_HEIGHT, MARGIN = 4, 18, 12
INK, PAPER = (30, 30, 30), (255, 255, 255)


def grid(rows: Sequence[tuple[str, Sequence[UInt8]]], title: str) -> Image.Image:
    """Labelled rows of images under a title.

    Args:
        rows: each a label and its images, uint8 (H, W, 3), all square; the first one's side sets the tiles'.
        title: one line over all.
    """
    high, wide = rows[0][1][0].shape[:2]
    factor = max(1, -(-TILE // min(high, wide)))
    high, wide = high * factor, wide * factor
    columns = max(len(images) for _, images in rows)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_width = max([draw.textlength(title), *(draw.textlength(label) for label, _ in rows)])
    width = 2 * MARGIN + max(columns * (wide + GAP) - GAP, int(text_width) + 1)
    row_height = LABEL_HEIGHT + high + GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + LABEL_HEIGHT + len(rows) * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill=INK)
    for r, (label, images) in enumerate(rows):
        top = MARGIN + LABEL_HEIGHT + r * row_height
        draw.text((MARGIN, top + 3), label, fill=INK)
        for c, pixels in enumerate(images):
            picture = Image.fromarray(pixels).resize((wide, high), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + c * (wide + GAP), top + LABEL_HEIGHT))
    return sheet


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
    return grid(rows, title)
