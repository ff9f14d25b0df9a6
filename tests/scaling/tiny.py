"""The smallest real chain: an untrained tokenizer, a token cache of noise, a depth-1 run on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from scaling.config import (
    DataConfig,
    EvaluationConfig,
    Family,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    TrainConfig,
    to_dict,
)
from scaling.data.cache import build_cache
from scaling.data.encode import encoder
from scaling.records import RunFolder, write_json
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer, save_tokenizer
from tests.scaling.data_fixtures import NoiseSource

TOKENIZER = TokenizerConfig(
    vocab=16, latent_channels=4, channels=32, multipliers=(1, 1, 1), res_blocks=1, scales=(1, 2)
)
SCALABLE = dataclasses.replace(TOKENIZER, quantizer="scalable")
DATA = DataConfig(resolution=8, train_images=30, val_images=10, num_classes=3, views=2)
LAUNCH = LaunchConfig(threads=1, device="cpu", log_every=4, sampling=SamplingConfig(images=4))


def run_config(family: Family = "var", tokenizer: TokenizerConfig | None = None, **train: Any) -> RunConfig:
    """A depth-1 run; keyword arguments change its ``TrainConfig``."""
    tokenizer = tokenizer or (TOKENIZER if family == "var" else SCALABLE)
    model = ModelConfig.from_depth(
        1, vocab=16, latent_channels=4, scales=tokenizer.scales, num_classes=3, drop_path=0.1, family=family
    )
    settings: dict[str, Any] = {"steps": 20, "batch": 8, "lr": 3e-3, "precision": "fp32"} | train
    return RunConfig(
        model=model, data=DATA, tokenizer=tokenizer, tokenizer_train=TokenizerTrainConfig(),
        train=TrainConfig(**settings), evaluation=EvaluationConfig(points=4, first=0.1),
    )  # fmt: skip


def make_tokens(root: Path, seed: int = 0, config: TokenizerConfig = TOKENIZER) -> tuple[Path, Path]:
    """Folders (token cache, tokenizer run) under ``root``."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(config).eval()
    save_tokenizer(tokenizer, root / "tokenizer-run" / "tokenizer", {})
    loaded = load_tokenizer(root / "tokenizer-run" / "tokenizer")
    source = NoiseSource(train=30, val=10)
    build_cache(
        root / "tokens", DATA, config.scales, config.vocab, source,
        encoder(loaded, torch.device("cpu")), loaded.content_hash,
    )  # fmt: skip
    return root / "tokens", root / "tokenizer-run"


def make_run(path: Path, config: RunConfig, launch: LaunchConfig = LAUNCH) -> RunFolder:
    """A run folder with its config and launch files."""
    folder = RunFolder(path)
    folder.create(to_dict(config))
    write_json(path / "launch.json", to_dict(launch))
    return folder
