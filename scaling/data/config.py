"""Which images a study is of. No torch; import it from ``scaling.config``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scaling.schema import require


@dataclass(frozen=True)
class DataConfig:
    """An image set. ``None`` counts are filled in from the data before a run is planned."""

    source: Literal["photos", "folder", "parquet", "hf"] = "photos"
    """photos: ships with the dependencies; folder: train/<class>/*, val/<class>/*; parquet: train*.parquet
    and test or val*.parquet; hf: a data set of the hub, by name."""
    path: str | None = field(default=None, metadata={"identity": False})
    """Where it lies (folder, parquet). Not part of the run's identity: the same data may be moved."""
    name: str | None = None
    """hf: the data set's name on the hub. folder and parquet: any label; it tells data sets of equal counts
    apart, since where data lies is no part of what it is."""
    resolution: int = 32
    """Side of the square images, in pixels."""
    train_images: int | None = None
    """How many training images are used (the first of a seeded shuffle when fewer than there are)."""
    val_images: int | None = None
    """How many validation images are used."""
    num_classes: int | None = None
    views: int = 1
    """Random crops cached per training image; epoch e trains on view e mod views."""
    flip: bool = False
    """Flip each cached view with probability 1/2 (the published code does not)."""
    crop_margin: float = 1.125
    """The shorter side is resized to this times the resolution before cropping (VAR's)."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.resolution > 0, f"data.resolution must be positive, got {self.resolution}")
        require(self.views >= 1, f"data.views must be at least 1, got {self.views}")
        require(self.crop_margin >= 1.0, f"data.crop_margin must be at least 1, got {self.crop_margin}")
        require(self.seed >= 0, f"data.seed must not be negative, got {self.seed}")
        for name in ("train_images", "val_images", "num_classes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name} must be positive, got {value}")
        if self.source in ("folder", "parquet"):
            require(self.path is not None, f"data.path is needed for data.source '{self.source}'")
        if self.source == "hf":
            require(
                self.name is not None, "data.name (the data set's name on the hub) is needed for source 'hf'"
            )
