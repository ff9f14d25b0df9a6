"""What an image source is, and what every source needs: reading one image, and counting the unreadable.

- A source knows how many images a split has, their classes, and how to read the i-th one as RGB; it
  knows nothing of crops or tokens.
- An unreadable image is an error with the file's name. Who reads decides to skip it, through
  ``Skipped``, which names it, counts it and stops at 1 %.
"""

from __future__ import annotations

import io
import logging
import struct
import threading
import zlib
from pathlib import Path
from typing import Literal, Protocol, get_args

from PIL import Image

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


class SourceView:
    """An ``ImageSource`` that passes everything on to another; a subclass changes what it must."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.skipped = source.skipped

    @property
    def num_classes(self) -> int:
        """As the source."""
        return self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """As the source."""
        return self.source.class_names

    def count(self, split: Split) -> int:
        """As the source."""
        return self.source.count(split)

    def label(self, split: Split, i: int) -> int:
        """As the source."""
        return self.source.label(split, i)

    def image(self, split: Split, i: int) -> Image.Image:
        """As the source."""
        return self.source.image(split, i)

    def fingerprint(self) -> str:
        """As the source."""
        return self.source.fingerprint()


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
