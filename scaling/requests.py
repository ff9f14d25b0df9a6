"""What the command line asks of a model: options of the commands that draw, checked without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from scaling.config import ConfigError, require

Task = Literal["inpaint", "outpaint", "class", "refine", "expand"]
PAINTED: tuple[Task, ...] = ("inpaint", "outpaint", "class")
"""Tasks that paint within the image, where a mask or a box says."""


@dataclass(frozen=True)
class EditRequest:
    """Options of ``edit``."""

    root: str = "runs"
    """The folder of all sweeps, where WHERE is a recipe."""
    name: str | None = None
    """The sweep's folder under the root; by default the recipe's name."""
    depth: int | None = None
    """Which run of a sweep."""
    family: str | None = None
    """Which family of a sweep that has several."""
    tokenizer: str | None = None
    """The tokenizer of a published checkpoint."""
    task: Task | None = None
    """Needed. Paint the mask or box (inpaint), all but the box (outpaint), the box as another class (class);
    draw the image at twice its size (refine), continue it to a larger canvas (expand)."""
    mask: str | None = None
    """A picture of the image's size, white where it is painted and black elsewhere."""
    box: tuple[float, ...] | None = None
    """Instead: left, upper, right and lower edge, in pixels of the image or all as fractions of it."""
    class_: int | None = None
    """The class to draw; by default none, as published."""
    cfg: float = 1.5
    """Classifier-free guidance towards the class."""
    cfg_form: Literal["ramp", "constant"] = "ramp"
    """Guidance rises over the steps, or is the same at all."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 from all."""
    top_p: float = 0.0
    """Draw from the most likely tokens with this probability together; 0 from all."""
    count: int = 4
    """Number of candidates."""
    seed: int = 0
    """The same seed draws the same candidate; each further one has the next."""
    batch: int = 16
    """Candidates drawn at once; it does not change them."""
    scales: tuple[int, ...] | None = None
    """Steps, as tokens on the shorter side; for flexvar and flexvar-mamba."""
    size: str | None = None
    """The result's height x width in pixels, such as 32x48; for flexvar and flexvar-mamba."""
    peek: bool = False
    """Kept tokens may tell of what is under the mask, as in the published notebook; by default it is
    replaced by a smooth continuation before the image is encoded."""
    paste: bool = True
    """Paste the image's known pixels into the result."""
    feather: int | None = None
    """Width in pixels of the seam between pasted and painted; by default a quarter of a token."""
    out: str | None = None
    """The folder of the pictures; by default edit-<settings> in the run's folder, or here."""

    def __post_init__(self) -> None:
        require(self.count >= 1, f"--count must be at least 1, got {self.count}")
        require(self.batch >= 1, f"--batch must be at least 1, got {self.batch}")
        require(self.seed >= 0, f"--seed must not be negative, got {self.seed}")
        require(self.cfg >= 0, f"--cfg must not be negative, got {self.cfg:g}")
        require(self.top_k >= 0, f"--top-k must not be negative, got {self.top_k}")
        require(0 <= self.top_p <= 1, f"--top-p must be 0 to 1, got {self.top_p:g}")
        require(
            self.feather is None or self.feather >= 0, f"--feather must not be negative, got {self.feather}"
        )
        if self.task is None:
            return
        given = [name for name in ("mask", "box") if getattr(self, name) is not None]
        if self.task in PAINTED:
            require(
                len(given) == 1,
                f"--task {self.task} needs --mask or --box, got {' and '.join(given) or 'none'}",
            )
        else:
            require(
                not given, f"--task {self.task} keeps the whole image; it takes no --{''.join(given[:1])}"
            )
        require(self.box is None or len(self.box) == 4, "--box takes four numbers: left upper right lower")
        require(self.task != "class" or self.class_ is not None, "--task class needs --class, what to draw")
        require(
            self.task != "expand" or self.size is not None, "--task expand needs --size, such as --size 32x48"
        )
        _ = self.pixels

    @property
    def chosen(self) -> Task:
        """The task.

        Raises:
            ConfigError: none was given.
        """
        if self.task is None:
            raise ConfigError(f"edit needs --task: {', '.join(get_args(Task))}")
        return self.task

    @property
    def pixels(self) -> tuple[int, int] | None:
        """``size`` as (height, width)."""
        if self.size is None:
            return None
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", self.size.strip().lower())
        if match is None:
            raise ConfigError(f"--size takes height x width in pixels, such as 32x48, got '{self.size}'")
        return int(match[1]), int(match[2])
