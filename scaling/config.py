"""What one run is, entirely: frozen dataclasses from the depth to the last training option.

- One dial. ``ModelConfig.from_depth(d)`` fixes width 64d, d heads and drop path 0.1·d/24
  (VAR eqs. 7 and 8), so that N = 18·w²·d = 73728·d³ (12·w²·d = 49152·d³ with shared adaLN).
- ``RunConfig`` holds everything that changes the result; its content hash is the run's id.
  ``LaunchConfig`` holds what must not change it: micro-batch, processes, threads, trackers.
- No torch here: plans are printed and reports are read on machines without it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from scaling.schema import ConfigError, content_hash, from_dict, identity, to_dict

__all__ = [
    "PAPER_SCALES",
    "AdversarialConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LaunchConfig",
    "ModelConfig",
    "RunConfig",
    "SamplingConfig",
    "TokenizerConfig",
    "TokenizerRunConfig",
    "TokenizerTrainConfig",
    "TrainConfig",
    "content_hash",
    "from_dict",
    "identity",
    "to_dict",
]

PAPER_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
Precision = Literal["fp32", "bf16", "fp16"]
SCHEDULES = ("lin0", "lin", "lin00", "cos", "exp", "constant")
Family = Literal["var"]


def require(condition: bool, message: str) -> None:
    """Raise ``ConfigError(message)`` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def _check_betas(betas: tuple[float, float], name: str) -> None:
    require(all(0 <= beta < 1 for beta in betas), f"{name} must be in [0, 1), got {list(betas)}")


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


@dataclass(frozen=True)
class TokenizerConfig:
    """A multi-scale residual VQVAE (VAR algorithms 1 and 2)."""

    vocab: int = 4096
    latent_channels: int = 32
    channels: int = 160
    """Channels of the first convolution, a multiple of ``norm_groups``."""
    norm_groups: int = 32
    """Groups of the group norms; with as many as channels, a norm would wipe out every channel's mean."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels per resolution in units of ``channels``; downsampling is 2^(len − 1)."""
    res_blocks: int = 2
    scales: tuple[int, ...] = PAPER_SCALES
    """Side lengths of the token maps, coarse to fine; the last is the latent's side."""
    phis: int = 4
    """φ convolutions: 0 one per scale, 1 shared by all, n shared by nearest tick."""
    phi_ratio: float = 0.5
    beta: float = 0.25
    """Weight of the commitment term beside the codebook term."""

    def __post_init__(self) -> None:
        require(2 <= self.vocab <= 65536, f"tokenizer.vocab must be 2 to 65536 (uint16), got {self.vocab}")
        require(
            self.norm_groups > 0 and self.channels > 0 and self.channels % self.norm_groups == 0,
            f"tokenizer.channels must be a multiple of norm_groups {self.norm_groups}, got {self.channels}",
        )
        require(
            len(self.multipliers) >= 1 and all(m > 0 for m in self.multipliers),
            "tokenizer.multipliers must be positive",
        )
        require(
            len(self.scales) >= 1 and all(s > 0 for s in self.scales),
            "tokenizer.scales must be positive side lengths",
        )
        require(
            all(a < b for a, b in zip(self.scales, self.scales[1:], strict=False)),
            f"tokenizer.scales must grow, got {list(self.scales)}",
        )
        require(0.0 <= self.phi_ratio <= 1.0, f"tokenizer.phi_ratio must be 0 to 1, got {self.phi_ratio}")
        require(self.phis >= 0, f"tokenizer.phis must be 0 or more, got {self.phis}")
        require(self.res_blocks >= 1, f"tokenizer.res_blocks must be at least 1, got {self.res_blocks}")

    @property
    def downsampling(self) -> int:
        """Image pixels per latent position, along a side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def seq_len(self) -> int:
        """Tokens per image, Σ side²."""
        return sum(s * s for s in self.scales)


@dataclass(frozen=True)
class AdversarialConfig:
    """The PatchGAN term of stage 1: hinge loss, weight adapted to the last decoder layer's gradients."""

    weight: float = 0.0
    """0 turns it off."""
    start: int = 0
    """First step on which the generator sees it."""
    lr: float = 1e-4
    channels: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"adversarial.weight must not be negative, got {self.weight}")


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """Stage 1: how the tokenizer is trained."""

    steps: int = 1000
    batch: int = 64
    lr: float = 4e-4
    warmup: int = 50
    lr_end: float = 0.1
    """Cosine to this share of ``lr``."""
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 0.0
    clip: float = 1.0
    pixel_l1: float = 0.2
    pixel_l2: float = 1.0
    codebook: float = 1.0
    """Weight of the vector-quantisation loss (codebook + β·commitment)."""
    perceptual: float = 1.0
    """Weight of LPIPS; off, with a word in the log, while ``lpips_weights`` is not given."""
    lpips_weights: str | None = None
    """A file (safetensors or .pth) with VGG-16 and LPIPS linear weights, brought by the user."""
    adversarial: AdversarialConfig = AdversarialConfig()
    autoencode_steps: int = 0
    """Steps without quantisation at the start; then the codebook is seeded from features worth quantising."""
    revive_every: int = 50
    """Every so many steps codes that were not used since are moved onto data; 0 never."""
    revive_until: float = 0.8
    """No more revivals after this share of training, so that the codebook settles."""
    precision: Precision = "fp32"
    log_every: int = 20
    checkpoint_every: int = 200
    eval_images: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"tokenizer_train.steps must be at least 1, got {self.steps}")
        require(self.batch >= 1, f"tokenizer_train.batch must be at least 1, got {self.batch}")
        require(self.clip > 0, f"tokenizer_train.clip must be positive, got {self.clip}")
        require(self.seed >= 0, f"tokenizer_train.seed must not be negative, got {self.seed}")
        _check_betas(self.betas, "tokenizer_train.betas")
        for name in ("log_every", "checkpoint_every", "eval_images"):
            require(
                getattr(self, name) >= 1,
                f"tokenizer_train.{name} must be at least 1, got {getattr(self, name)}",
            )
        for name in (
            "revive_every",
            "warmup",
            "weight_decay",
            "pixel_l1",
            "pixel_l2",
            "codebook",
            "perceptual",
        ):
            require(
                getattr(self, name) >= 0,
                f"tokenizer_train.{name} must not be negative, got {getattr(self, name)}",
            )
        require(
            0 <= self.autoencode_steps < self.steps,
            f"tokenizer_train.autoencode_steps must be 0 to steps - 1, got {self.autoencode_steps}",
        )
        require(self.lr > 0, f"tokenizer_train.lr must be positive, got {self.lr}")


@dataclass(frozen=True)
class TokenizerRunConfig:
    """Everything that decides a tokenizer's weights; its hash names the tokenizer's folder."""

    data: DataConfig
    tokenizer: TokenizerConfig
    train: TokenizerTrainConfig

    @property
    def run_id(self) -> str:
        """Folder name: ``tok-<resolution>px-v<vocab>-<hash>``."""
        return f"tok-{self.data.resolution}px-v{self.tokenizer.vocab}-{content_hash(self)[:10]}"


@dataclass(frozen=True)
class ModelConfig:
    """A transformer of the family, in full. Build it with ``from_depth``."""

    depth: int
    width: int
    heads: int
    vocab: int
    latent_channels: int
    scales: tuple[int, ...]
    num_classes: int
    drop_path: float
    family: Family = "var"
    mlp_ratio: int = 4
    shared_adaln: bool = False
    qk_norm: bool = True
    label_drop: float = 0.1
    init_adaln: float = 0.5
    init_adaln_gamma: float = 1e-5
    init_head: float = 0.02

    def __post_init__(self) -> None:
        require(self.depth >= 1, f"model depth must be at least 1, got {self.depth}")
        require(
            self.width % self.heads == 0, f"model width {self.width} is not a multiple of {self.heads} heads"
        )
        require(0 <= self.label_drop < 1, f"model label_drop must be in [0, 1), got {self.label_drop}")
        require(0 <= self.drop_path < 1, f"model drop_path must be in [0, 1), got {self.drop_path}")
        require(len(self.scales) > 0, "model scales must not be empty")

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        vocab: int = 4096,
        latent_channels: int = 32,
        scales: tuple[int, ...] = PAPER_SCALES,
        num_classes: int = 1000,
        **options: Any,
    ) -> ModelConfig:
        """Width 64d, d heads, drop path 0.1·d/24 (VAR eq. 7). ``options`` are further fields."""
        derived: dict[str, Any] = {"width": 64 * depth, "heads": depth, "drop_path": 0.1 * depth / 24}
        return cls(
            depth=depth, vocab=vocab, latent_channels=latent_channels, scales=tuple(scales),
            num_classes=num_classes, **(derived | options),
        )  # fmt: skip

    @property
    def seq_len(self) -> int:
        """Tokens per image, Σ side² (680 for the paper's scales)."""
        return sum(s * s for s in self.scales)


@dataclass(frozen=True)
class TrainConfig:
    """Stage 2: how a transformer is trained. Give exactly one of ``steps``, ``epochs``, ``tokens``."""

    steps: int | None = None
    epochs: float | None = None
    tokens: float | None = None
    """Training tokens to see (D); rounded up to whole steps."""
    batch: int = 256
    """Images per optimiser step, over all processes and micro-batches."""
    lr: float | None = None
    """Peak learning rate; by default ``lr_base``·batch/256."""
    lr_base: float = 1e-4
    schedule: str = "lin0"
    """lin0, lin, lin00, cos, exp, constant, or lin0.x: as published, a slow linear part for x of training."""
    warmup: float = 0.02
    """Share of training (the published epochs/50)."""
    lr_start: float = 0.005
    """Learning rate at step 0, as a share of the peak."""
    lr_end: float = 0.01
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    """Cosine from ``weight_decay`` to this; None keeps it constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 2.0
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        given = [n for n in ("steps", "epochs", "tokens") if getattr(self, n) is not None]
        require(
            len(given) == 1,
            f"give exactly one of train.steps, train.epochs, train.tokens; got {', '.join(given) or 'none'}",
        )
        require(
            getattr(self, given[0]) > 0, f"train.{given[0]} must be positive, got {getattr(self, given[0])}"
        )
        require(self.batch >= 1, f"train.batch must be at least 1, got {self.batch}")
        require(self.lr is None or self.lr > 0, f"train.lr must be positive, got {self.lr}")
        require(self.clip > 0, f"train.clip must be positive, got {self.clip}")
        require(self.eps > 0, f"train.eps must be positive, got {self.eps}")
        _check_betas(self.betas, "train.betas")
        for name in ("weight_decay", "weight_decay_end", "lr_start", "lr_end"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"train.{name} must not be negative, got {value}")
        near = difflib.get_close_matches(self.schedule, SCHEDULES, n=1)
        require(
            self.schedule in SCHEDULES or re.fullmatch(r"lin0\.\d+", self.schedule) is not None,
            f"train.schedule: unknown '{self.schedule}'; "
            + (f"did you mean '{near[0]}'?" if near else f"known: {', '.join(SCHEDULES)}, lin0.x"),
        )
        require(0 <= self.warmup < 1, f"train.warmup is a share of training, 0 to 1, got {self.warmup}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr is not None else self.lr_base * self.batch / 256


@dataclass(frozen=True)
class EvaluationConfig:
    """When and on what a run is evaluated."""

    points: int = 20
    """Evaluations per run, evenly spaced in log FLOPs, the last at the end."""
    first: float = 0.02
    """The first evaluation, as a share of training."""
    images: int | None = None
    """Validation images used; None for all that are cached."""

    def __post_init__(self) -> None:
        require(self.points >= 1, f"evaluation.points must be at least 1, got {self.points}")
        require(
            self.images is None or self.images >= 1,
            f"evaluation.images must be at least 1, got {self.images}",
        )
        require(0 < self.first <= 1, f"evaluation.first must be in (0, 1], got {self.first}")


@dataclass(frozen=True)
class RunConfig:
    """One run, entirely; nothing else changes its result (beyond rounding)."""

    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    tokenizer_train: TokenizerTrainConfig
    train: TrainConfig
    evaluation: EvaluationConfig
    seed: int = 0

    def __post_init__(self) -> None:
        tok, pixels = self.tokenizer, self.data.resolution
        side = pixels // tok.downsampling
        require(
            pixels % tok.downsampling == 0,
            f"data.resolution {pixels} is not a multiple of the tokenizer's downsampling {tok.downsampling}",
        )
        require(
            tok.scales[-1] == side,
            f"tokenizer.scales must end at the latent size {side} (= {pixels} px / {tok.downsampling}), "
            f"got {list(tok.scales)}",
        )
        for name in ("vocab", "latent_channels", "scales"):
            require(
                getattr(self.model, name) == getattr(tok, name), f"model.{name} differs from tokenizer.{name}"
            )
        for name in ("train_images", "val_images", "num_classes"):
            require(getattr(self.data, name) is not None, f"data.{name} is not known yet")
        require(
            self.model.num_classes == self.data.num_classes, "model.num_classes differs from data.num_classes"
        )

    @property
    def run_id(self) -> str:
        """Folder name ``<family>-d<depth>-s<seed>-<hash>``; equal configs have equal ids."""
        return f"{self.model.family}-d{self.model.depth}-s{self.seed}-{content_hash(self)[:10]}"

    @property
    def tokenizer_run(self) -> TokenizerRunConfig:
        """The stage-1 run that this run's tokens come from."""
        return TokenizerRunConfig(self.data, self.tokenizer, self.tokenizer_train)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        train, images = self.train, self.data.train_images
        assert images is not None
        if train.steps is not None:
            return train.steps
        if train.epochs is not None:
            wanted = train.epochs * images
        else:
            assert train.tokens is not None
            wanted = train.tokens / self.model.seq_len
        return max(1, -int(-wanted // train.batch))

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """Steps after which the run is evaluated: evenly spaced in log FLOPs, strictly growing."""
        total, points = self.total_steps, self.evaluation.points
        if points == 1:
            return (total,)
        first = max(1.0, self.evaluation.first * total)
        ratio = (total / first) ** (1 / (points - 1))
        return tuple(sorted({min(total, max(1, round(first * ratio**i))) for i in range(points)} | {total}))


@dataclass(frozen=True)
class SamplingConfig:
    """The pictures that a finished run leaves beside its numbers."""

    images: int = 16
    """0 for none."""
    guidance: float = 1.5
    """Classifier-free guidance; it rises linearly over the scales, as published."""
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.images >= 0, f"sampling.images must not be negative, got {self.images}")
        require(self.guidance >= 0, f"sampling.guidance must not be negative, got {self.guidance}")
        require(self.top_k >= 0, f"sampling.top_k must not be negative, got {self.top_k}")
        require(0 <= self.top_p <= 1, f"sampling.top_p must be 0 to 1, got {self.top_p}")


@dataclass(frozen=True)
class LaunchConfig:
    """The machine's part: nothing here changes a result beyond rounding, or a run's id."""

    processes: int = 1
    """Processes (GPUs) per run."""
    micro_batch: int | None = None
    """Images per forward pass and process; None for the whole share of the global batch."""
    threads: int | None = None
    """CPU threads per process; None divides the cores among the runs at once."""
    runs_at_once: int | None = None
    """Runs trained side by side; None for as many as cores or GPUs, and memory, allow."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    attention: Literal["masked", "blockwise"] = "masked"
    checkpoint_seconds: float = 120.0
    """At most this much work is lost to a kill."""
    log_every: int = 10
    """Steps between lines of training loss and speed."""
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "varscale"
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self) -> None:
        require(self.processes >= 1, f"launch.processes must be at least 1, got {self.processes}")
        require(
            self.micro_batch is None or self.micro_batch >= 1,
            f"launch.micro_batch must be at least 1, got {self.micro_batch}",
        )
        for name in ("threads", "runs_at_once"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"launch.{name} must be at least 1, got {value}")
        require(self.log_every >= 1, f"launch.log_every must be at least 1, got {self.log_every}")
