"""The image source that a config describes, and the choice of the images that a study uses.

- Fewer images than there are mean the first of a seeded shuffle, kept in the source's order: a
  smaller set is part of every larger one, and reading stays sequential.
- ``resolve`` decodes nothing and imports no torch: it lists files or reads a parquet footer, and when
  the recipe gives all the counts it does not touch the disk, so a plan can be made anywhere. The photographs
  are always at hand, so what is asked of them is always checked.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from scaling.config import DataConfig
from scaling.data.images import ImageSource, SourceView, Split
from scaling.data.sampler import permutation
from scaling.schema import ConfigError


class Chosen(SourceView):
    """The images of ``source`` that a study uses: the first of a seeded shuffle, in the source's order.

    The fingerprint is of the whole source; the choice follows from the config.
    """

    def __init__(self, source: ImageSource, data: DataConfig) -> None:
        super().__init__(source)
        self._indices = {
            split: np.sort(permutation(data.seed, number, source.count(split))[:wanted])
            for number, (split, wanted) in enumerate(wanted_counts(data).items())
        }

    def count(self, split: Split) -> int:
        """How many are used."""
        return len(self._indices[split])

    def label(self, split: Split, i: int) -> int:
        """The class of the i-th used image."""
        return self.source.label(split, int(self._indices[split][i]))

    def image(self, split: Split, i: int) -> Image.Image:
        """The i-th used image."""
        return self.source.image(split, int(self._indices[split][i]))


def wanted_counts(data: DataConfig) -> dict[Split, int | None]:
    """The counts that the config asks for; None means all."""
    return {"train": data.train_images, "val": data.val_images}


def resolve(data: DataConfig) -> DataConfig:
    """``data`` with ``train_images``, ``val_images`` and ``num_classes`` filled in, without decoding.

    Raises:
        ConfigError: the data is missing or empty, or has fewer images or other classes than asked for.
    """
    counted = None not in (data.train_images, data.val_images, data.num_classes)
    if counted and data.source != "photos":
        return data
    source = _open_whole(data)
    _check(source, data)
    return dataclasses.replace(
        data,
        train_images=data.train_images or source.count("train"),
        val_images=data.val_images or source.count("val"),
        num_classes=source.num_classes,
    )


def open_source(data: DataConfig) -> ImageSource:
    """The images that ``data`` describes; counts that are None mean all there are.

    Raises:
        ConfigError: as ``resolve``.
    """
    source = _open_whole(data)
    _check(source, data)
    if all(wanted in (None, source.count(split)) for split, wanted in wanted_counts(data).items()):
        return source
    return Chosen(source, data)


def _open_whole(data: DataConfig) -> ImageSource:
    # A source's libraries are imported when it is used: pyarrow alone takes longer than a plan should.
    if data.source == "photos":
        from scaling.data.photos import Photos

        return Photos(data)
    if data.source == "folder":
        from scaling.data.folder import ImageFolder

        assert data.path is not None
        return ImageFolder(data.path)
    if data.source == "parquet":
        from scaling.data.parquet import ParquetImages

        assert data.path is not None
        return ParquetImages(data.path)
    from scaling.data.hub import HubImages

    assert data.name is not None
    return HubImages(data.name)


def _check(source: ImageSource, data: DataConfig) -> None:
    place = data.path or data.name or data.source
    for split, wanted in wanted_counts(data).items():
        there = source.count(split)
        if wanted is not None and wanted > there:
            raise ConfigError(f"data.{split}_images asks for {wanted} images, {place} has {there}")
    if data.num_classes is not None and data.num_classes != source.num_classes:
        raise ConfigError(f"data.num_classes is {data.num_classes}, {place} has {source.num_classes} classes")
