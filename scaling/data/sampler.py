"""Every random choice about data, as a pure function of a seed and of what is chosen.

- Nothing here has state: which images step s sees follows from (seed, s) alone, so a resumed run and
  one on more processes see the same images in the same order.
- Only the raw words of a bit generator and a hash are used, whose values NumPy and Python promise to
  keep; NumPy's higher-level draws may change between releases.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


def uniforms(count: int, *key: int | str) -> tuple[float, ...]:
    """``count`` (at most 8) numbers in [0, 1) that depend on ``key`` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * count).digest()
    words = np.frombuffer(digest, dtype="<u8") >> np.uint64(11)
    return tuple(float(word) / 2.0**53 for word in words)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> Int64:
    """The order of ``n`` things in one epoch, int64 (n,), read-only."""
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def batch_indices(seed: int, step: int, batch: int, n: int) -> Int64:
    """The images of one step: positions step·batch … of an endless stream of per-epoch permutations.

    Args:
        seed: of the run.
        step: counted from 0.
        batch: images per step, over all processes; may exceed ``n``.
        n: images there are.

    Returns:
        int64 (batch,), each 0 to n − 1; every n consecutive positions of the stream from a multiple of
        n on hold each image once.
    """
    positions = _positions(step, batch)
    epochs, offsets = positions // n, positions % n
    indices = np.empty(batch, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        chosen = epochs == epoch
        indices[chosen] = permutation(seed, epoch, n)[offsets[chosen]]
    return indices


def batch_views(step: int, batch: int, n: int, views: int) -> Int64:
    """The view (random crop) of each position of one step: its epoch modulo ``views``, int64 (batch,)."""
    return _positions(step, batch) // n % views


def _positions(step: int, batch: int) -> Int64:
    return step * batch + np.arange(batch, dtype=np.int64)
