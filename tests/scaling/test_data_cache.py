"""The token cache: the same bytes however often the work was killed, and nothing damaged is ever read."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.config import DataConfig
from scaling.data import shards as shards_module
from scaling.data.cache import Progress, build_cache, open_cache
from scaling.data.images import Split
from scaling.data.shards import MAX_SHARDS, UInt16, shards
from scaling.data.transforms import UInt8, view_array
from scaling.process import Interrupted
from scaling.records import RecordsError, read_json, write_json
from scaling.schema import ConfigError
from tests.scaling.data_fixtures import SCALES, SEQ_LEN, VOCAB, NoiseSource, tokenize

TRAIN, VAL = 200, 70  # shards of 64: four and two
DATA = DataConfig(resolution=8, train_images=TRAIN, val_images=VAL, num_classes=3, views=2)


def build(folder: Path, source: NoiseSource | None = None, **options: Any) -> None:
    """A cache of noise, or of ``source``."""
    given_options: dict[str, Any] = {
        "data": DATA,
        "tokenizer_hash": "t" * 64,
        "encode": tokenize,
        "batch": 16,
    }
    wanted = given_options | options
    build_cache(folder, scales=SCALES, vocab=VOCAB, source=source or NoiseSource(TRAIN, VAL), **wanted)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the cache but the hidden ones."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a cache that was built without a break."""
    folder = tmp_path_factory.mktemp("whole")
    build(folder)
    return contents(folder)


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    """Put the files there."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


# -- what is in it ---------------------------------------------------------------------------------


def test_every_token_is_of_its_image_and_view(tmp_path: Path) -> None:
    source = NoiseSource(TRAIN, VAL)
    build(tmp_path, source, threads=3)
    cache = open_cache(tmp_path, tokenizer_hash="t" * 64, scales=SCALES, verify=True)
    train, val = cache.split("train"), cache.split("val")
    assert (train.images, val.images) == (TRAIN, VAL)
    assert train.labels.tolist() == [i % 3 for i in range(TRAIN)]
    indices, views = np.array([199, 0, 64, 63, 0]), np.array([1, 0, 1, 0, 1])
    crops = [
        view_array(source.image("train", i), DATA, (i, v))
        for i, v in zip(indices.tolist(), views.tolist(), strict=True)
    ]
    tokens = train.tokens(indices, views)
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, tokenize(np.stack(crops)))
    centre = view_array(source.image("val", 69), DATA, None)
    np.testing.assert_array_equal(val.tokens(np.array([69])), tokenize(centre[None]))


@pytest.mark.parametrize(("index", "view"), [(TRAIN, 0), (-1, 0), (0, 2), (0, -1)])
def test_what_is_not_there_is_not_read(
    tmp_path: Path, whole: dict[str, bytes], index: int, view: int
) -> None:
    write_all(tmp_path, whole)
    with pytest.raises(IndexError, match="asked for, there are"):
        open_cache(tmp_path).split("train").tokens(np.array([5, index]), np.array([0, view]))


@given(st.integers(1, 3_000_000))
def test_shards_cover_each_image_once_and_are_few(images: int) -> None:
    cut = shards("train", images, 1, 30)
    assert 1 <= len(cut) <= MAX_SHARDS
    position = 0
    for shard in cut:
        assert shard.first == position
        position += shard.images
    assert position == images
    assert all(shard.images == cut[0].images for shard in cut[:-1])


def test_the_bytes_do_not_depend_on_threads_processes_or_batch(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    build(tmp_path / "a", batch=7, threads=4)
    assert contents(tmp_path / "a") == whole
    ranks = [
        threading.Thread(target=build, args=(tmp_path / "b",), kwargs={"rank": rank, "world": 3}, daemon=True)
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=30)
    assert contents(tmp_path / "b") == whole


def test_the_manifest_says_what_the_tokens_are_of(tmp_path: Path) -> None:
    moved = dataclasses.replace(DATA, path="/anywhere")
    build(tmp_path, data=moved)
    manifest = open_cache(tmp_path).manifest
    assert manifest["tokenizer_hash"] == "t" * 64
    assert manifest["scales"] == list(SCALES)
    assert (manifest["vocab"], manifest["views"], manifest["seq_len"]) == (VOCAB, 2, SEQ_LEN)
    assert manifest["class_names"] == ["a", "b", "c"]
    assert "path" not in manifest["data"]
    assert manifest["splits"]["val"]["images"] == VAL
    assert "/anywhere" not in (tmp_path / "manifest.json").read_text()


# -- being killed ----------------------------------------------------------------------------------


def dying(after: int, how: Callable[[], None]) -> Callable[[UInt8], UInt16]:
    """A tokenizer that does ``how`` in its ``after``-th batch."""
    calls = 0

    def encode(images: UInt8) -> UInt16:
        nonlocal calls
        calls += 1
        if calls == after:
            how()
        return tokenize(images)

    return encode


@pytest.mark.parametrize("after", [1, 4, 7, 13, 19])
def test_a_build_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], after: int
) -> None:
    encode = dying(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
    child = multiprocessing.get_context("fork").Process(
        target=build, args=(tmp_path,), kwargs={"encode": encode}
    )
    child.start()
    child.join(timeout=30)
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(RecordsError, match="not finished"):
        open_cache(tmp_path)
    build(tmp_path)
    assert contents(tmp_path) == whole


def test_a_build_killed_at_random_instants_ends_with_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    def slow(images: UInt8) -> UInt16:
        time.sleep(0.004)
        return tokenize(images)

    for delay in (0.02, 0.035, 0.05, 0.065, 0.08):
        child = multiprocessing.get_context("fork").Process(
            target=build, args=(tmp_path,), kwargs={"encode": slow}
        )
        child.start()
        time.sleep(delay)
        child.kill()
        child.join(timeout=30)
    build(tmp_path)
    assert contents(tmp_path) == whole


def test_a_build_asked_to_stop_leaves_whole_shards_and_goes_on(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    seen: list[Progress] = []
    with pytest.raises(Interrupted):
        build(tmp_path, progress=seen.append, should_stop=lambda: seen[-1].encoded >= 80)
    assert sorted(p.name for p in tmp_path.glob("*.bin")) == ["train-00000.bin"]
    seen.clear()
    build(tmp_path, progress=seen.append)
    assert seen[0] == Progress(64, TRAIN + VAL, 0)
    assert seen[-1] == Progress(TRAIN + VAL, TRAIN + VAL, TRAIN + VAL - 64)
    assert [p.images for p in seen] == sorted(p.images for p in seen)
    assert contents(tmp_path) == whole


def test_a_full_disk_loses_nothing(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    left = 3

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            build(tmp_path)
    assert not list(tmp_path.glob(".*.part"))
    build(tmp_path)
    assert contents(tmp_path) == whole


# -- being damaged ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["train-00000", "train-00003", "val-00001"]),
    place=st.floats(0, 1, exclude_max=True),
    damage=st.sampled_from(["flip", "cut", "grow", "gone", "empty", "no record", "torn record"]),
)
def test_any_damage_to_a_shard_is_found_and_redone(
    tmp_path_factory: pytest.TempPathFactory, whole: dict[str, bytes], name: str, place: float, damage: str
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    write_all(folder, whole)
    file, record = folder / f"{name}.bin", folder / f"{name}.json"
    content = bytearray(file.read_bytes())
    at = int(place * len(content))
    if damage == "flip":
        content[at] ^= 0x10
    file.write_bytes({"cut": content[:at], "grow": content + b"x", "empty": b""}.get(damage, content))
    if damage == "gone":
        file.unlink()
    if damage == "no record":
        record.unlink()
    if damage == "torn record":
        record.write_bytes(record.read_bytes()[: int(place * 100)])
    if "record" not in damage:
        with pytest.raises(RecordsError, match=rf"{name}.bin is .*again"):
            open_cache(folder, verify=True)
    calls: list[int] = []
    build(folder, encode=lambda images: (calls.append(len(images)), tokenize(images))[1])
    assert contents(folder) == whole
    shard = next(s for s in every_shard() if s.name == name)
    assert sum(calls) == shard.images * shard.views


def every_shard() -> list[shards_module.Shard]:
    """All shards of the test's cache."""
    return shards("train", TRAIN, 2, SEQ_LEN) + shards("val", VAL, 1, SEQ_LEN)


@pytest.mark.parametrize("damage", [b"", b"zeros"])
def test_opening_finds_a_shard_that_is_cut_short_or_has_a_damaged_end(
    tmp_path: Path, whole: dict[str, bytes], damage: bytes
) -> None:
    write_all(tmp_path, whole)
    content = whole["train-00002.bin"]
    (tmp_path / "train-00002.bin").write_bytes(content[: -max(2, len(damage))] + damage)
    with pytest.raises(RecordsError, match=r"train-00002.bin is (missing or cut short|damaged)"):
        open_cache(tmp_path)


def test_damaged_labels_are_found_and_redone(tmp_path: Path, whole: dict[str, bytes]) -> None:
    write_all(tmp_path, whole)
    (tmp_path / "val-labels.npy").write_bytes(whole["val-labels.npy"][:-1] + b"\7")
    with pytest.raises(RecordsError, match=r"val-labels.npy is missing or damaged"):
        open_cache(tmp_path)
    build(tmp_path, encode=dying(1, lambda: pytest.fail("nothing to encode")))
    assert contents(tmp_path) == whole


# -- being another's -------------------------------------------------------------------------------


def test_a_cache_of_another_tokenizer_is_refused_in_one_line(tmp_path: Path, whole: dict[str, bytes]) -> None:
    write_all(tmp_path, whole)
    with pytest.raises(RecordsError, match="another tokenizer") as raised:
        open_cache(tmp_path, tokenizer_hash="u" * 64)
    assert "\n" not in str(raised.value)
    with pytest.raises(RecordsError, match=r"another scales: \[1, 2, 3\], expected \[1, 3\]"):
        open_cache(tmp_path, scales=(1, 3))
    with pytest.raises(RecordsError, match="another tokenizer"):
        build(tmp_path, tokenizer_hash="u" * 64)
    with pytest.raises(RecordsError, match="other data"):
        build(tmp_path, data=dataclasses.replace(DATA, crop_margin=1.5))
    with pytest.raises(RecordsError, match="other data"):
        build(tmp_path, NoiseSource(TRAIN, VAL - 1))
    assert contents(tmp_path) == whole


def test_no_cache_and_another_format_are_told(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(RecordsError, match="no token cache there"):
        open_cache(tmp_path)
    write_all(tmp_path, whole)
    write_json(tmp_path / "manifest.json", read_json(tmp_path / "manifest.json") | {"format": 99})
    with pytest.raises(RecordsError, match="format 99, this program reads 1"):
        open_cache(tmp_path)


def test_a_tokenizer_that_breaks_its_word_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected .* below 50"):
        build(tmp_path, encode=lambda images: tokenize(images) + np.uint16(VOCAB))
    with pytest.raises(ValueError, match="shape"):
        build(tmp_path, encode=lambda images: tokenize(images)[:, 1:])


# -- unreadable images -----------------------------------------------------------------------------


def test_unreadable_images_are_named_counted_and_skipped(
    tmp_path: Path, whole: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    broken: frozenset[tuple[Split, int]] = frozenset({("train", 64), ("train", 130)})
    build(tmp_path, NoiseSource(TRAIN, VAL, broken))
    assert [r.message for r in caplog.records] == [
        f"unreadable image skipped: train/{i}.png: broken on purpose" for i in (64, 130)
    ]
    cache = open_cache(tmp_path)
    train = cache.split("train")
    assert [entry["index"] for entry in cache.manifest["splits"]["train"]["skipped"]] == [64, 130]
    assert train.images == len(train.labels) == TRAIN - 2
    kept = [i for i in range(TRAIN) if ("train", i) not in broken]
    assert train.labels.tolist() == [i % 3 for i in kept]
    source = NoiseSource(TRAIN, VAL)
    expected = np.stack([view_array(source.image("train", i), DATA, (i, 1)) for i in kept])
    np.testing.assert_array_equal(train.tokens(np.arange(TRAIN - 2), 1), tokenize(expected))
    before = contents(tmp_path)
    build(tmp_path, NoiseSource(TRAIN, VAL, broken))
    assert contents(tmp_path) == before


def test_more_than_one_percent_unreadable_stops_with_the_list_over_restarts(tmp_path: Path) -> None:
    broken: frozenset[tuple[Split, int]] = frozenset({("train", 0), ("train", 70), ("train", 199)})
    for _ in range(2):  # the second attempt finds the first two in finished shards
        with pytest.raises(ConfigError, match="more than 1 % of the 200 train images") as raised:
            build(tmp_path, NoiseSource(TRAIN, VAL, broken))
        for _, i in broken:
            assert f"train/{i}.png" in str(raised.value)
    with pytest.raises(RecordsError, match="not finished"):
        open_cache(tmp_path)


def test_processes_together_count_the_unreadable(tmp_path: Path) -> None:
    broken: frozenset[tuple[Split, int]] = frozenset({("train", 0), ("train", 70), ("train", 199)})
    build(tmp_path, NoiseSource(TRAIN, VAL, broken), rank=1, world=2)
    with pytest.raises(ConfigError, match="more than 1 % of the 200 train images"):
        build(tmp_path, NoiseSource(TRAIN, VAL, broken), rank=0, world=2)
