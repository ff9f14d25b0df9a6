"""The lines that a run of transformer training writes to ``metrics.jsonl``, in DESIGN's names and units."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from scaling import flops
from scaling.config import PUBLISHED_SIDE, RunConfig
from scaling.schedule import learning_rate


def progress_record(config: RunConfig, done: int, spent: flops.Spent, images: int) -> dict[str, Any]:
    """What has been spent after ``done`` steps, under DESIGN's names."""
    return {
        "step": done,
        "tokens": spent.tokens,
        "epochs": done * config.train.batch / images,
        "flops": spent.flops,
    }


def training_record(
    config: RunConfig,
    accelerator: Accelerator,
    sums: dict[str, Tensor],
    done: int,
    spent: flops.Spent,
    images: int,
) -> dict[str, Any]:
    """The line of a log point: means over the global batch, before the update. Synchronises.

    With random steps they are of the token maps that this step used, and ``loss_last`` of the largest.
    """
    names = [name for name in sums if name != "grad_norm"]
    reduced = accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="sum")
    means = {name: float(v) / config.train.batch for name, v in zip(names, reduced.tolist(), strict=True)}
    return {
        "kind": "train",
        **progress_record(config, done, spent, images),
        **means,
        "lr": learning_rate(config.train, done - 1, config.total_steps),
        "grad_norm": float(sums["grad_norm"]),
    }


def evaluation_record(config: RunConfig, done: int, spent: flops.Spent, images: int) -> dict[str, Any]:
    """The part of an evaluation's line that does not depend on the model's answers."""
    # Another crop of an image is another token sequence; each of its maps is the same whenever it is used.
    sides = range(1, PUBLISHED_SIDE + 1) if config.model.step_schedule == "published" else config.model.scales
    unique = images * config.data.views * sum(side * side for side in sides)
    return {
        "kind": "eval",
        **progress_record(config, done, spent, images),
        "params": flops.params(config.model),
        "params_total": flops.params_total(config.model),
        "unique_tokens": min(spent.tokens, unique),
        "flops_6nd": flops.flops_6nd(config.model, spent.tokens),
    }
