"""From an image to the square the tokenizer sees: VAR's augmentation.

- The shorter side goes to ``crop_margin`` × the resolution (1.125 in VAR) by Lanczos, whether that
  shrinks or enlarges; then a square is cut out: at random for training, from the centre for
  validation. A flip, if asked for, has probability 1/2; the published code does not flip.
- A crop is a pure function of (data.seed, image, view), so views can be cached and made again.
- No torch; arrays are uint8 (H, W, 3).
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaling.config import DataConfig
from scaling.data.images import ImageSource, Split, UnreadableImageError
from scaling.data.sampler import Int64, uniforms

UInt8 = NDArray[np.uint8]


def resize_shorter(image: Image.Image, side: int) -> Image.Image:
    """The image with its shorter side ``side`` pixels long, by Lanczos; the longer side is rounded down."""
    width, height = image.size
    short = min(width, height)
    size = (side * width // short, side * height // short)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def square(resized: Image.Image, data: DataConfig, key: tuple[int, ...] | None) -> UInt8:
    """One crop of an image that ``resize_shorter`` has made, uint8 (res, res, 3).

    Args:
        resized: an RGB image, both sides at least the resolution.
        data: gives resolution, flip and seed.
        key: which random crop (image, view); None for the centre crop, which is never flipped.
    """
    side = data.resolution
    spare_x, spare_y = resized.width - side, resized.height - side
    if key is None:
        left, top, flip = round(spare_x / 2), round(spare_y / 2), False
    else:
        u, v, w = uniforms(3, "crop", data.seed, *key)
        left, top = int(u * (spare_x + 1)), int(v * (spare_y + 1))
        flip = data.flip and w < 0.5
    pixels = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.uint8)
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def view_array(image: Image.Image, data: DataConfig, key: tuple[int, ...] | None) -> UInt8:
    """The augmented image, uint8 (res, res, 3); ``key`` as in ``square``."""
    return square(resize_shorter(image, round(data.crop_margin * data.resolution)), data, key)


def view_arrays(image: Image.Image, data: DataConfig, split: Split, index: int) -> UInt8:
    """All cached views of an image, uint8 (views, res, res, 3): the centre crop alone for validation."""
    resized = resize_shorter(image, round(data.crop_margin * data.resolution))
    if split == "val":
        return square(resized, data, None)[None]
    return np.stack([square(resized, data, (index, view)) for view in range(data.views)])


def image_batch(
    source: ImageSource,
    data: DataConfig,
    split: Split,
    indices: Int64,
    views: Int64 | int = 0,
    pool: Executor | None = None,
) -> UInt8:
    """A batch for stage 1: random crops for training, centre crops for validation.

    An unreadable image is named in the log, counted, and the next readable one takes its place.

    Args:
        source: the images.
        data: resolution, margin, flip, seed.
        split: "train" or "val".
        indices: (B,) images.
        views: (B,) or one number: which random crop of each; any number is allowed.
        pool: threads to read in; without it one image after another.

    Returns:
        uint8 (B, res, res, 3).

    Raises:
        ConfigError: more than 1 % of the split turned out to be unreadable.
    """

    def one(index: int, view: int) -> UInt8:
        total = source.count(split)
        for candidate in range(index, index + total):
            image_index = candidate % total
            try:
                image = source.image(split, image_index)
            except UnreadableImageError as error:
                source.skipped.add(split, image_index, error, total)
                continue
            return view_array(image, data, (image_index, view) if split == "train" else None)
        raise AssertionError("unreachable: a wholly unreadable split passes the 1 % limit")

    pairs = zip(indices.tolist(), np.broadcast_to(views, indices.shape).tolist(), strict=True)
    if pool is None:
        return np.stack([one(index, view) for index, view in pairs])
    return np.stack(list(pool.map(lambda pair: one(*pair), pairs)))
