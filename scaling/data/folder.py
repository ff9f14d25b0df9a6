"""ImageNet's layout: ``train/<class>/*`` and ``val/<class>/*``.

- The classes are those of train and val together, in the order of their names (ImageNet's own order):
  neither split needs images of every class, and a class keeps its number when one of them lacks it.
- Files are known by their suffix; other files (lists, hidden files) are no images and are passed over.
- The fingerprint is of names and sizes, and of the first bytes of some files, since images without
  compression have equal sizes; it does not change when the folder is moved.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from scaling.data.images import SPLITS, Skipped, Split, decode
from scaling.schema import ConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PROBES, PROBE_BYTES = 32, 65536
"""Files per split whose first bytes the fingerprint holds, and how many."""


class ImageFolder:
    """A folder of class folders as an ``ImageSource``.

    Raises:
        ConfigError: no such folder, or a split without images.
    """

    def __init__(self, path: str) -> None:
        self.skipped = Skipped()
        self._root = Path(path)
        if not self._root.is_dir():
            raise ConfigError(
                f"data.path: {path} is not a folder (expected train/<class>/* and val/<class>/*)"
            )
        found = {split: self._list(split) for split in SPLITS}
        self._classes = tuple(sorted({name for classes in found.values() for name in classes}))
        number = {name: i for i, name in enumerate(self._classes)}
        self._files = {s: [file for files in found[s].values() for file in files] for s in SPLITS}
        self._labels = {
            s: np.repeat(
                np.array([number[name] for name in found[s]], dtype=np.int64),
                [len(files) for files in found[s].values()],
            )
            for s in SPLITS
        }

    def _list(self, split: Split) -> dict[str, list[str]]:
        """Class to sorted file names; classes without images are left out."""
        root = self._root / split
        if not root.is_dir():
            raise ConfigError(f"data.path: {root} is missing (expected {split}/<class>/* in {self._root})")
        with os.scandir(root) as entries:
            classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        found = {}
        for name in classes:
            with os.scandir(root / name) as entries:
                files = sorted(
                    e.name
                    for e in entries
                    if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".")
                )
            if files:
                found[name] = files
        if not found:
            raise ConfigError(
                f"data.path: {root} has no images "
                f"(expected {split}/<class>/*, files ending in {' '.join(SUFFIXES)})"
            )
        return found

    @property
    def num_classes(self) -> int:
        """Class folders of train and val together."""
        return len(self._classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The folders' names, sorted."""
        return self._classes

    def count(self, split: Split) -> int:
        """Image files in the split."""
        return len(self._files[split])

    def label(self, split: Split, i: int) -> int:
        """The number of the folder's class."""
        return int(self._labels[split][i])

    def image(self, split: Split, i: int) -> Image.Image:
        """The file in RGB."""
        file = self._file(split, i)
        return decode(file, str(file))

    def fingerprint(self) -> str:
        """Of the files' names, under the folder, and sizes, and of what some of them hold."""
        digest = hashlib.sha256()
        for split in SPLITS:
            count = self.count(split)
            opened = {count * k // PROBES for k in range(PROBES)}
            for i in range(count):
                file = self._file(split, i)
                start = b""
                try:
                    size = file.stat().st_size
                    if i in opened:
                        with file.open("rb") as stream:
                            start = stream.read(PROBE_BYTES)
                except OSError:
                    size = -1  # a broken link: counted as unreadable when it is read
                digest.update(f"{file.relative_to(self._root)}\0{size}\n".encode(errors="surrogateescape"))
                digest.update(start)
        return digest.hexdigest()

    def _file(self, split: Split, i: int) -> Path:
        return self._root / split / self._classes[self.label(split, i)] / self._files[split][i]
