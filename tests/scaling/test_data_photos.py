"""The embedded photographs: pure crops, and a validation region that training never sees."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import DataConfig
from scaling.data import photos
from scaling.data.images import SPLITS, Split
from scaling.data.photos import PHOTOGRAPHS, Photos, region
from scaling.data.sources import open_source, resolve
from scaling.schema import ConfigError

DATA = DataConfig(resolution=32)
SOURCE = Photos(DATA)


@given(st.integers(3, 5000))
def test_regions_do_not_overlap_and_allow_the_same_crops(height: int) -> None:
    upper, lower, val = (
        region(height, "train", False),
        region(height, "train", True),
        region(height, "val", False),
    )
    assert 0 == upper[0] < upper[1] <= val[0] < val[1] <= lower[0] < lower[1] == height
    assert min(end - first for first, end in (upper, lower, val)) == height // 3


def test_no_pixel_of_a_photograph_is_in_crops_of_both_splits() -> None:
    covered = {
        (split, id(photograph)): np.zeros((photograph.height, photograph.width), bool)
        for split in SPLITS
        for pair in SOURCE._load()
        for photograph in pair
    }
    for split in SPLITS:
        for i in range(4000):
            photograph, (left, top, right, bottom) = SOURCE.crop(split, i)
            covered[split, id(photograph)][top:bottom, left:right] = True
    for pair in SOURCE._load():
        train = np.any([covered["train", id(photograph)].any(axis=1) for photograph in pair], axis=0)
        val = np.any([covered["val", id(photograph)].any(axis=1) for photograph in pair], axis=0)
        assert not (train & val).any()  # rows, over both halves of a stereo pair
        assert train.sum() > 0.6 * len(train)
        assert val.sum() > 0.3 * len(val)


@given(st.sampled_from(SPLITS), st.integers(0, 10**9), st.sampled_from([8, 32, 256]), st.integers(0, 99))
def test_crops_are_squares_inside_their_region(split: Split, i: int, resolution: int, seed: int) -> None:
    source = Photos(dataclasses.replace(DATA, resolution=resolution, seed=seed))
    source._photographs = SOURCE._load()
    photograph, (left, top, right, bottom) = source.crop(split, i)
    regions = [region(photograph.height, split, lower) for lower in (False, True)]
    assert any(first <= top < bottom <= end for first, end in regions)
    assert 0 <= left < right <= photograph.width
    assert right - left == bottom - top >= min(round(1.125 * resolution), photograph.height // 3)


def test_an_image_is_a_pure_function_of_seed_and_index() -> None:
    def pixels(seed: int) -> list[bytes]:
        source = Photos(dataclasses.replace(DATA, seed=seed))
        return [source.image("train", i).tobytes() for i in range(40)]

    first = pixels(0)
    assert first == pixels(0)
    assert first != pixels(1)
    assert len(set(first)) == 40
    assert first[0] != SOURCE.image("val", 0).tobytes()
    fewer = Photos(dataclasses.replace(DATA, train_images=5))
    assert [fewer.image("train", i).tobytes() for i in range(5)] == first[:5]


def test_crops_come_at_several_zooms() -> None:
    widths = [SOURCE.image("train", i).width for i in range(200)]
    assert min(widths) < 45
    assert max(widths) > 150


def test_only_photographs_are_used_each_its_own_class() -> None:
    names = {name for files in PHOTOGRAPHS.values() for _, name in files}
    assert not names & {"text.png", "page.png", "logo.png", "phantom.png", "color.png", "horse.png"}
    assert not any("chessboard" in name for name in names)
    assert SOURCE.class_names == tuple(PHOTOGRAPHS)
    assert {SOURCE.label("train", i) for i in range(SOURCE.count("train"))} == set(range(SOURCE.num_classes))
    for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble", "retina", "ihc", "china", "flower"):
        assert name in SOURCE.class_names
    assert len(PHOTOGRAPHS["motorcycle"]) == 2


def test_counts_default_and_are_as_asked_for() -> None:
    known = resolve(DATA)
    assert (known.train_images, known.val_images, known.num_classes) == (4096, 512, len(PHOTOGRAPHS))
    asked = dataclasses.replace(DATA, train_images=7, val_images=10**7)
    assert (resolve(asked).train_images, resolve(asked).val_images) == (7, 10**7)
    assert open_source(asked).count("val") == 10**7


def test_wrong_class_count_and_missing_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"num_classes is 5, photos has {len(PHOTOGRAPHS)} classes"):
        resolve(dataclasses.replace(DATA, num_classes=5))
    monkeypatch.setattr(photos, "SKIMAGE", ("no_such_package", "data"))
    monkeypatch.setitem(photos.PHOTOGRAPHS, "brick", ((photos.SKIMAGE, "brick.png"),))
    with pytest.raises(ConfigError, match="needs the package no_such_package"):
        resolve(DATA)


def test_the_fingerprint_is_of_the_files_alone() -> None:
    assert SOURCE.fingerprint() == Photos(dataclasses.replace(DATA, seed=5, resolution=64)).fingerprint()
