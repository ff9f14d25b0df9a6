"""Hugging Face's image layout in parquet files: an image column (bytes, or a struct of bytes and path)
and a column of whole-number labels.

- Files: ``train*.parquet`` and ``val*.parquet``, ``valid*.parquet`` or else ``test*.parquet`` in the
  folder or in its ``data`` folder, or the same words as folders of parquet files.
- Columns and class names come from the schema's ``huggingface`` metadata if it is there, else from the
  columns' names and types; what is ambiguous is an error that lists the columns.
- Images stay compressed. Row groups are read when an image in them is asked for, and the last ones are
  kept within a budget; reading in order touches each once. Random access (stage 1) to a set larger
  than the budget reads a row group per image: unpack such a set into a folder.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from scaling.data.images import Skipped, Split, UnreadableImageError, decode
from scaling.schema import ConfigError

PREFIXES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("validation", "valid", "val", "test")}
"""In the order of preference: a test split stands in for a missing validation split."""
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "cls")
CACHE_BYTES = 512 * 2**20
"""Compressed images kept in memory, over both splits half each."""


class ParquetImages:
    """Parquet files as an ``ImageSource``.

    Raises:
        ConfigError: no such folder, a split without files or rows, columns that are not found.
    """

    def __init__(self, path: str) -> None:
        self.skipped = Skipped()
        self._splits = {split: _Rows(_find(Path(path), split)) for split in PREFIXES}
        names = {split: rows.class_names for split, rows in self._splits.items()}
        if names["train"] != names["val"]:
            raise ConfigError(f"data.path: {path}: train and val name different classes in their schemas")
        self._names = names["train"] or _numbered(path, [rows.labels() for rows in self._splits.values()])

    @property
    def num_classes(self) -> int:
        """Named classes, else the largest label of both splits + 1."""
        return len(self._names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """From the schema's metadata, else the numbers."""
        return self._names

    def count(self, split: Split) -> int:
        """Rows of the split's files."""
        return self._splits[split].count

    def label(self, split: Split, i: int) -> int:
        """The value of the label column."""
        rows = self._splits[split]
        value = int(rows.labels()[i])
        if not 0 <= value < self.num_classes:
            raise ConfigError(f"{rows.name(i)}: label {value} is not one of 0 to {self.num_classes - 1}")
        return value

    def image(self, split: Split, i: int) -> Image.Image:
        """The row's image in RGB."""
        rows = self._splits[split]
        content = rows.content(i)
        if not content:
            raise UnreadableImageError(f"{rows.name(i)}: no image bytes in the row")
        return decode(content, rows.name(i))

    def fingerprint(self) -> str:
        """Of the files' names, sizes and footers (which hold the statistics and sizes of every column)."""
        digest = hashlib.sha256()
        for rows in self._splits.values():
            for file in rows.files:
                footer = file.metadata
                digest.update(f"{file.name}\0{file.path.stat().st_size}\0{footer.serialized_size}\n".encode())
                digest.update(json.dumps(footer.to_dict(), sort_keys=True, default=str).encode())
        return digest.hexdigest()


class _File:
    """One parquet file: its footer, and where its row groups begin."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        try:
            self.reader = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{path}: not a readable parquet file ({error})") from error
        self.metadata = self.reader.metadata
        self.schema = self.reader.schema_arrow
        sizes = [self.metadata.row_group(g).num_rows for g in range(self.metadata.num_row_groups)]
        self.starts = [0, *np.cumsum(sizes).tolist()]


class _Rows:
    """The files of one split, as one sequence of rows."""

    def __init__(self, paths: list[Path]) -> None:
        self.files = [_File(path) for path in paths]
        schema = self.files[0].schema
        features = _features(schema)
        self.image_column = _image_column(paths[0], schema, features)
        self.label_column = _label_column(paths[0], schema, features)
        self.class_names = tuple(map(str, features.get(self.label_column, {}).get("names") or ()))
        for file in self.files:
            missing = {self.image_column, self.label_column} - set(file.schema.names)
            if missing:
                raise ConfigError(f"{file.path}: no column '{missing.pop()}', which {paths[0].name} has")
        self._starts = [0, *np.cumsum([file.starts[-1] for file in self.files]).tolist()]
        self.count = int(self._starts[-1])
        if self.count == 0:
            raise ConfigError(f"{paths[0]}: no rows")
        self._labels: np.ndarray | None = None
        self._kept: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()
        self._guard = threading.Lock()

    def labels(self) -> np.ndarray:
        """The label column, int64 (count,); read once."""
        with self._guard:
            if self._labels is None:
                columns = [f.reader.read(columns=[self.label_column]).column(0) for f in self.files]
                if any(column.null_count for column in columns):
                    raise ConfigError(
                        f"{self.files[0].path}: column '{self.label_column}' has rows without label"
                    )
                self._labels = np.concatenate([np.asarray(column, dtype=np.int64) for column in columns])
            return self._labels

    def content(self, i: int) -> bytes | None:
        """The compressed image of row ``i``."""
        number, group, row = self._place(i)
        with self._guard:  # a parquet reader is not for several threads at once
            images = self._kept.pop((number, group), None)
            if images is None:
                images = self._read(number, group)
            self._kept[number, group] = images
            while len(self._kept) > 1 and sum(a.nbytes for a in self._kept.values()) > CACHE_BYTES // 2:
                self._kept.popitem(last=False)
        value: bytes | None = images[row].as_py()
        return value

    def name(self, i: int) -> str:
        """How to call row ``i`` in a message."""
        number, group, row = self._place(i)
        file = self.files[number]
        return f"{file.path}, row {file.starts[group] + row}"

    def _place(self, i: int) -> tuple[int, int, int]:
        """File, row group in it, row in that."""
        number = bisect.bisect_right(self._starts, i) - 1
        within = i - self._starts[number]
        starts = self.files[number].starts
        group = bisect.bisect_right(starts, within) - 1
        return number, group, within - starts[group]

    def _read(self, number: int, group: int) -> pa.Array:
        file = self.files[number]
        try:
            table = file.reader.read_row_group(group, columns=[self.image_column], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise UnreadableImageError(f"{file.path}, row group {group}: {error}") from error
        column = table.column(0).combine_chunks()
        if pa.types.is_struct(column.type):
            column = column.field("bytes")
        return column


def _find(root: Path, split: Split) -> list[Path]:
    if not root.is_dir():
        raise ConfigError(
            f"data.path: {root} is not a folder (expected train*.parquet and val or test*.parquet)"
        )
    for prefix in PREFIXES[split]:
        for pattern in (f"{prefix}*.parquet", f"data/{prefix}*.parquet", f"{prefix}/*.parquet"):
            found = sorted(root.glob(pattern))
            if found:
                return found
    wanted = " or ".join(f"{prefix}*.parquet" for prefix in PREFIXES[split])
    raise ConfigError(f"data.path: {root} has no {split} files (expected {wanted})")


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """The columns' descriptions that Hugging Face leaves in the schema; empty without them."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    found = json.loads(raw).get("info", {}).get("features", {})
    return {name: dict(value) for name, value in found.items() if isinstance(value, Mapping)}


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_column(path: Path, schema: pa.Schema, features: dict[str, dict[str, Any]]) -> str:
    named = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    found = named or [field.name for field in schema if _holds_images(field.type)]
    if len(found) != 1:
        raise ConfigError(
            f"{path}: expected one image column (bytes, or a struct with bytes), found "
            f"{', '.join(found) or 'none'} among the columns {', '.join(schema.names)}"
        )
    return str(found[0])


def _label_column(path: Path, schema: pa.Schema, features: dict[str, dict[str, Any]]) -> str:
    whole = [field.name for field in schema if pa.types.is_integer(field.type)]
    classes = [name for name in whole if features.get(name, {}).get("_type") == "ClassLabel"]
    candidates = classes or whole
    for name in LABEL_NAMES:
        if name in candidates:
            return name
    if len(candidates) != 1:
        raise ConfigError(
            f"{path}: expected one column of whole-number labels (called {', '.join(LABEL_NAMES)}), found "
            f"{', '.join(candidates) or 'none'} among the columns {', '.join(schema.names)}"
        )
    return str(candidates[0])


def _numbered(path: str, labels: list[np.ndarray]) -> tuple[str, ...]:
    if min(int(values.min()) for values in labels) < 0:
        raise ConfigError(f"data.path: {path} has negative labels (unlabelled images cannot be used)")
    return tuple(str(i) for i in range(1 + max(int(values.max()) for values in labels)))
