"""What the data costs a training step: reading cached tokens, and making them.

    python -m benchmarks.loader

Builds token caches of random tokens in a temporary folder (as large as CIFAR-10 at 30 tokens, and
100,000 images at the paper's 680), reads shuffled batches of 256 as the trainer does, and prints the
time per batch beside the time for drawing the batch's indices. The files are in the page cache, as
they are in training once an epoch has passed. The last lines are images read and cropped per second
by one thread, which is what encoding waits for at most.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from scaling.config import PAPER_SCALES, DataConfig
from scaling.data.cache import CachedSplit, build_cache, open_cache
from scaling.data.images import Skipped, Split
from scaling.data.sampler import batch_indices, batch_views
from scaling.data.shards import UInt16
from scaling.data.sources import open_source
from scaling.data.transforms import UInt8, view_array

BATCH, STEPS = 256, 400


class Blank:
    """Many equal images: only the tokens' shape matters here."""

    num_classes = 1
    class_names = ("blank",)

    def __init__(self, data: DataConfig) -> None:
        self.skipped = Skipped()
        self._counts: dict[Split, int] = {"train": data.train_images or 0, "val": data.val_images or 0}
        self._image = Image.new("RGB", (data.resolution, data.resolution))

    def count(self, split: Split) -> int:
        """As configured."""
        return self._counts[split]

    def label(self, split: Split, i: int) -> int:
        """One class."""
        return 0

    def image(self, split: Split, i: int) -> Image.Image:
        """One picture."""
        return self._image

    def fingerprint(self) -> str:
        """One data set."""
        return "blank"


def build(folder: Path, images: int, scales: tuple[int, ...], views: int) -> CachedSplit:
    """A cache of random tokens, open for reading."""
    data = DataConfig(
        resolution=4, crop_margin=1.0, train_images=images, val_images=64, num_classes=1, views=views
    )
    seq_len = sum(side * side for side in scales)
    generator = np.random.default_rng(0)

    def encode(crops: UInt8) -> UInt16:
        return generator.integers(0, 4096, (len(crops), seq_len), dtype=np.uint16)

    build_cache(folder, data, scales, 4096, Blank(data), encode, "benchmark", batch=1024)
    return open_cache(folder).split("train")


def microseconds(action: object, steps: int) -> tuple[float, float]:
    """Median and 99th percentile of the time of ``action(step)``."""
    assert callable(action)
    times = []
    for step in range(steps):
        start = time.perf_counter()
        action(step)
        times.append(1e6 * (time.perf_counter() - start))
    return float(np.median(times)), float(np.percentile(times, 99))


def main() -> None:
    """Measure and print."""
    table = Table("tokens per image", "images", "views", "shards", "action", "median µs", "99 % µs")
    for scales, images, views in (
        ((1, 2, 3, 4), 50_000, 1),
        ((1, 2, 3, 4), 50_000, 4),
        (PAPER_SCALES, 100_000, 1),
    ):
        with tempfile.TemporaryDirectory() as name:
            split = build(Path(name), images, scales, views)
            shape = [
                str(split.seq_len),
                f"{images:,}",
                str(views),
                str(len(list(Path(name).glob("train-*.bin")))),
            ]

            def indices(step: int) -> tuple[np.ndarray, np.ndarray]:
                return batch_indices(0, step, BATCH, images), batch_views(step, BATCH, images, views)  # noqa: B023

            drawn = [indices(step) for step in range(STEPS)]
            table.add_row(*shape, "draw indices", *(f"{v:.0f}" for v in microseconds(indices, STEPS)))
            read = microseconds(lambda step: split.tokens(*drawn[step]), STEPS)  # noqa: B023
            table.add_row(*shape, f"read {BATCH} images", *(f"{v:.0f}" for v in read))
    console = Console()
    console.print(table)

    table = Table("source", "resolution", "images/s, one thread")
    for resolution in (32, 256):
        data = DataConfig(resolution=resolution)
        source = open_source(data)
        source.image("train", 0)
        median, _ = microseconds(lambda i: view_array(source.image("train", i), data, (i, 0)), STEPS)  # noqa: B023
        table.add_row("photos", str(resolution), f"{1e6 / median:,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
