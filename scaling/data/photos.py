"""The embedded default: crops of the photographs that ship inside scikit-image and scikit-learn.

- Nothing is downloaded, and only photographs are used: no text, drawing, phantom or test chart, and
  none too small to cut from.
- Class = photograph. The two halves of the stereo pair show the same scene and are one class.
- Each photograph is cut into three equal bands of rows. Training crops come from the upper and the
  lower band, validation crops from the middle one, so that no pixel is shared; and since stereo moves
  a point along its row only, the pair cannot show one half's validation region in the other's training.
- Bands of equal height give both splits the same range of zooms: the side of a crop is log-uniform
  from the pixels that the augmentation needs up to the height of a band.
- Crops are independent draws from these photographs' regions, class by class. A standard error over
  them therefore says how well the mean over *these regions* is known, overlaps or not; it says nothing of
  other photographs, which 18 of them could hardly tell.
- Image i is a pure function of (data.seed, split, i) for a given resolution; there are as many as
  asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from pathlib import Path

from PIL import Image

from scaling.config import DataConfig
from scaling.data.images import Skipped, Split, UnreadableImageError, decode
from scaling.data.sampler import uniforms
from scaling.schema import ConfigError

DEFAULT_COUNTS: dict[Split, int] = {"train": 4096, "val": 512}

SKIMAGE, SKLEARN = ("skimage", "data"), ("sklearn", "datasets", "images")
PHOTOGRAPHS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "astronaut": ((SKIMAGE, "astronaut.png"),),
    "brick": ((SKIMAGE, "brick.png"),),
    "camera": ((SKIMAGE, "camera.png"),),
    "cell": ((SKIMAGE, "cell.png"),),
    "chelsea": ((SKIMAGE, "chelsea.png"),),
    "china": ((SKLEARN, "china.jpg"),),
    "clock": ((SKIMAGE, "clock_motion.png"),),
    "coffee": ((SKIMAGE, "coffee.png"),),
    "coins": ((SKIMAGE, "coins.png"),),
    "flower": ((SKLEARN, "flower.jpg"),),
    "grass": ((SKIMAGE, "grass.png"),),
    "gravel": ((SKIMAGE, "gravel.png"),),
    "hubble": ((SKIMAGE, "hubble_deep_field.jpg"),),
    "ihc": ((SKIMAGE, "ihc.png"),),
    "moon": ((SKIMAGE, "moon.png"),),
    "motorcycle": ((SKIMAGE, "motorcycle_left.png"), (SKIMAGE, "motorcycle_right.png")),
    "retina": ((SKIMAGE, "retina.jpg"),),
    "rocket": ((SKIMAGE, "rocket.jpg"),),
}
"""Class name to its files, each a folder inside an installed package and a file name."""

Box = tuple[int, int, int, int]
"""left, upper, right, lower; right and lower exclusive."""


class Photos:
    """The photographs as an ``ImageSource``; see the module's docstring."""

    def __init__(self, data: DataConfig) -> None:
        self.skipped = Skipped()
        self._seed = data.seed
        self._least = round(data.crop_margin * data.resolution)
        self._counts: dict[Split, int] = {
            "train": data.train_images or DEFAULT_COUNTS["train"],
            "val": data.val_images or DEFAULT_COUNTS["val"],
        }
        self._files = [[_locate(*file) for file in files] for files in PHOTOGRAPHS.values()]
        self._photographs: list[list[Image.Image]] | None = None
        self._guard = threading.Lock()

    @property
    def num_classes(self) -> int:
        """One per photograph, the stereo pair counting once."""
        return len(PHOTOGRAPHS)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the photographs are called in their packages."""
        return tuple(PHOTOGRAPHS)

    def count(self, split: Split) -> int:
        """As many as asked for; 4096 and 512 by default."""
        return self._counts[split]

    def label(self, split: Split, i: int) -> int:
        """The classes take turns."""
        return i % self.num_classes

    def image(self, split: Split, i: int) -> Image.Image:
        """Crop ``i``, a square of RGB at the photograph's own resolution."""
        photograph, box = self.crop(split, i)
        return photograph.crop(box)

    def crop(self, split: Split, i: int) -> tuple[Image.Image, Box]:
        """The photograph that image ``i`` is cut from, and where."""
        which, band, zoom, x, y = uniforms(5, "photos", self._seed, split, i)
        pair = self._load()[self.label(split, i)]
        photograph = pair[int(which * len(pair))]
        upper, lower = region(photograph.height, split, lower=band >= 0.5)
        most = min(photograph.width, photograph.height // 3)
        least = min(self._least, most)
        side = min(most, round(least * (most / least) ** zoom))
        left = int(x * (photograph.width - side + 1))
        top = upper + int(y * (lower - upper - side + 1))
        return photograph, (left, top, left + side, top + side)

    def fingerprint(self) -> str:
        """Of the photographs' files."""
        digest = hashlib.sha256()
        for files in self._files:
            for file in files:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def _load(self) -> list[list[Image.Image]]:
        with self._guard:
            if self._photographs is None:
                try:
                    self._photographs = [[decode(file, str(file)) for file in files] for files in self._files]
                except UnreadableImageError as error:
                    raise ConfigError(f"data.source 'photos': {error}; reinstall its package") from error
            return self._photographs


def region(height: int, split: Split, lower: bool) -> tuple[int, int]:
    """The rows (first, end) that a split may cut from; training has an upper and a ``lower`` region."""
    band = height // 3
    if split == "val":
        return band, height - band
    return (height - band, height) if lower else (0, band)


def _locate(folder: tuple[str, ...], name: str) -> Path:
    # find_spec on a top-level package finds it without running it: importing scikit-image takes a second.
    spec = importlib.util.find_spec(folder[0])
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"data.source 'photos' needs the package {folder[0]}, which is not installed")
    file = Path(spec.submodule_search_locations[0]).joinpath(*folder[1:], name)
    if not file.is_file():
        raise ConfigError(f"data.source 'photos': {file} is missing; reinstall its package")
    return file
