"""Image tensors to one PNG grid, with pillow."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from torch import Tensor

SMALLEST = 64
"""Images below this side are enlarged by a whole factor, so that a grid can be looked at."""


def image_grid(images_B3HW: Tensor, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Tile images in [−1, 1] row by row on white; ``columns`` defaults to a near-square grid."""
    pixels = ((images_B3HW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
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
