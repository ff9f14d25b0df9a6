"""What the command line asks of models and images: the options of each command that opens some, and what is
handed on to the jobs that it starts. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass
from typing import Literal, get_args

from scaling.config import ConfigError, DataConfig, Device, Precision, SamplingConfig, content_hash, require
from scaling.launch import DrawnIn

Task = Literal["inpaint", "outpaint", "class", "refine", "expand"]
PAINTED: tuple[Task, ...] = ("inpaint", "outpaint", "class")
"""Tasks that paint within the image, where a mask or a box says."""


@dataclass(frozen=True)
class ModelChoice:
    """Which model WHERE is, for commands that take a run's folder, a run of a sweep, or a checkpoint."""

    root: str = "runs"
    """The folder of all sweeps, where WHERE is a recipe."""
    name: str | None = None
    """The sweep's folder under the root; by default the recipe's name."""
    depth: int | None = None
    """Which run of a sweep."""
    family: str | None = None
    """Which family of a sweep that has several."""
    tokenizer: str | None = None
    """The tokenizer of a published checkpoint: a published file by path or hub name, or a tokenizer run's
    folder; a run finds its own."""


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
class EvaluateRequest(ModelChoice):
    """Options of ``evaluate``."""

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
    """auto is a GPU where there is one."""
    processes: int = 1
    """Processes (GPUs) that share the images; it changes the result by rounding."""
    threads: int | None = None
    """CPU threads per process; by default the run's, else all cores, and of several processes their share."""
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
        for name in ("images", "batch", "processes", "threads", "train_images", "train_batch"):
            value = getattr(self, name)
            flag = "--" + name.replace("_", "-")
            require(value is None or value >= 1, f"{flag} must be at least 1, got {value}")
        require(self.epochs is None or self.epochs > 0, f"--epochs must be positive, got {self.epochs}")
        for name in ("epochs", "train_images", "train_batch"):
            flag = "--" + name.replace("_", "-")
            require(getattr(self, name) is None or self.into is not None, f"{flag} is for --into SWEEP")


@dataclass(frozen=True)
class EvaluationJob:
    """What the job of ``evaluate`` reads."""

    where: str
    """A run's folder, or a checkpoint."""
    request: EvaluateRequest


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn, for every command that draws some."""

    seed: int = 0
    """The same seed draws the same picture, whatever the batch; each further picture has the next."""
    cfg: float = 1.5
    """Classifier-free guidance towards the class; 0 for none."""
    guidance_form: Literal["ramp", "constant"] = "ramp"
    """Guidance rises over the steps (VAR), or is the same at all (LlamaGen, whose cfg is 1 more)."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 from all."""
    top_p: float = 0.0
    """Draw from the most likely tokens with this probability together; 0 from all."""
    precision: DrawnIn = "fp32"
    """Of model and decoder. bf16 is faster, if the machine has it, and draws other, equally good pictures."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"--seed must not be negative, got {self.seed}")
        require(self.cfg >= 0, f"--cfg must not be negative, got {self.cfg:g}")
        require(self.top_k >= 0, f"--top-k must not be negative, got {self.top_k}")
        require(0 <= self.top_p <= 1, f"--top-p must be 0 to 1, got {self.top_p:g}")

    def sampling(self, images: int) -> SamplingConfig:
        """The part that decides pictures."""
        return SamplingConfig(
            images, self.cfg, self.guidance_form, self.top_k, self.top_p, self.seed, self.precision
        )


@dataclass(frozen=True)
class EditRequest(Drawing, ModelChoice):
    """Options of ``edit``."""

    task: Task | None = None
    """Needed. Paint the mask or box (inpaint), all but the box (outpaint), the box as another class (class);
    draw the image at twice its size (refine), continue it to a larger canvas (expand)."""
    mask: str | None = None
    """A picture of the image's size, white where it is painted and black elsewhere."""
    box: tuple[float, ...] | None = None
    """Instead: left, upper, right and lower edge, in pixels of the image or all as fractions of it."""
    class_: int | None = None
    """The class to draw; by default none, as published."""
    count: int = 4
    """Number of candidates."""
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
    device: Device = "auto"
    """auto is a GPU where there is one."""
    out: str | None = None
    """The folder of the pictures; by default edit-<settings> in the run's folder, or in edit-<model> here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.count >= 1, f"--count must be at least 1, got {self.count}")
        require(self.batch >= 1, f"--batch must be at least 1, got {self.batch}")
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
        require(
            not self.peek or self.task in PAINTED,
            f"--task {self.task} hides nothing of the image; it takes no --peek",
        )
        pasting = [
            f"--{name}" for name in ("paste", "feather") if getattr(self, name) != getattr(EditRequest, name)
        ]
        require(
            self.task != "refine" or not pasting,
            f"--task refine draws every pixel anew and pastes nothing; it takes no {' or '.join(pasting)}",
        )
        require(
            self.paste or self.feather is None,
            "--feather is the seam of what is pasted; it means nothing with --paste false",
        )
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


@dataclass(frozen=True)
class DrawChoice(Drawing):
    """How pictures are drawn, for commands that draw them from classes alone."""

    classes: tuple[int, ...] | None = None
    """Classes to draw, in turn; by default all."""
    batch: int = 16
    """Pictures drawn at once; it does not change them."""
    device: Device = "auto"
    """auto is a GPU where there is one."""
    out: str | None = None
    """Where to write; by default a name with the settings beside the model's own files, or here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch >= 1, f"--batch must be at least 1, got {self.batch}")
        require(self.classes is None or len(self.classes) > 0, "--classes needs at least one class")

    def known_classes(self, count: int) -> tuple[int, ...]:
        """The classes to draw, of a model that has ``count``.

        Raises:
            ConfigError: it has not all of them.
        """
        for label in self.classes or ():
            require(0 <= label < count, f"class {label} is not one of the model's {count} (0 to {count - 1})")
        return self.classes or tuple(range(count))


@dataclass(frozen=True)
class SampleRequest(DrawChoice, ModelChoice):
    """Options of ``sample``."""

    count: int = 16
    """Number of pictures; picture i has seed + i."""
    smooth: bool = False
    """Mix codes instead of choosing one, for smoother pictures; never for measuring."""
    scales: tuple[str, ...] | None = None
    """Steps, as sides (1 2 3 5 8) or height x width (1x1 2x3 4x6); others than the model's own are for
    flexvar and flexvar-mamba."""
    classifier: str | None = None
    """Judges pictures, and only the best of each class are kept: the folder of one that 'classifier' trained,
    or MODULE:FUNCTION, whose result has ``probabilities(images)``."""
    keep: float | None = None
    """Share of the drawn pictures that the classifier keeps: with 0.05 twenty are drawn for each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.count >= 1, f"--count must be at least 1, got {self.count}")
        require((self.classifier is None) == (self.keep is None), "--classifier and --keep go together")
        require(self.keep is None or 0 < self.keep <= 1, f"--keep is a share, 0 to 1, got {self.keep}")
        _ = self.sizes

    @property
    def sizes(self) -> tuple[tuple[int, int], ...] | None:
        """``scales`` as (height, width)."""
        if self.scales is None:
            return None
        sizes = []
        for word in self.scales:
            match = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", word.lower())
            if match is None:
                raise ConfigError(f"--scales takes sides or height x width, such as 1 2 4x6, got '{word}'")
            sizes.append((int(match[1]), int(match[2] or match[1])))
        for (h, w), (later_h, later_w) in itertools.pairwise(sizes):
            require(
                later_h >= h and later_w >= w and later_h * later_w > h * w,
                f"--scales must grow, got {h}x{w} before {later_h}x{later_w}",
            )
        return tuple(sizes)


@dataclass(frozen=True)
class StagesRequest(DrawChoice):
    """Options of ``stages``."""

    root: str = "runs"
    """The folder of all sweeps, where WHERE is a recipe."""
    name: str | None = None
    """The sweep's folder under the root; by default the recipe's name."""
    family: str | None = None
    """Which family of a sweep that has several."""
    depths: tuple[int, ...] | None = None
    """Which depths; by default all."""
    first: int = 0
    """Steps whose tokens are those of a validation image of the class (of raster: rows of tokens)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.first >= 0, f"--first must not be negative, got {self.first}")


@dataclass(frozen=True)
class FidelityRequest(Drawing):
    """Options of ``fidelity``."""

    extractor: str | None = None
    """Needed. What looks at the pictures: inception, inception-adm, classifier, or MODULE:FUNCTION of your
    own."""
    weights: str | None = None
    """Its weights: a file or hf://OWNER/NAME/FILE; of a classifier its folder, which is found by itself where
    'classifier' has trained one of the same images."""
    images: int = 50_000
    """Pictures to draw of each run; FID depends on their number."""
    reference: str = "train"
    """What they are held against: the run's train or val images, or an .npz file."""
    reference_images: int | None = None
    """So many of the train or val images, a fixed random choice; by default all."""
    data_path: str | None = None
    """Where the runs' images lie now, if elsewhere."""
    manifold: int = 10_000
    """Precision and recall are of at most so many pictures and images."""
    batch: int = 32
    """Pictures at once; it changes the numbers by rounding."""
    depth: int | None = None
    """Of a sweep, only the runs of this depth."""
    family: str | None = None
    """Of a sweep, only the runs of this family."""
    tokenizer: str | None = None
    """Of a single run: its tokenizer, if that is not where the run's sweep has it."""
    root: str = "runs"
    """The folder of all sweeps, where WHERE is a recipe."""
    name: str | None = None
    """The sweep's folder under the root; by default the recipe's name."""
    processes: int = 1
    """Processes (GPUs) that share the pictures."""
    device: Device = "auto"
    """auto: a GPU where there is one."""
    threads: int | None = None
    """CPU threads per process; by default the cores are divided."""

    def __post_init__(self) -> None:
        for name in ("images", "reference_images", "manifold", "batch", "processes", "threads"):
            value = getattr(self, name)
            flag = "--" + name.replace("_", "-")
            require(value is None or value >= 1, f"{flag} must be at least 1, got {value}")
        require(
            self.images >= self.processes,
            f"--images must be at least one for each of the {self.processes} processes, got {self.images}",
        )
        require(
            self.reference_images is None or self.reference in ("train", "val"),
            f"--reference-images is for --reference train or val, not for a file ({self.reference})",
        )
        super().__post_init__()

    @property
    def chosen(self) -> str:
        """The extractor.

        Raises:
            ConfigError: none was given.
        """
        if self.extractor is None:
            raise ConfigError(
                "fidelity needs --extractor: inception, inception-adm, classifier or MODULE:FUNCTION"
            )
        return self.extractor


@dataclass(frozen=True)
class FidelityJob:
    """What the job of ``fidelity`` reads."""

    request: FidelityRequest
    runs: tuple[str, ...]
    """Folders of finished runs."""


@dataclass(frozen=True)
class ClassifierTraining:
    """How the classifier of a study's images is trained."""

    width: int = 24
    """Channels at full resolution; twice as many at each half."""
    steps: int = 1500
    """Optimiser steps."""
    batch: int = 128
    """Images per step."""
    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Of AdamW."""
    flip: bool = True
    """Show images mirrored half of the time; false for digits and writing."""
    images: int | None = None
    """Train on so many of the training images, a fixed random choice, where all of them do not fit into
    memory."""
    seed: int = 0
    """Of weights, batches and crops."""

    def __post_init__(self) -> None:
        for name in ("width", "steps", "batch", "lr", "images"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} must be positive, got {value}")
        require(self.weight_decay >= 0, f"--weight-decay must not be negative, got {self.weight_decay}")
        require(self.seed >= 0, f"--seed must not be negative, got {self.seed}")


@dataclass(frozen=True)
class ClassifierRequest(ClassifierTraining):
    """Options of ``classifier``."""

    root: str = "runs"
    """The folder of all sweeps, tokenizers, token caches and classifiers."""

    @property
    def training(self) -> ClassifierTraining:
        """The part that decides the weights."""
        fields = dataclasses.fields(ClassifierTraining)
        return ClassifierTraining(**{field.name: getattr(self, field.name) for field in fields})


def same_images(data: DataConfig) -> DataConfig:
    """``data`` with what is about tokens, not images, at its default: equal but for that, they are one."""
    return dataclasses.replace(data, views=1, flip=False)


@dataclass(frozen=True)
class ClassifierRun:
    """Everything that decides a classifier's weights; its hash names the classifier's folder."""

    data: DataConfig
    """``same_images`` of a recipe's, with all counts known."""
    training: ClassifierTraining

    @property
    def run_id(self) -> str:
        """Folder name: ``cls-<resolution>px-<hash>``."""
        return f"cls-{self.data.resolution}px-{content_hash(self)[:10]}"
