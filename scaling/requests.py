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
    """The folder of all sweeps, where WHERE is a sweep."""
    name: str | None = None
    """The sweep's folder under the root; by default the recipe's name."""
    depth: int | None = None
    """Which run of a sweep."""
    family: str | None = None
    """Which family of a sweep that has several."""
    tokenizer: str | None = None
    """The tokenizer of a published checkpoint."""
    task: Task | None = None
    """inpaint: paint the mask or the box; outpaint: paint all but the box; class: paint the box as another
    class; refine: draw the image at twice its size; expand: continue it to a larger canvas. Needed; the last
    two are for flexvar and flexvar-mamba."""
    mask: str | None = None
    """A picture of the image's size, white where it is to be painted and black elsewhere."""
    box: tuple[float, ...] | None = None
    """Instead of a mask: left, upper, right and lower edge, in pixels of the image or all as fractions of it."""
    class_: int | None = None
    """The class to draw. By default none, as published; needed by the task 'class'."""
    cfg: float = 1.5
    """Classifier-free guidance towards the class; without a class there is nothing to guide to."""
    cfg_form: Literal["ramp", "constant"] = "ramp"
    """Guidance rises over the steps (ramp), or is the same at all."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 from all."""
    top_p: float = 0.0
    """Draw from the most likely tokens with this probability together; 0 from all."""
    count: int = 4
    """Number of candidates."""
    seed: int = 0
    """The same seed draws the same candidates; each further one has the next seed."""
    batch: int = 16
    """Candidates drawn at once; it does not change them."""
    scales: tuple[int, ...] | None = None
    """Side lengths of the steps in tokens, of the shorter side where the picture is not square; for flexvar and
    flexvar-mamba. By default the model's own."""
    size: str | None = None
    """Height x width of the result in pixels, such as 32x48, for flexvar and flexvar-mamba: by default the
    model's resolution, and twice the image for the task 'refine'. Needed by the task 'expand'."""
    peek: bool = False
    """Let the kept tokens see what is under the mask, as in the published notebook. By default it is replaced
    by a smooth continuation first, and nothing of it can come back."""
    paste: bool = True
    """Paste the known pixels of the image into the result; otherwise they are as the tokenizer makes them."""
    feather: int | None = None
    """Width in pixels of the seam where pasted pixels fade into painted ones; by default a quarter of a token."""
    out: str | None = None
    """The folder of the pictures; by default edit-<image>-<task>-<settings> in the run's folder, or here."""

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
                len(given) == 1, f"--task {self.task} needs --mask or --box, got {' and '.join(given) or 'none'}"
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
