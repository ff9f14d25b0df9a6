"""Images of noise, where those of a recipe are not at hand."""

from __future__ import annotations

import numpy as np
from PIL import Image

from scaling.config import ConfigError, DataConfig
from scaling.data.images import ImageSource, Skipped, Split
from scaling.data.sources import open_source


class NoiseImages:
    """Images of noise in place of those that are not at hand, at the size that crops are cut from."""

    def __init__(self, data: DataConfig) -> None:
        self.skipped, self.num_classes = Skipped(), data.num_classes or 1
        self.class_names = tuple(map(str, range(self.num_classes)))
        self._counts = {"train": data.train_images or 1, "val": data.val_images or 1}
        side = round(data.resolution * data.crop_margin)
        self._pixels = np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)

    def count(self, split: Split) -> int:
        """As the config says."""
        return self._counts[split]

    def label(self, split: Split, i: int) -> int:
        """Any."""
        return i % self.num_classes

    def image(self, split: Split, i: int) -> Image.Image:
        """The same picture."""
        return Image.fromarray(self._pixels)

    def fingerprint(self) -> str:
        """Of no data."""
        return "noise"


def images_or_noise(data: DataConfig) -> ImageSource:
    """The images that ``data`` describes, where they are."""
    try:
        return open_source(data)
    except ConfigError:
        return NoiseImages(data)
