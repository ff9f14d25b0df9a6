"""Small things for the tokenizer's tests: configurations, and images made of a formula."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scaling.config import (
    DataConfig,
    LaunchConfig,
    TokenizerConfig,
    TokenizerRunConfig,
    TokenizerTrainConfig,
    to_dict,
)
from scaling.data.images import Skipped, Split
from scaling.records import RunFolder

TOKENIZER = TokenizerConfig(
    vocab=32, latent_channels=8, channels=32, multipliers=(1, 1, 1), res_blocks=1, scales=(1, 2, 4)
)
DATA = DataConfig(resolution=16, train_images=40, val_images=10, num_classes=2)
TRAIN = TokenizerTrainConfig(
    steps=8, batch=4, lr=1e-3, warmup=2, revive_every=3, log_every=2, checkpoint_every=4, eval_images=6
)
RUN = TokenizerRunConfig(DATA, TOKENIZER, TRAIN)
SCALABLE = dataclasses.replace(
    RUN,
    tokenizer=dataclasses.replace(TOKENIZER, quantizer="scalable", z_channels=12, norm_groups=8),
    train=dataclasses.replace(TRAIN, random_sizes=1, entropy=0.1, autoencode_steps=2),
)


class Waves:
    """Coloured waves; image i is a function of (split, i)."""

    num_classes = 2
    class_names = ("even", "odd")

    def __init__(self) -> None:
        self.skipped = Skipped()

    def count(self, split: Split) -> int:
        return 40 if split == "train" else 10

    def label(self, split: Split, i: int) -> int:
        return i % 2

    def image(self, split: Split, i: int) -> Image.Image:
        phase = i + (0.5 if split == "val" else 0.0)
        y, x, c = np.ogrid[:24, :24, :3]
        wave = np.sin(0.2 * (1 + i % 3) * x + phase) + np.cos(0.3 * y + 0.7 * phase * (c + 1))
        return Image.fromarray(np.uint8(127 + 60 * wave))

    def fingerprint(self) -> str:
        return "waves"


def variant(**train: Any) -> TokenizerRunConfig:
    """``RUN`` with other training options."""
    return dataclasses.replace(RUN, train=dataclasses.replace(TRAIN, **train))


def run_folder(path: Path, config: TokenizerRunConfig, launch: LaunchConfig | None = None) -> RunFolder:
    """A folder as the scheduler makes it."""
    folder = RunFolder(path)
    folder.create(to_dict(config))
    (path / "launch.json").write_text(json.dumps(to_dict(launch or LaunchConfig(device="cpu"))))
    return folder


def randomised(module: torch.nn.Module, seed: int = 0) -> None:
    """Fill all parameters with normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
