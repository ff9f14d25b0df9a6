"""Any image data set of the Hugging Face hub, by name, through the ``datasets`` library (extra ``data``).

- Nothing of the library is imported before such a set is asked for. Counting reads the set's
  description; the images come to the library's own cache at the first one asked for.
- ``name`` is the hub's, with the configuration after a colon where a set has several: ``owner/set:config``.
- Images are read compressed from the library's memory map and decoded here, so that one broken image
  is a named, skipped image as in every other source.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from scaling.data.images import Skipped, Split, UnreadableImageError, decode
from scaling.schema import ConfigError

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("validation", "valid", "val", "test"),
}


class HubImages:
    """A data set of the hub as an ``ImageSource``.

    Raises:
        ConfigError: the extra is not installed; the hub cannot be reached or has no such set; the set
            lacks a split, an image column or a column of class labels.
    """

    def __init__(self, name: str) -> None:
        self.skipped = Skipped()
        self._name, _, config = name.partition(":")
        self._config = config or None
        try:
            self._library: Any = importlib.import_module("datasets")
        except ImportError as error:
            raise ConfigError(
                "data.source 'hf' needs the datasets library: pip install 'varscale[data]'"
            ) from error
        info = self._ask(lambda: self._library.load_dataset_builder(self._name, self._config)).info
        if not info.splits or not info.features:  # a set without a description: only the data can tell
            loaded = self._ask(lambda: self._library.load_dataset(self._name, self._config))
            features, counts = next(iter(loaded.values())).features, {k: len(v) for k, v in loaded.items()}
        else:
            features, counts = info.features, {k: v.num_examples for k, v in info.splits.items()}
        self._columns(features)
        self._split_names = {split: self._split_name(split, counts) for split in SPLIT_NAMES}
        self._counts = {split: int(counts[name]) for split, name in self._split_names.items()}
        self._loaded: dict[Split, Any] = {}
        self._labels: dict[Split, list[int]] = {}
        self._guard = threading.Lock()

    def _columns(self, features: Any) -> None:
        kinds = {column: type(feature).__name__ for column, feature in features.items()}
        images = [column for column, kind in kinds.items() if kind == "Image"]
        labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
        if len(images) != 1 or not labels:
            raise ConfigError(
                f"data.name: {self._name}: expected one Image column and a ClassLabel column, found "
                + ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
            )
        self._image_column = images[0]
        self._label_column = "label" if "label" in labels else labels[0]
        self._class_names = tuple(map(str, features[self._label_column].names))

    def _split_name(self, split: Split, counts: dict[str, int]) -> str:
        for name in SPLIT_NAMES[split]:
            if counts.get(name):
                return name
        raise ConfigError(
            f"data.name: {self._name} has no {split} images (expected a split called "
            f"{' or '.join(SPLIT_NAMES[split])}, found {', '.join(counts)})"
        )

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        # The library, the hub's client and its transport each have errors of their own, and they change.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"data.name: could not get '{self._name}' from the hub: {type(error).__name__}: {reason}"
            ) from error

    @property
    def num_classes(self) -> int:
        """Names of the label column's classes."""
        return len(self._class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """As the set's features give them."""
        return self._class_names

    def count(self, split: Split) -> int:
        """Rows of the split; a test split stands in for a missing validation split."""
        return self._counts[split]

    def label(self, split: Split, i: int) -> int:
        """The value of the label column."""
        self._load(split)
        value = self._labels[split][i]
        if not 0 <= value < self.num_classes:
            raise ConfigError(
                f"data.name: {self._name}: {self._split_names[split]} row {i} has label {value}, "
                f"not one of 0 to {self.num_classes - 1}"
            )
        return value

    def image(self, split: Split, i: int) -> Image.Image:
        """The row's image in RGB."""
        rows, name = self._load(split), f"{self._name}, {self._split_names[split]} row {i}"
        value = rows[i][self._image_column]
        content = value and (value["bytes"] or (value["path"] and Path(value["path"])))
        if not content:
            raise UnreadableImageError(f"{name}: no image bytes in the row")
        return decode(content, name)

    def fingerprint(self) -> str:
        """Of the name, the configuration, the counts and the classes."""
        known = [self._name, self._config, self._split_names, self._counts, self._class_names]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def _load(self, split: Split) -> Any:
        with self._guard:
            if split not in self._loaded:
                rows = self._ask(
                    lambda: self._library.load_dataset(
                        self._name, self._config, split=self._split_names[split]
                    )
                )
                if len(rows) != self._counts[split]:
                    raise ConfigError(
                        f"data.name: {self._name} says it has {self._counts[split]} {split} images, "
                        f"{len(rows)} came"
                    )
                rows = rows.select_columns([self._image_column, self._label_column])
                self._labels[split] = [int(v) for v in rows[self._label_column]]
                self._loaded[split] = rows.cast_column(self._image_column, self._library.Image(decode=False))
            return self._loaded[split]
