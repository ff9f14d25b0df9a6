"""Small image sets and a stand-in tokenizer for the tests of ``scaling.data``."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from scaling.data.images import Skipped, Split, UnreadableImageError
from scaling.data.shards import UInt16
from scaling.data.transforms import UInt8

SCALES = (1, 2, 3)
SEQ_LEN, VOCAB = 14, 50


def picture(key: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """Noise that depends on ``key`` alone; ``size`` is width and height."""
    noise = np.random.default_rng(key).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(key: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """``picture`` as a PNG file's bytes."""
    stream = io.BytesIO()
    picture(key, size).save(stream, "PNG")
    return stream.getvalue()


def image_folder(root: Path, train: dict[str, int], val: dict[str, int]) -> Path:
    """ImageNet's layout with so many images per class; image contents are numbered through."""
    key = 0
    for split, classes in (("train", train), ("val", val)):
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{name}_{i:03d}.png").write_bytes(png(key))
                key += 1
    return root


def parquet_file(
    path: Path, keys: list[int], labels: list[int], classes: list[str] | None = None, group: int = 4
) -> None:
    """Hugging Face's layout: ``img`` {bytes, path}, ``label``, and the features if ``classes`` are given."""
    images = pa.array([{"bytes": png(key), "path": None} for key in keys], IMAGE_TYPE)
    table = pa.table({"img": images, "label": pa.array(labels, pa.int64())})
    if classes is not None:
        features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": classes}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)


IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class NoiseSource:
    """Images of noise, ``count`` per split, of which some cannot be read."""

    num_classes = 3
    class_names = ("a", "b", "c")

    def __init__(self, train: int, val: int, broken: frozenset[tuple[Split, int]] = frozenset()) -> None:
        self.skipped = Skipped()
        self.counts: dict[Split, int] = {"train": train, "val": val}
        self.broken = broken

    def count(self, split: Split) -> int:
        return self.counts[split]

    def label(self, split: Split, i: int) -> int:
        return i % 3

    def image(self, split: Split, i: int) -> Image.Image:
        if (split, i) in self.broken:
            raise UnreadableImageError(f"{split}/{i}.png: broken on purpose")
        return picture(i + 10_000 * (split == "val"))

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.counts).encode()).hexdigest()


def tokenize(images: UInt8) -> UInt16:
    """Token ids that depend on every pixel of the image and on nothing else."""
    rows = [hashlib.blake2b(image.tobytes(), digest_size=2 * SEQ_LEN).digest() for image in images]
    return np.stack([np.frombuffer(row, "<u2") % VOCAB for row in rows]).astype(np.uint16)
