"""What one run is, entirely: frozen dataclasses from the depth to the last training option.

- One dial. ``ModelConfig.from_depth(d)`` fixes width 64d, d heads and drop path 0.1·d/24
  (VAR eqs. 7 and 8), so that N = 18·w²·d = 73728·d³ (12·w²·d = 49152·d³ with a shared adaLN or none).
- ``RunConfig`` holds everything that changes the result; its content hash is the run's id.
  ``LaunchConfig`` holds what must not change it: micro-batch, processes, threads, trackers.
- Everything is imported from here: ``scaling.schema`` (reading, hashing), ``scaling.launch`` (the machine's
  part), ``scaling.data.config`` (the images) and ``scaling.tokenizer.config`` (a tokenizer's shape and
  training) stand behind it.
- No torch here: plans are printed and reports are read on machines without it.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from scaling.data.config import DataConfig
from scaling.launch import Device, LaunchConfig, SamplingConfig, Tracker, WandbMode
from scaling.schema import ConfigError, content_hash, from_dict, here, identity, require, to_dict
from scaling.tokenizer.config import (
    PAPER_SCALES,
    AdversarialConfig,
    Precision,
    TokenizerConfig,
    TokenizerTrainConfig,
    check_betas,
)

__all__ = [
    "PAPER_SCALES",
    "AdversarialConfig",
    "ConfigError",
    "DataConfig",
    "Device",
    "EvaluationConfig",
    "LaunchConfig",
    "ModelConfig",
    "Precision",
    "RunConfig",
    "SamplingConfig",
    "TokenizerConfig",
    "TokenizerRunConfig",
    "TokenizerTrainConfig",
    "Tracker",
    "TrainConfig",
    "WandbMode",
    "check_tokens",
    "content_hash",
    "from_dict",
    "here",
    "identity",
    "require",
    "to_dict",
]

SCHEDULES = ("lin0", "lin", "lin00", "cos", "exp", "constant", "wsd")
Family = Literal["var", "flexvar", "flexvar-mamba", "raster"]
AdaLN = Literal["own", "shared", "none"]
StepSchedule = Literal["fixed", "paper", "published"]
DecayShape = Literal["1-sqrt", "linear"]
FLEXIBLE = ("flexvar", "flexvar-mamba")
"""Families that train on, and sample with, steps of any number and size."""
PUBLISHED_SIDE = 16
"""The published random steps are written down for maps of this side only."""


@dataclass(frozen=True)
class TokenizerRunConfig:
    """Everything that decides a tokenizer's weights; its hash names the tokenizer's folder."""

    data: DataConfig
    tokenizer: TokenizerConfig
    train: TokenizerTrainConfig

    def __post_init__(self) -> None:
        require(
            self.train.lpips_weights is None or self.train.lpips_sha256 is not None,
            "tokenizer_train.lpips_sha256 is not known yet",
        )

    def effective(self) -> TokenizerRunConfig:
        """With what the other kind of tokenizer alone uses at its default."""
        return replace(self, train=self.train.effective_for(self.tokenizer))

    @property
    def run_id(self) -> str:
        """Folder name: ``tok-<resolution>px-v<vocab>-<hash>``."""
        return f"tok-{self.data.resolution}px-v{self.tokenizer.vocab}-{content_hash(self)[:10]}"


SSM = ("ssm_state", "ssm_expand", "ssm_conv")
"""Fields of a model that flexvar-mamba alone knows."""


@dataclass(frozen=True)
class ModelConfig:
    """A model of a family, in full. Build it with ``from_depth``."""

    depth: int
    width: int
    heads: int
    vocab: int
    latent_channels: int
    scales: tuple[int, ...]
    """Side lengths of the steps at evaluation, and in sampling unless others are asked for; raster: one."""
    num_classes: int
    drop_path: float
    family: Family = "var"
    mlp_ratio: int = 4
    adaln: AdaLN = "own"
    """Where layer norms take scale, shift and gate from: a matrix per layer, one for all layers, or none
    (learned vectors and no gates; VAR table 3, second row)."""
    qk_norm: bool = True
    step_schedule: StepSchedule = field(default="fixed", metadata={"added": True})
    """Steps of a training step (``scaling.steps``): always ``scales``, the paper's random ones, or those
    of the published code. Of flexible families only."""
    ssm_state: int = field(default=16, metadata={"added": True})
    ssm_expand: int = field(default=2, metadata={"added": True})
    ssm_conv: int = field(default=4, metadata={"added": True})
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
        require(
            len(self.scales) > 0 and all(a < b for a, b in zip(self.scales, self.scales[1:], strict=False)),
            f"model.scales must grow, got {list(self.scales)}",
        )
        for name in SSM:
            value, default = getattr(self, name), getattr(ModelConfig, name)
            require(value >= 1, f"model.{name} must be at least 1, got {value}")
            require(
                self.family == "flexvar-mamba" or value == default,
                f"model.{name} {value} is for flexvar-mamba, {self.family} has no scan; leave {default}",
            )
        require(
            self.step_schedule == "fixed" or self.family in FLEXIBLE,
            f"model.step_schedule '{self.step_schedule}' is for {' and '.join(FLEXIBLE)}; "
            f"{self.family} trains on the same steps always ('fixed')",
        )
        require(
            self.step_schedule != "published" or self.scales[-1] == PUBLISHED_SIDE,
            f"model.step_schedule 'published' is written down for maps of {PUBLISHED_SIDE} x "
            f"{PUBLISHED_SIDE} tokens, these are {self.scales[-1]} x {self.scales[-1]}; use 'paper'",
        )
        if self.family == "raster":
            require(len(self.scales) == 1, f"raster has one map, got model.scales {list(self.scales)}")
            require(
                self.adaln == "none" and not self.qk_norm,
                "model.adaln must be none and model.qk_norm false for raster, which is a GPT-2",
            )

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        vocab: int = 4096,
        latent_channels: int = 32,
        scales: tuple[int, ...] = PAPER_SCALES,
        num_classes: int = 1000,
        family: Family = "var",
        **options: Any,
    ) -> ModelConfig:
        """Width 64d, d heads, drop path 0.1·d/24 (VAR eq. 7), and the family's own choices.

        Args:
            scales: of the tokenizer, or the steps wanted; raster takes the last.
            options: further fields, in place of what follows from depth and family; those of flexvar-mamba's
                scan are dropped for other families, which a recipe may have beside it.
        """
        derived: dict[str, Any] = {"width": 64 * depth, "heads": depth, "drop_path": 0.1 * depth / 24}
        if family in FLEXIBLE:
            derived |= {"step_schedule": "paper"}
        if family == "raster":
            derived |= {"adaln": "none", "qk_norm": False}
            scales = scales[-1:]
        if family != "flexvar-mamba":
            options = {name: value for name, value in options.items() if name not in SSM}
        return cls(
            depth=depth, vocab=vocab, latent_channels=latent_channels, scales=tuple(scales),
            num_classes=num_classes, family=family, **(derived | options),
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """``scales`` as (h, w)."""
        return tuple((side, side) for side in self.scales)

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
    """Training tokens to see (D), rounded up to whole optimiser steps; with random steps, as if every image
    had all of ``model.scales``."""
    batch: int = 256
    """Images per optimiser step, over all processes and micro-batches."""
    lr: float | None = None
    """Peak learning rate; by default ``lr_base``·batch/256."""
    lr_base: float = 1e-4
    schedule: str = "lin0"
    """lin0, lin, lin00, cos, exp, constant, or lin0.x: as published, a slow linear part for x of training;
    wsd: warm-up, stable, decay (2405.18392), whose runs of several lengths share their stable phase."""
    warmup: float = 0.02
    """Share of training (the published epochs/50)."""
    warmup_steps: int | None = field(default=None, metadata={"added": True})
    """Warm-up in optimiser steps, in place of the share; wsd needs it, so that all lengths begin alike."""
    decay: float = field(default=0.2, metadata={"added": True})
    """wsd: share of training in which the learning rate falls; 20 % matches a cosine of the same length
    (2405.18392)."""
    decay_shape: DecayShape = field(default="1-sqrt", metadata={"added": True})
    """wsd: 1-sqrt, which 2405.18392 found better than linear."""
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
        check_betas(self.betas, "train.betas")
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
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"train.warmup_steps must not be negative, got {self.warmup_steps}",
        )
        self._check_decay()

    def _check_decay(self) -> None:
        """wsd has what it needs, and nothing that would make its stable phase depend on the length."""
        require(
            0 < self.decay < 1, f"train.decay is a share of training, above 0 and below 1, got {self.decay}"
        )
        if self.schedule == "wsd":
            require(
                self.warmup_steps is not None,
                "train.warmup_steps (optimiser steps) is needed for train.schedule 'wsd', whose runs of "
                "different lengths begin alike",
            )
            require(
                self.weight_decay_end is None,
                "train.weight_decay_end depends on a run's length from the first step on; train.schedule "
                "'wsd' keeps weight decay constant, leave it none",
            )
            return
        for name in ("decay", "decay_shape"):
            value, default = getattr(self, name), getattr(TrainConfig, name)
            require(
                value == default,
                f"train.{name} {value} is for train.schedule 'wsd', not '{self.schedule}'; leave {default}",
            )

    def effective(self) -> TrainConfig:
        """``lr_base`` does nothing beside ``lr``."""
        return self if self.lr is None else replace(self, lr_base=TrainConfig.lr_base)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr is not None else self.lr_base * self.batch / 256


def decay_start(train: TrainConfig, total_steps: int) -> int:
    """wsd: optimiser steps at the peak or in warm-up, before the first of the decay."""
    return total_steps - max(1, round(train.decay * total_steps))


@dataclass(frozen=True)
class EvaluationConfig:
    """When and on what a run is evaluated."""

    points: int = 20
    """Evaluations per run, evenly spaced in log FLOPs, the last at the end. With wsd only the spacing follows
    from this and ``first``; their number follows from the length."""
    first: float = 0.02
    """The first evaluation, as a share of training (wsd: the end of warm-up)."""
    images: int | None = None
    """Validation images used; None for all that are cached."""
    snapshots: tuple[float, ...] = field(default=(), metadata={"added": True})
    """Shares of training after which the weights are kept beside the final ones, for pictures of stages."""

    def __post_init__(self) -> None:
        shares = self.snapshots
        require(
            all(0 < share < 1 for share in shares) and list(shares) == sorted(set(shares)),
            f"evaluation.snapshots are growing shares of training, above 0 and below 1, got {list(shares)}",
        )
        require(self.points >= 1, f"evaluation.points must be at least 1, got {self.points}")
        require(
            self.images is None or self.images >= 1,
            f"evaluation.images must be at least 1, got {self.images}",
        )
        require(0 < self.first <= 1, f"evaluation.first must be in (0, 1], got {self.first}")


def check_tokens(model: ModelConfig, tokenizer: TokenizerConfig) -> None:
    """``ConfigError`` unless the tokenizer gives the tokens that the model needs."""
    for name in ("vocab", "latent_channels"):
        require(
            getattr(model, name) == getattr(tokenizer, name),
            f"model.{name} {getattr(model, name)} differs from tokenizer.{name} {getattr(tokenizer, name)}",
        )
    wanted = "residual" if model.family == "var" else "scalable"
    require(
        tokenizer.quantizer == wanted,
        f"tokenizer.quantizer must be '{wanted}' for family '{model.family}', got '{tokenizer.quantizer}'",
    )
    if model.family == "var":
        require(
            model.scales == tokenizer.scales,
            f"model.scales {list(model.scales)} differ from tokenizer.scales {list(tokenizer.scales)}",
        )
        return
    needed = set(model.scales)
    if model.step_schedule == "published":
        needed |= set(range(1, PUBLISHED_SIDE + 1))
    missing = sorted(needed - set(tokenizer.scales))
    require(
        not missing,
        f"tokenizer.scales {list(tokenizer.scales)} lack {missing}, which model.scales or "
        f"model.step_schedule '{model.step_schedule}' need",
    )
    require(
        model.scales[-1] == tokenizer.scales[-1],
        f"model.scales must end with tokenizer.scales' last, {tokenizer.scales[-1]}, got {model.scales[-1]}",
    )


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
        check_tokens(self.model, tok)
        for name in ("train_images", "val_images", "num_classes"):
            require(getattr(self.data, name) is not None, f"data.{name} is not known yet")
        require(
            self.model.num_classes == self.data.num_classes, "model.num_classes differs from data.num_classes"
        )
        if self.train.schedule == "wsd":
            warmup = self.train.warmup_steps or 0
            require(
                warmup <= self.stable_steps,
                f"train.warmup_steps {warmup} reaches into the decay of a run of {self.total_steps} steps, "
                f"which begins after step {self.stable_steps}",
            )

    def effective(self) -> RunConfig:
        """With what the other kind of tokenizer alone uses at its default."""
        return replace(self, tokenizer_train=self.tokenizer_train.effective_for(self.tokenizer))

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
    def stable_steps(self) -> int:
        """wsd: optimiser steps before the decay begins, the same in every longer run of this config."""
        return decay_start(self.train, self.total_steps)

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """Steps after which the run is evaluated: evenly spaced in log FLOPs, strictly growing.

        Those of wsd have the same spacing, but are counted from the end of warm-up and not from the run's own
        first one: runs of several lengths are evaluated after the same steps, and each at its end.
        """
        total, points = self.total_steps, self.evaluation.points
        if points == 1:
            return (total,)
        if self.train.schedule == "wsd":
            first, ratio = (
                float(max(1, self.train.warmup_steps or 0)),
                self.evaluation.first ** (-1 / (points - 1)),
            )
            if ratio == 1.0:
                return (total,)
            points = 1 + max(0, math.floor(math.log(total / first) / math.log(ratio)))
            return tuple(
                sorted({step for i in range(points) if (step := round(first * ratio**i)) < total} | {total})
            )
        first = max(1.0, self.evaluation.first * total)
        ratio = (total / first) ** (1 / (points - 1))
        return tuple(sorted({min(total, max(1, round(first * ratio**i))) for i in range(points)} | {total}))

    @property
    def snapshot_steps(self) -> dict[float, int]:
        """Steps after which the weights are kept, by share of training."""
        return {share: max(1, round(share * self.total_steps)) for share in self.evaluation.snapshots}
