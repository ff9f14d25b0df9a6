"""Folder, parquet and hub sets: what is found, what is chosen, and what a person is told when it is not."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scaling.config import DataConfig
from scaling.data import parquet
from scaling.data.images import UnreadableImageError, decode
from scaling.data.parquet import ParquetImages
from scaling.data.sources import open_source, resolve
from scaling.schema import ConfigError
from tests.scaling.data_fixtures import image_folder, parquet_file, picture, png

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("VARSCALE_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def config(path: Path, source: Any = "folder", **options: Any) -> DataConfig:
    """A data set at a place."""
    return DataConfig(source=source, path=str(path), resolution=16, **options)


# -- folder ----------------------------------------------------------------------------------------


def test_a_folders_classes_are_those_of_both_splits_in_name_order(tmp_path: Path) -> None:
    image_folder(tmp_path, {"b": 2, "d": 1}, {"a": 1, "b": 1})
    (tmp_path / "train" / "b" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "empty").mkdir()
    data = config(tmp_path)
    known = resolve(data)
    assert (known.train_images, known.val_images, known.num_classes) == (3, 2, 3)
    source = open_source(data)
    assert source.class_names == ("a", "b", "d")
    assert [source.label("train", i) for i in range(3)] == [1, 1, 2]
    assert [source.label("val", i) for i in range(2)] == [0, 1]
    assert source.image("train", 2).tobytes() == picture(2).tobytes()
    assert source.image("val", 0).tobytes() == picture(3).tobytes()


def test_a_folders_fingerprint_moves_with_it_and_changes_with_its_files(tmp_path: Path) -> None:
    image_folder(tmp_path / "one", {"a": 2}, {"a": 1})
    before = open_source(config(tmp_path / "one")).fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    assert open_source(config(tmp_path / "two")).fingerprint() == before
    file = tmp_path / "two" / "train" / "a" / "a_000.png"
    file.write_bytes(bytes(len(file.read_bytes())))
    same_size = open_source(config(tmp_path / "two")).fingerprint()
    assert same_size != before
    file.write_bytes(b"other")
    assert open_source(config(tmp_path / "two")).fingerprint() not in (before, same_size)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot identify"),
        (b"no image at all", "cannot identify"),
        (png(0)[:200], "a_000.png"),
        (png(0)[:30] + b"garbage" + png(0)[37:], "a_000.png"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    image_folder(tmp_path, {"a": 1}, {"a": 1})
    file = tmp_path / "train" / "a" / "a_000.png"
    file.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason) as raised:
        open_source(config(tmp_path)).image("train", 0)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere is not a folder.*train/<class>"):
        resolve(config(tmp_path / "nowhere"))
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"train has no images"):
        resolve(config(tmp_path))
    image_folder(tmp_path / "x", {"a": 1}, {})
    with pytest.raises(ConfigError, match=r"val is missing"):
        resolve(config(tmp_path / "x"))


def test_a_known_config_does_not_touch_the_disk(tmp_path: Path) -> None:
    data = config(tmp_path / "nowhere", train_images=5, val_images=2, num_classes=3)
    assert resolve(data) == data
    with pytest.raises(ConfigError, match="not a folder"):
        open_source(data)


# -- the choice of images --------------------------------------------------------------------------


def test_asking_for_too_much_is_told(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 3}, {"a": 1})
    with pytest.raises(ConfigError, match=r"data.train_images asks for 4 images, .* has 3"):
        resolve(config(tmp_path, train_images=4))
    with pytest.raises(ConfigError, match=r"data.val_images asks for 2 images, .* has 1"):
        open_source(config(tmp_path, val_images=2))
    with pytest.raises(ConfigError, match=r"data.num_classes is 2, .* has 1 classes"):
        resolve(config(tmp_path, num_classes=2))


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 12))
def test_a_smaller_choice_is_part_of_a_larger_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, some: int, more: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "choice"
    if not root.exists():
        image_folder(root, {"a": 7, "b": 5}, {"a": 1})
    whole = open_source(config(root))
    position = {whole.image("train", i).tobytes(): i for i in range(12)}

    def chosen(count: int) -> list[int]:
        source = open_source(config(root, seed=seed, train_images=count))
        assert source.count("train") == count
        found = [position[source.image("train", i).tobytes()] for i in range(count)]
        assert [source.label("train", i) for i in range(count)] == [whole.label("train", i) for i in found]
        return found

    few, many = chosen(min(some, more)), chosen(max(some, more))
    assert set(few) <= set(many)
    assert many == sorted(set(many))


def test_a_choice_depends_on_the_seed(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 30}, {"a": 1})
    chosen = {
        tuple(s.image("train", i).tobytes() for i in range(5))
        for s in (open_source(config(tmp_path, seed=seed, train_images=5)) for seed in range(4))
    }
    assert len(chosen) == 4


# -- parquet ---------------------------------------------------------------------------------------


def test_parquet_rows_over_files_and_row_groups(tmp_path: Path) -> None:
    names = ["cat", "dog", "bird"]
    parquet_file(
        tmp_path / "train-00000-of-00002.parquet", list(range(10)), [i % 3 for i in range(10)], names
    )
    parquet_file(tmp_path / "train-00001-of-00002.parquet", list(range(10, 15)), [2] * 5, names)
    parquet_file(tmp_path / "test.parquet", [90, 91], [0, 1], names)
    data = config(tmp_path, "parquet")
    known = resolve(data)
    assert (known.train_images, known.val_images, known.num_classes) == (15, 2, 3)
    source = open_source(data)
    assert source.class_names == ("cat", "dog", "bird")
    for i in np.random.default_rng(0).permutation(15).tolist():
        assert source.image("train", i).tobytes() == picture(i).tobytes()
        assert source.label("train", i) == (i % 3 if i < 10 else 2)
    assert source.image("val", 1).tobytes() == picture(91).tobytes()


def test_parquet_reads_only_the_row_groups_asked_for_and_keeps_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_file(tmp_path / "train.parquet", list(range(40)), [0] * 40, ["a"], group=4)
    parquet_file(tmp_path / "test.parquet", [90], [0], ["a"])
    monkeypatch.setattr(parquet, "CACHE_BYTES", 2 * 3 * 4 * len(png(0)))  # about three row groups
    source = ParquetImages(str(tmp_path))
    rows = source._splits["train"]
    read: list[int] = []
    original = rows._read
    monkeypatch.setattr(rows, "_read", lambda number, group: (read.append(group), original(number, group))[1])
    source.image("train", 21)
    assert read == [5]
    for i in range(40):
        source.image("train", i)
        assert len(rows._kept) <= 3
    source.image("train", 33)
    assert read == [5, *range(10)]  # in order each group once, and a recent one not again


def test_parquet_without_metadata_finds_columns_by_name_and_type(tmp_path: Path) -> None:
    for split, keys in (("train", [0, 1]), ("validation", [2])):
        table = pa.table(
            {
                "id": pa.array(keys, pa.int64()),
                "picture": pa.array([png(k) for k in keys], pa.binary()),
                "label": pa.array([4 * (k % 2) for k in keys], pa.int32()),
            }
        )
        pq.write_table(table, tmp_path / f"{split}-x.parquet")
    source = open_source(config(tmp_path, "parquet"))
    assert source.num_classes == 5
    assert source.class_names == ("0", "1", "2", "3", "4")
    assert source.image("val", 0).tobytes() == picture(2).tobytes()


def test_a_validation_file_is_preferred_to_a_test_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, split in enumerate(("train", "test", "validation")):
        parquet_file(tmp_path / "data" / f"{split}.parquet", [number], [0])
    assert open_source(config(tmp_path, "parquet")).image("val", 0).tobytes() == picture(2).tobytes()


def test_unreadable_parquet_rows_are_named(tmp_path: Path) -> None:
    images = pa.array([{"bytes": None, "path": "x.png"}, {"bytes": b"junk", "path": None}])
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": images, "label": [0, 0]}), tmp_path / f"{split}.parquet")
    source = open_source(config(tmp_path, "parquet"))
    with pytest.raises(UnreadableImageError, match=r"train.parquet, row 0: no image bytes"):
        source.image("train", 0)
    with pytest.raises(UnreadableImageError, match=r"train.parquet, row 1: cannot identify"):
        source.image("train", 1)


def test_what_is_wrong_with_parquet_files_is_told(tmp_path: Path) -> None:
    data = config(tmp_path, "parquet")
    with pytest.raises(ConfigError, match=r"no train files \(expected train\*\.parquet\)"):
        resolve(data)
    parquet_file(tmp_path / "train.parquet", [0], [0])
    with pytest.raises(ConfigError, match=r"no val files"):
        resolve(data)
    (tmp_path / "test.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match=r"test.parquet: not a readable parquet file"):
        resolve(data)
    pq.write_table(pa.table({"a": [1.5], "label": [0]}), tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"one image column .* found none among the columns a, label"):
        resolve(data)
    pq.write_table(pa.table({"img": [b"x"], "m": [0], "n": [0]}), tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"labels .* found m, n among the columns img, m, n"):
        resolve(data)
    pq.write_table(pa.table({"img": [b"x"], "label": [-1]}), tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"negative labels"):
        resolve(data)
    parquet_file(tmp_path / "train.parquet", [0], [0], ["a"])
    parquet_file(tmp_path / "test.parquet", [0], [0], ["b"])
    with pytest.raises(ConfigError, match=r"name different classes"):
        resolve(data)
    parquet_file(tmp_path / "test.parquet", [0], [7], ["a"])
    with pytest.raises(ConfigError, match=r"test.parquet, row 0: label 7 is not one of 0 to 0"):
        open_source(data).label("val", 0)


def test_the_parquet_fingerprint_is_of_contents_not_of_the_place(tmp_path: Path) -> None:
    prints = []
    for place, keys in (("one", [0, 1]), ("two", [0, 1]), ("three", [0, 2])):
        (tmp_path / place).mkdir()
        parquet_file(tmp_path / place / "train.parquet", keys, [0, 0])
        parquet_file(tmp_path / place / "test.parquet", [5], [0])
        prints.append(open_source(config(tmp_path / place, "parquet")).fingerprint())
    assert prints[0] == prints[1] != prints[2]


# -- hub -------------------------------------------------------------------------------------------


class ClassLabel:
    """Stands for the library's feature of this name."""

    names = ("no", "yes")


class FakeImage:
    """Stands for the library's ``Image`` feature."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


FakeImage.__name__ = "Image"


class Rows:
    """Stands for a loaded split of the library."""

    def __init__(self, keys: list[int], undecoded: bool = False) -> None:
        self.keys, self.undecoded = keys, undecoded
        self.features = {"pic": FakeImage(), "label": ClassLabel()}

    def __len__(self) -> int:
        return len(self.keys)

    def select_columns(self, columns: list[str]) -> Rows:
        assert columns == ["pic", "label"]
        return self

    def cast_column(self, name: str, feature: FakeImage) -> Rows:
        assert name == "pic"
        return Rows(self.keys, undecoded=not feature.decode)

    def __getitem__(self, key: int | str) -> Any:
        if key == "label":
            return [k % 2 for k in self.keys]
        assert self.undecoded, "images must come compressed"
        assert isinstance(key, int)
        broken = self.keys[key] < 0
        return {"pic": {"bytes": b"junk" if broken else png(self.keys[key]), "path": None}}


def fake_library(splits: dict[str, list[int]], described: bool = True) -> types.ModuleType:
    """A module with the part of ``datasets`` that is used."""
    library = types.ModuleType("datasets")
    loaded: list[tuple[str, str | None, str | None]] = []

    def load_dataset_builder(name: str, config: str | None) -> Any:
        if name != "owner/set":
            raise ConnectionError(f"Couldn't reach '{name}'\non the Hub (offline)")
        info = types.SimpleNamespace(splits=None, features=None)
        if described:
            info.splits = {k: types.SimpleNamespace(num_examples=len(v)) for k, v in splits.items()}
            info.features = Rows([]).features
        return types.SimpleNamespace(info=info)

    def load_dataset(name: str, config: str | None, split: str | None = None) -> Any:
        loaded.append((name, config, split))
        return {k: Rows(v) for k, v in splits.items()} if split is None else Rows(splits[split])

    vars(library).update(
        Image=FakeImage, load_dataset=load_dataset, load_dataset_builder=load_dataset_builder, loaded=loaded
    )
    return library


def hub(name: str = "owner/set") -> DataConfig:
    """A data set of the hub."""
    return DataConfig(source="hf", name=name, resolution=16)


@pytest.mark.parametrize("described", [True, False])
def test_a_hub_set_is_counted_then_read_undecoded(monkeypatch: pytest.MonkeyPatch, described: bool) -> None:
    library = fake_library({"train": [0, 1, 2, -1], "test": [8, 9]}, described)
    monkeypatch.setitem(sys.modules, "datasets", library)
    known = resolve(hub("owner/set:small"))
    assert (known.train_images, known.val_images, known.num_classes) == (4, 2, 2)
    assert vars(library)["loaded"] == ([] if described else [("owner/set", "small", None)])
    source = open_source(hub("owner/set:small"))
    assert source.class_names == ("no", "yes")
    assert source.image("train", 2).tobytes() == picture(2).tobytes()
    assert [source.label("val", i) for i in range(2)] == [0, 1]
    assert ("owner/set", "small", "test") in vars(library)["loaded"]
    with pytest.raises(UnreadableImageError, match="owner/set, train row 3: cannot identify"):
        source.image("train", 3)
    assert source.fingerprint() != open_source(hub()).fingerprint()


def test_what_is_wrong_with_a_hub_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the datasets library: pip install 'varscale\[data\]'"):
        resolve(hub())
    monkeypatch.setitem(sys.modules, "datasets", fake_library({"train": [1]}))
    with pytest.raises(ConfigError, match=r"no val images .* found train\)"):
        resolve(hub())
    with pytest.raises(
        ConfigError, match=r"could not get 'owner/typo' from the hub: ConnectionError"
    ) as raised:
        resolve(hub("owner/typo"))
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(
        Rows, "__init__", lambda self, keys: setattr(self, "features", {"text": ClassLabel()})
    )
    with pytest.raises(ConfigError, match=r"expected one Image column .* found text \(ClassLabel\)"):
        resolve(hub())


# -- all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_picture_becomes_rgb(mode: str) -> None:
    stream = io.BytesIO()
    picture(0).convert(mode).save(stream, "TIFF" if mode == "CMYK" else "PNG")
    assert decode(stream.getvalue(), "x").mode == "RGB"


def test_a_decompression_bomb_is_an_unreadable_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UnreadableImageError, match="bomb"):
        decode(png(0), "bomb.png")


def test_counting_imports_no_torch_and_no_big_library(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1}, {"a": 1})
    code = (
        "import sys; from scaling.config import DataConfig; from scaling.data.sources import resolve\n"
        f"resolve(DataConfig()); resolve(DataConfig(source='folder', path={str(tmp_path)!r}))\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'skimage', 'sklearn', 'pyarrow', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPOSITORY).returncode == 0


needs_shared_data = pytest.mark.skipif(
    not (SHARED / "data").is_dir(),
    reason=f"the real images are not at {SHARED / 'data'} (set VARSCALE_SHARED)",
)


@pytest.mark.reference
@needs_shared_data
def test_real_imagenet_sample_and_cifar10() -> None:
    sample = resolve(config(SHARED / "data" / "imagenet-sample"))
    assert (sample.train_images, sample.val_images, sample.num_classes) == (800, 200, 1000)
    image = open_source(sample).image("val", 100)
    assert image.mode == "RGB"
    assert min(image.size) > 100
    cifar = config(SHARED / "data" / "cifar10", "parquet")
    known = dataclasses.replace(cifar, train_images=50000, val_images=10000, num_classes=10)
    assert resolve(cifar) == known
    source = open_source(cifar)
    assert source.class_names[:2] == ("airplane", "automobile")
    assert source.image("train", 49999).size == (32, 32)
    assert np.bincount([source.label("val", i) for i in range(10000)]).tolist() == [1000] * 10
