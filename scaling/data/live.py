"""Validation images encoded on the fly, for an evaluation that has no token cache.

The tokens are those that a cache would hold: the same crops, encoded in the same batches. Images are read
ahead in threads while the tokenizer encodes. All tokens stay in memory: 50 000 images of 680 take 68 MB.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from scaling.config import DataConfig
from scaling.data.cache import Encode
from scaling.data.images import ImageSource, UnreadableImageError
from scaling.data.sampler import Int64
from scaling.data.shards import UInt16, shard_images
from scaling.data.transforms import UInt8, view_array
from scaling.schema import require

AHEAD = 2
"""Batches that are read while another is encoded."""


class EncodedSplit:
    """Tokens and labels of some validation images; to be evaluated like a cache's split."""

    def __init__(self, tokens_nL: UInt16, labels_n: Int64) -> None:
        self.images = len(labels_n)
        self.labels = labels_n
        self._tokens_nL = tokens_nL

    def tokens(self, indices: Int64, views: Int64 | int = 0) -> UInt16:
        """Token ids of some images, uint16 (B, L); validation images have one view."""
        return self._tokens_nL[indices]


def encode_validation(
    source: ImageSource,
    data: DataConfig,
    encode: Encode,
    *,
    images: int | None,
    batch: int,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EncodedSplit:
    """Read, crop and encode the validation images.

    Args:
        source, data: the images and how they are cropped.
        encode: from uint8 images (B, res, res, 3) to token ids (B, L).
        images: how many, spread evenly, since an image folder is sorted by class; None for all.
        batch: images per call of ``encode``, as for a cache.
        threads: images read at once.
        progress: called with images done and their number, after every batch.

    Raises:
        ConfigError: more than 1 % of the images are unreadable (fewer are skipped and named in the log).
    """
    total = source.count("val")
    count = total if images is None else min(images, total)
    wanted_n = np.arange(count) * total // count
    labels, tokens, done = list[int](), list[UInt16](), 0
    progress(0, count)
    with ThreadPoolExecutor(threads) as pool:
        for indices, crops in _read(source, data, wanted_n, batch, pool):
            good = [i for i, crop in zip(indices, crops, strict=True) if crop is not None]
            if good:
                tokens.append(encode(np.stack([crop for crop in crops if crop is not None])))
                labels += [source.label("val", i) for i in good]
            done += len(indices)
            progress(done, count)
    require(bool(tokens), "none of the validation images is readable")
    return EncodedSplit(np.concatenate(tokens), np.array(labels, dtype=np.int64))


def _read(
    source: ImageSource, data: DataConfig, wanted_n: Int64, batch: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[int], list[UInt8 | None]]]:
    """Batches of indices and crops, None for what is unreadable; cut where a cache's shards are cut."""
    total, per = source.count("val"), shard_images(source.count("val"))

    def read(index: int) -> UInt8 | None:
        try:
            return view_array(source.image("val", index), data, None)
        except UnreadableImageError as error:
            source.skipped.add("val", index, error, total)
            return None

    ahead = deque[tuple[list[int], list[Future[UInt8 | None]]]]()
    for start in range(0, len(wanted_n), per):
        for first in range(start, min(start + per, len(wanted_n)), batch):
            indices = wanted_n[first : min(first + batch, start + per)].tolist()
            ahead.append((indices, [pool.submit(read, index) for index in indices]))
            if len(ahead) > AHEAD:
                found, futures = ahead.popleft()
                yield found, [future.result() for future in futures]
    for found, futures in ahead:
        yield found, [future.result() for future in futures]
