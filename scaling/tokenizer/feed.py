"""Training images ahead of the compute, and decoded originals kept when they are small.

Design choices
- Step s's images are a pure function of (seed, s): which images, and which random crop of each (its
  epoch), come from ``scaling.data.sampler``. Nothing has to be saved to resume.
- Threads load the next steps while the current one computes; decoding releases the interpreter's lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaling.config import DataConfig
from scaling.data.images import ImageSource, SourceView, Split
from scaling.data.sampler import batch_indices, batch_views
from scaling.data.transforms import image_batch

UInt8 = NDArray[np.uint8]

CACHE_BYTES = 512 * 2**20
CROPS = 2**31
"""Every epoch sees a fresh random crop of each image."""


class KeptOriginals(SourceView):
    """A source whose decoded images are kept until they fill ``budget`` bytes; later ones are not."""

    def __init__(self, source: ImageSource, budget: int = CACHE_BYTES) -> None:
        super().__init__(source)
        self._kept: dict[tuple[Split, int], Image.Image] = {}
        self._free = budget
        self._guard = threading.Lock()

    def image(self, split: Split, i: int) -> Image.Image:
        """As the source, decoded once where it is kept."""
        kept = self._kept.get((split, i))
        if kept is not None:
            return kept
        image = self.source.image(split, i)
        size = 3 * image.width * image.height
        with self._guard:
            if size <= self._free and (split, i) not in self._kept:
                self._kept[split, i] = image
                self._free -= size
        return image


def train_images(
    source: ImageSource, data: DataConfig, seed: int, batch: int, step: int, rank: int = 0, world: int = 1
) -> UInt8:
    """One process's share of a step's images, uint8 (batch/world, res, res, 3), in the batch's order."""
    n, share = source.count("train"), batch // world
    mine = slice(rank * share, (rank + 1) * share)
    indices, views = batch_indices(seed, step, batch, n), batch_views(step, batch, n, CROPS)
    return image_batch(source, data, "train", indices[mine], views[mine])


def validation_images(source: ImageSource, data: DataConfig, wanted: int) -> UInt8:
    """Centre crops of ``wanted`` validation images (or all there are), evenly spread over the split."""
    n = source.count("val")
    wanted = min(wanted, n)
    return image_batch(source, data, "val", np.arange(wanted, dtype=np.int64) * n // wanted)


def prefetched(
    load: Callable[[int], UInt8], first: int, end: int, threads: int
) -> Generator[UInt8, None, None]:
    """``load(step)`` for step = first … end − 1, in order, each loaded in a thread ahead of its use."""
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as pool:
        waiting: deque[Future[UInt8]] = deque()
        following = first
        try:
            while following < end or waiting:
                while following < end and len(waiting) <= threads:
                    waiting.append(pool.submit(load, following))
                    following += 1
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
