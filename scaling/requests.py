"""What the command line asks of a model: the options of each command that opens one. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scaling.config import Device, Precision, require


@dataclass(frozen=True)
class ConvertRequest:
    """Options of ``convert``."""

    to: Literal["varscale", "published"] | None = None
    """varscale: a published file to a folder of this project (safetensors and JSON); published: a model or
    tokenizer of this project to a state dict that the published code loads. Needed."""
    out: str | None = None
    """The folder (varscale), or the file, .pth or .safetensors (published). Needed."""
    part: Literal["transformer", "tokenizer"] | None = None
    """Which of the two, where a training checkpoint holds both; by default the transformer."""
    scales: tuple[int, ...] | None = None
    """Side lengths of the token maps, where the file does not tell them; of a tokenizer, which does not,
    VAR's for 256 px and all up to 16 for FlexVAR's by default."""


@dataclass(frozen=True)
class DataChoice:
    """Validation images other than a run's own; a published checkpoint has none of its own."""

    source: Literal["photos", "folder", "parquet", "hf"] | None = None
    """As data.source of a recipe. By default the run's own."""
    path: str | None = None
    """Where they lie; alone: where a run's own images lie now."""
    name: str | None = None
    """hf: the data set's name on the hub."""
    crop_margin: float | None = None
    """The shorter side is resized to this times the resolution before the centre crop; 1.125 by default."""


@dataclass(frozen=True)
class EvaluateRequest:
    """Options of ``evaluate``."""

    tokenizer: str | None = None
    """The tokenizer: a tokenizer run's folder, or a published file by path or hub name; a run finds
    its own."""
    scales: tuple[int, ...] | None = None
    """Side lengths of a published model's steps, where the file does not tell them."""
    data: DataChoice = DataChoice()
    images: int | None = None
    """Evaluate so many of the validation images, spread evenly; by default all, or as many as the run did."""
    batch: int | None = None
    """Images per forward pass; it changes the result by rounding. By default the run's, else 64."""
    precision: Precision | None = None
    """By default the run's, and fp32 for published checkpoints."""
    device: Device = "auto"
    threads: int | None = None
    """CPU threads; by default the run's, else all cores."""
    json: bool = False
    """Print JSON instead of a table."""
    into: str | None = None
    """A sweep's folder: write the result there as a finished run, marked as imported, so that it is a point
    of the sweep's laws. Of published checkpoints; what training took is given below, and known for the
    published names (var_d16, …)."""
    epochs: float | None = None
    """With --into: epochs that the checkpoint was trained for."""
    train_images: int | None = None
    """With --into: images of an epoch."""
    train_batch: int | None = None
    """With --into: images per optimiser step."""

    def __post_init__(self) -> None:
        for name in ("images", "batch", "threads", "train_images", "train_batch"):
            value = getattr(self, name)
            flag = "--" + name.replace("_", "-")
            require(value is None or value >= 1, f"{flag} must be at least 1, got {value}")
        require(self.epochs is None or self.epochs > 0, f"--epochs must be positive, got {self.epochs}")
        for name in ("epochs", "train_images", "train_batch"):
            flag = "--" + name.replace("_", "-")
            require(getattr(self, name) is None or self.into is not None, f"{flag} is for --into SWEEP")
