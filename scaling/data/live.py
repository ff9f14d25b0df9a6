"""Validation images encoded on the fly, for an evaluation that has no token cache.

The tokens are those that a cache would hold: the same crops, encoded in the same batches, however many
processes share them: process r of W takes every W-th batch. Images are read ahead in threads while the
tokenizer encodes. All tokens stay in memory, of every process: 50 000 images of 680 take 68 MB.
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

Encoded = tuple[int, list[int], UInt16]
"""A batch's number, and the labels and tokens (B, L) of its readable images."""
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
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list[Encoded]], list[list[Encoded]]] = lambda own: [own],
) -> EncodedSplit:
    """Read, crop and encode the validation images; every process gets all of them.

    Args:
        source, data: the images and how they are cropped.
        encode: from uint8 images (B, res, res, 3) to token ids (B, L).
        images: how many, spread evenly, since an image folder is sorted by class; None for all.
        batch: images per call of ``encode``, as for a cache.
        threads: images read at once.
        progress: called with images done and their number, after every batch; of all processes, as if equal.
        rank: which of the ``world`` processes that share the images this is.
        gather: from what this process has encoded to what every one has.

    Raises:
        ConfigError: more than 1 % of the images are unreadable (fewer are skipped and named in the log).
    """
    total = source.count("val")
    count = total if images is None else min(images, total)
    wanted_n = np.arange(count) * total // count
    own, done = list[Encoded](), 0
    progress(0, count)
    with ThreadPoolExecutor(threads) as pool:
        for number, indices, crops in _read(source, data, wanted_n, batch, pool, rank, world):
            good = [i for i, crop in zip(indices, crops, strict=True) if crop is not None]
            if good:
                tokens = encode(np.stack([crop for crop in crops if crop is not None]))
                own.append((number, [source.label("val", i) for i in good], tokens))
            done += len(indices)
            progress(min(count, done * world), count)
    found = sorted((one for part in gather(own) for one in part), key=lambda one: one[0])
    require(bool(found), "none of the validation images is readable")
    labels = [label for _, part, _ in found for label in part]
    return EncodedSplit(np.concatenate([tokens for _, _, tokens in found]), np.array(labels, dtype=np.int64))


def _read(
    source: ImageSource,
    data: DataConfig,
    wanted_n: Int64,
    batch: int,
    pool: ThreadPoolExecutor,
    rank: int,
    world: int,
) -> Iterator[tuple[int, list[int], list[UInt8 | None]]]:
    """A process's batches: number, indices and crops, None for what is unreadable; cut where a cache's shards
    are cut."""
    total, per = source.count("val"), shard_images(source.count("val"))

    def read(index: int) -> UInt8 | None:
        try:
            return view_array(source.image("val", index), data, None)
        except UnreadableImageError as error:
            source.skipped.add("val", index, error, total)
            return None

    cuts = [
        wanted_n[first : min(first + batch, start + per)].tolist()
        for start in range(0, len(wanted_n), per)
        for first in range(start, min(start + per, len(wanted_n)), batch)
    ]
    ahead = deque[tuple[int, list[int], list[Future[UInt8 | None]]]]()
    for number in range(rank, len(cuts), world):
        ahead.append((number, cuts[number], [pool.submit(read, index) for index in cuts[number]]))
        if len(ahead) > AHEAD:
            which, found, futures = ahead.popleft()
            yield which, found, [future.result() for future in futures]
    for which, found, futures in ahead:
        yield which, found, [future.result() for future in futures]
