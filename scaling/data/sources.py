"""Images behind one small interface, and the choice of the images that a study uses.

- A source knows how many images a split has, their classes, and how to read the i-th one as RGB; it
  knows nothing of crops or tokens. The four are photos, folder, parquet and hf, a file each.
- Fewer images than there are means the first of a seeded shuffle, kept in the source's order: a
  smaller set is part of every larger one, and reading stays sequential.
- An unreadable image is an error with the file's name. Who reads decides to skip it, through
  ``Skipped``, which names it, counts it and stops at 1 %.
- ``resolve`` decodes nothing and imports no torch: it lists files or reads a parquet footer, and when
  the recipe gives all the counts it does not touch the disk, so a plan can be made anywhere.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import struct
import threading
import zlib
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
from PIL import Image

from scaling.config import DataConfig
from scaling.data.sampler import permutation
from scaling.records import RecordsError
from scaling.schema import ConfigError

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
UNREADABLE_LIMIT = 0.01
NAMED = 20
"""At most so many unreadable files are named in one message."""

log = logging.getLogger(__name__)


class UnreadableImageError(RecordsError):
    """One image that cannot be read; the message names the file (or the row) and the reason."""


class Skipped:
    """The unreadable images met so far; stops the work when they are more than 1 % of a split."""

    def __init__(self) -> None:
        self._found: dict[Split, dict[int, str]] = {split: {} for split in SPLITS}
        self._guard = threading.Lock()

    def add(self, split: Split, index: int, error: UnreadableImageError, total: int) -> None:
        """Name and count one; ``ConfigError`` with the list when ``total`` has more than 1 % of them."""
        with self._guard:
            found = self._found[split]
            if index not in found:
                log.warning("unreadable image skipped: %s", error)
                found[index] = str(error)
        check_unreadable(split, list(found.values()), total)


def check_unreadable(split: Split, messages: list[str], total: int) -> None:
    """``ConfigError`` with the list when more than 1 % of ``total`` images are unreadable."""
    if len(messages) > UNREADABLE_LIMIT * total:
        more = f"; and {len(messages) - NAMED} more" if len(messages) > NAMED else ""
        raise ConfigError(
            f"more than 1 % of the {total} {split} images are unreadable "
            f"({len(messages)} found): {'; '.join(messages[:NAMED])}{more}"
        )


class ImageSource(Protocol):
    """A labelled image set with the splits "train" and "val"."""

    skipped: Skipped
    """Unreadable images met while reading through ``image_batch``."""

    @property
    def num_classes(self) -> int:
        """How many classes labels may name."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class, in the order of the labels."""
        ...

    def count(self, split: Split) -> int:
        """How many images the split has."""
        ...

    def label(self, split: Split, i: int) -> int:
        """The class of image ``i``, 0 to num_classes − 1."""
        ...

    def image(self, split: Split, i: int) -> Image.Image:
        """Image ``i`` in RGB, at its own size. Safe to call from several threads.

        Raises:
            UnreadableImageError: naming the file.
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what tells this data from other data, wherever it lies."""
        ...


def decode(content: bytes | Path, name: str) -> Image.Image:
    """An image file as RGB.

    Args:
        content: the file, or its bytes.
        name: how to call it in the error.

    Raises:
        UnreadableImageError: missing, cut short, or not an image that Pillow knows.
    """
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return image.convert("RGB")
    # What Pillow's decoders raise on broken files; SyntaxError is its word for a broken header.
    except (OSError, SyntaxError, ValueError, IndexError, EOFError, struct.error, zlib.error) as error:
        raise UnreadableImageError(f"{name}: {' '.join(str(error).split())}") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{name}: {error}") from error


class Chosen:
    """The images of ``source`` that a study uses: the first of a seeded shuffle, in the source's order."""

    def __init__(self, source: ImageSource, data: DataConfig) -> None:
        self.source = source
        self.skipped = source.skipped
        self._indices = {
            split: np.sort(permutation(data.seed, number, source.count(split))[:wanted])
            for number, (split, wanted) in enumerate(wanted_counts(data).items())
        }

    @property
    def num_classes(self) -> int:
        """As the source."""
        return self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """As the source."""
        return self.source.class_names

    def count(self, split: Split) -> int:
        """How many are used."""
        return len(self._indices[split])

    def label(self, split: Split, i: int) -> int:
        """The class of the i-th used image."""
        return self.source.label(split, int(self._indices[split][i]))

    def image(self, split: Split, i: int) -> Image.Image:
        """The i-th used image."""
        return self.source.image(split, int(self._indices[split][i]))

    def fingerprint(self) -> str:
        """Of the whole source; the choice follows from the config."""
        return self.source.fingerprint()


def wanted_counts(data: DataConfig) -> dict[Split, int | None]:
    """The counts that the config asks for; None means all."""
    return {"train": data.train_images, "val": data.val_images}


def resolve(data: DataConfig) -> DataConfig:
    """``data`` with ``train_images``, ``val_images`` and ``num_classes`` filled in, without decoding.

    Raises:
        ConfigError: the data is missing or empty, or has fewer images or other classes than asked for.
    """
    if None not in (data.train_images, data.val_images, data.num_classes):
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
