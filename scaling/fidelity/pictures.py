"""The images that are measured, by index: a model's pictures, and the real ones of its data.

- Picture i has class i mod V and seed ``seed`` + i: classes are balanced and mixed, as inception scores need,
  and the pictures are the same however many processes share them.
- Real images are centre crops at the run's resolution, as the run itself is validated on.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from scaling.config import DataConfig, SamplingConfig, require
from scaling.data.images import ImageSource, SourceView, Split
from scaling.data.sources import Chosen, open_source
from scaling.data.transforms import image_batch
from scaling.fidelity.collect import Images, chosen
from scaling.generation import draw_images
from scaling.pretrained import Opened


@dataclass(frozen=True)
class RealImages:
    """Real images by index."""

    images: Images
    count: int
    name: str
    """What tells them from others."""


def sampler(opened: Opened, sampling: SamplingConfig) -> Images:
    """A model's pictures by index."""
    classes = opened.model.config.num_classes

    def draw(indices: Sequence[int]) -> Tensor:
        labels, seeds = [i % classes for i in indices], [sampling.seed + i for i in indices]
        return draw_images(opened.model, opened.tokenizer, labels, seeds, sampling)

    return draw


class _AsValidation(SourceView):
    """The training images as validation images, of which ``image_batch`` cuts the centre."""

    def count(self, split: Split) -> int:
        """Training images."""
        return self.source.count("train")

    def image(self, split: Split, i: int) -> Image.Image:
        """A training image."""
        return self.source.image("train", i)


def real_images(data: DataConfig, split: Split, wanted: int | None, threads: int) -> RealImages:
    """Centre crops of a split.

    Args:
        wanted: so many of the split, as ``chosen``; all when None.

    Raises:
        ConfigError: the data is not there, or has fewer images.
    """
    opened = open_source(data)
    source: ImageSource = _AsValidation(opened) if split == "train" else opened
    pool, there = ThreadPoolExecutor(threads), source.count("val")
    count = there if wanted is None else wanted
    require(count <= there, f"--reference-images asks for {count}, the {split} split has {there}")
    order = chosen(there, count)

    def batch(indices: Sequence[int]) -> Tensor:
        crops_BHW3 = image_batch(source, data, "val", order[list(indices)], pool=pool)
        return torch.from_numpy(crops_BHW3).permute(0, 3, 1, 2)

    # A study's own choice of images follows from the data's seed; how they are cut, from the rest.
    seed = f"-seed{data.seed}" if isinstance(opened, Chosen) else ""
    name = f"{split}-{opened.fingerprint()[:12]}-{data.resolution}px-margin{data.crop_margin:g}{seed}-{count}"
    return RealImages(batch, count, name)
