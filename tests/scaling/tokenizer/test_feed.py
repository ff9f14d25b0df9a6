"""Images ahead of the compute: the right ones, in order, once decoded."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from scaling.tokenizer.feed import KeptOriginals, prefetched, train_images, validation_images
from tests.scaling.tokenizer import tiny


def test_processes_share_the_batch_in_order() -> None:
    source = tiny.Waves()
    whole = train_images(source, tiny.DATA, 0, 8, 11)
    parts = [train_images(source, tiny.DATA, 0, 8, 11, rank, 4) for rank in range(4)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert whole.shape == (8, 16, 16, 3)


def test_each_epoch_has_its_own_crops() -> None:
    # Waves has 40 images: a batch of 40 is an epoch.
    epochs = [train_images(tiny.Waves(), tiny.DATA, 0, 40, step) for step in (0, 1, 0)]
    assert np.array_equal(epochs[0], epochs[2])
    assert not np.array_equal(np.sort(epochs[0], axis=0), np.sort(epochs[1], axis=0))


def test_validation_images_are_spread_over_the_split() -> None:
    source = tiny.Waves()
    every = validation_images(source, tiny.DATA, 1000)
    assert len(every) == 10
    assert np.array_equal(validation_images(source, tiny.DATA, 5), every[::2])


def test_small_originals_are_decoded_once() -> None:
    class Counting(tiny.Waves):
        reads = 0

        def image(self, split, i):  # type: ignore[no-untyped-def]
            self.reads += 1
            return super().image(split, i)

    source = Counting()
    kept = KeptOriginals(source, budget=3 * 24 * 24 * 3)
    for _ in range(4):
        for i in range(5):
            assert np.array_equal(kept.image("train", i), tiny.Waves().image("train", i))
    assert source.reads == 3 + 4 * 2


@pytest.mark.parametrize("threads", [1, 3])
def test_steps_come_in_order_and_are_loaded_ahead(threads: int) -> None:
    loaded: list[int] = []
    guard = threading.Lock()

    def load(step: int) -> np.ndarray:
        time.sleep(0.001 * (step % 3))
        with guard:
            loaded.append(step)
        return np.array([step])

    stream = prefetched(load, 5, 12, threads)
    assert int(next(stream)[0]) == 5
    deadline = time.monotonic() + 10
    while 6 not in loaded and time.monotonic() < deadline:
        time.sleep(0.001)
    assert 6 in loaded
    assert [int(images[0]) for images in stream] == list(range(6, 12))
    assert sorted(loaded) == list(range(5, 12))


def test_an_error_reaches_the_step_that_needs_it() -> None:
    def load(step: int) -> np.ndarray:
        if step == 2:
            raise OSError("gone")
        return np.array([step])

    stream = prefetched(load, 0, 5, 1)
    assert [int(next(stream)[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(stream)
