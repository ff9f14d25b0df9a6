"""Image tensors to PNGs, with pillow: single pictures, grids, and labelled tables of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

UInt8 = NDArray[np.uint8]
SMALLEST = 64
"""Images below this side are enlarged by a whole factor, so that a grid can be looked at."""
TILE = 96
"""Pictures of labelled rows have at least so many pixels on a side."""
MARGIN, GAP, LINE = 12, 6, 16
"""Of tables and labelled rows, in pixels."""


def uint8(images_B3HW: Tensor) -> UInt8:
    """Images in [−1, 1], on any device, as (B, H, W, 3)."""
    pixels: UInt8 = ((images_B3HW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def image_grid(images_B3HW: Tensor, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Tile images in [−1, 1] row by row on white; ``columns`` defaults to a near-square grid."""
    return pixel_grid(uint8(images_B3HW), columns, gap)


def pixel_grid(pixels: UInt8, columns: int | None = None, gap: int = 2) -> Image.Image:
    """As ``image_grid``, of uint8 (B, H, W, 3)."""
    count, height, width, _ = pixels.shape
    factor = max(1, math.ceil(SMALLEST / max(height, width)))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def save_png(picture: Image.Image, target: Path) -> None:
    """Write a PNG so that a kill leaves the whole file or none."""
    aside = target.with_name(f".{target.name}.tmp")
    picture.save(aside, format="png")
    aside.replace(target)


def table(
    cells: Sequence[Sequence[Image.Image | None]], rows: Sequence[str], columns: Sequence[str], title: str
) -> Image.Image:
    """Pictures in rows and columns with their names, on white.

    Args:
        cells: row by row; None where there is no picture.
    """
    pictures = [cell for row in cells for cell in row if cell is not None]
    width, height = max(cell.width for cell in pictures), max(cell.height for cell in pictures)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = MARGIN + int(max(draw.textlength(name) for name in rows)) + GAP
    top = MARGIN + 2 * LINE
    right = left + len(columns) * (width + GAP)
    size = (
        max(right, MARGIN + int(draw.textlength(title))) + MARGIN,
        top + len(rows) * (height + GAP) + MARGIN,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill="black")
    for c, name in enumerate(columns):
        draw.text((left + c * (width + GAP), MARGIN + LINE), name, fill="black")
    for r, (name, row) in enumerate(zip(rows, cells, strict=True)):
        draw.text((MARGIN, top + r * (height + GAP)), name, fill="black")
        for c, cell in enumerate(row):
            if cell is not None:
                sheet.paste(cell, (left + c * (width + GAP), top + r * (height + GAP)))
    return sheet


def labelled_rows(rows: Sequence[tuple[str, Sequence[UInt8]]], title: str) -> Image.Image:
    """Rows of pictures of one size, each under its label.

    Pixels are never smoothed, and enlarged by whole factors but for smaller pictures: what is seen is what
    was made.

    Args:
        rows: each a label and its pictures, uint8 (H, W, 3); the first one's size sets all.
        title: one line over all.
    """
    high, wide = rows[0][1][0].shape[:2]
    factor = max(1, -(-TILE // min(high, wide)))
    high, wide = high * factor, wide * factor
    columns = max(len(images) for _, images in rows)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_width = max([draw.textlength(title), *(draw.textlength(label) for label, _ in rows)])
    width = 2 * MARGIN + max(columns * (wide + GAP) - GAP, int(text_width) + 1)
    row_height = LINE + high + GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + LINE + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill="black")
    for r, (label, images) in enumerate(rows):
        top = MARGIN + LINE + r * row_height
        draw.text((MARGIN, top + 3), label, fill="black")
        for c, pixels in enumerate(images):
            picture = Image.fromarray(pixels).resize((wide, high), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + c * (wide + GAP), top + LINE))
    return sheet
