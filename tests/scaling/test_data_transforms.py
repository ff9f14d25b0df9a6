"""VAR's augmentation: shorter side to 1.125 × the resolution by Lanczos, then one square."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scaling.config import DataConfig
from scaling.data.images import Split
from scaling.data.transforms import image_batch, resize_shorter, view_array, view_arrays
from scaling.schema import ConfigError
from tests.scaling.data_fixtures import NoiseSource, picture

DATA = DataConfig(resolution=16)
sides = st.integers(1, 90)


@given(sides, sides, st.integers(4, 24), st.floats(1.0, 1.5), st.integers(0, 99))
def test_every_image_becomes_a_square_of_the_resolution(
    width: int, height: int, resolution: int, margin: float, view: int
) -> None:
    data = DataConfig(resolution=resolution, crop_margin=margin)
    image = picture(0, (width, height))
    for key in (None, (1, view)):
        pixels = view_array(image, data, key)
        assert pixels.shape == (resolution, resolution, 3)
        assert pixels.dtype == np.uint8


def test_the_centre_crop_is_the_middle_of_the_lanczos_image() -> None:
    image = picture(1, (60, 40))
    resized = np.asarray(image.resize((27, 18), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(view_array(image, DATA, None), resized[1:17, 6:22])


def test_a_random_crop_is_a_window_of_the_lanczos_image_and_all_windows_occur() -> None:
    image = picture(1, (20, 18))
    assert resize_shorter(image, 18) is image
    whole = np.asarray(image)
    windows = {whole[y : y + 16, x : x + 16].tobytes(): (y, x) for y in range(3) for x in range(5)}
    found = {windows[view_array(image, DATA, (0, view)).tobytes()] for view in range(300)}
    assert found == set(windows.values())


def test_a_crop_is_a_pure_function_of_seed_and_key() -> None:
    image = picture(2, (60, 60))
    crops = [view_array(image, DATA, (i, v)).tobytes() for i in range(3) for v in range(3)]
    assert crops == [view_array(image, DATA, (i, v)).tobytes() for i in range(3) for v in range(3)]
    reseeded = dataclasses.replace(DATA, seed=1)
    assert crops != [view_array(image, reseeded, (i, v)).tobytes() for i in range(3) for v in range(3)]


def test_flip_is_off_by_default_and_half_the_views_when_on() -> None:
    image = picture(3, (60, 60))
    flipping = dataclasses.replace(DATA, flip=True)
    flips = 0
    for view in range(200):
        plain, other = view_array(image, DATA, (0, view)), view_array(image, flipping, (0, view))
        if not np.array_equal(plain, other):
            np.testing.assert_array_equal(plain[:, ::-1], other)
            flips += 1
    assert 70 < flips < 130
    np.testing.assert_array_equal(view_array(image, DATA, None), view_array(image, flipping, None))


def test_views_are_the_crops_one_by_one_and_validation_has_the_centre_alone() -> None:
    image, data = picture(4, (60, 40)), dataclasses.replace(DATA, views=3)
    expected = np.stack([view_array(image, data, (7, view)) for view in range(3)])
    np.testing.assert_array_equal(view_arrays(image, data, "train", 7), expected)
    np.testing.assert_array_equal(view_arrays(image, data, "val", 7), view_array(image, data, None)[None])


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_batch_is_its_images_whoever_reads_them(split: Split) -> None:
    source = NoiseSource(30, 30)
    indices, views = np.array([3, 0, 29, 3]), np.array([0, 5, 1, 1])
    keys = [
        (i, v) if split == "train" else None for i, v in zip(indices.tolist(), views.tolist(), strict=True)
    ]
    expected = np.stack(
        [view_array(source.image(split, i), DATA, key) for i, key in zip(indices.tolist(), keys, strict=True)]
    )
    np.testing.assert_array_equal(image_batch(source, DATA, split, indices, views), expected)
    with ThreadPoolExecutor(3) as pool:
        np.testing.assert_array_equal(image_batch(source, DATA, split, indices, views, pool), expected)


def test_the_next_readable_image_takes_an_unreadable_ones_place(caplog: pytest.LogCaptureFixture) -> None:
    source = NoiseSource(300, 1, frozenset({("train", 299), ("train", 0)}))
    batch = image_batch(source, DATA, "train", np.array([299, 5, 299]), 0)
    np.testing.assert_array_equal(batch[0], view_array(source.image("train", 1), DATA, (1, 0)))
    np.testing.assert_array_equal(batch[0], batch[2])
    named = [record.message for record in caplog.records]
    assert len(named) == 2  # each once
    assert "train/299.png" in named[0]


def test_more_than_one_percent_unreadable_stops_with_the_list() -> None:
    source = NoiseSource(300, 1, frozenset(("train", i) for i in (1, 2, 3, 4)))
    image_batch(source, DATA, "train", np.array([3]))
    with pytest.raises(ConfigError, match=r"more than 1 % of the 300 train images") as raised:
        image_batch(source, DATA, "train", np.array([1]))
    for i in (1, 2, 3, 4):
        assert f"train/{i}.png: broken on purpose" in str(raised.value)
