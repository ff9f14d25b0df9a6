"""Learning rate and weight decay as pure functions of the step (the published ``lr_wd_annealing``).

A schedule object passed to Accelerate steps once per process; a pure function cannot drift, needs
no checkpoint and can be plotted before anything runs.
"""

from __future__ import annotations

import math

from scaling.config import TrainConfig


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of 0-based ``step``; linear warm-up, then the chosen shape down to ``lr_end``."""
    warmup = round(train.warmup * total_steps)
    if step < warmup:
        return train.peak_lr * (train.lr_start + (1 - train.lr_start) * step / warmup)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return train.peak_lr * shape(train.schedule, progress, train.lr_end)


def shape(schedule: str, progress: float, end: float) -> float:
    """Share of the peak after ``progress`` (0 to 1) of the steps that follow warm-up."""
    if schedule == "constant":
        return 1.0
    if schedule == "cos":
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "exp":
        flat = 0.15
        return 1.0 if progress < flat else end ** ((progress - flat) / (1 - flat))
    named = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0}
    if schedule not in named:
        # lin0.x: linear at half the slope for x of the way, then linear to the end.
        first = float(schedule.removeprefix("lin"))
        middle = (1 + end + (1 - end) * (1 - first)) / 2
        if progress < first:
            return 1 + (middle - 1) * progress / first
        return end + (middle - end) * (1 - progress) / (1 - first)
    flat = named[schedule]
    if progress < flat:
        return 1.0
    return end + (1 - end) * (1 - progress) / (1 - flat)


def weight_decay(train: TrainConfig, step: int, total_steps: int) -> float:
    """Weight decay of 0-based ``step``: constant, or a half cosine to ``weight_decay_end``."""
    start = train.weight_decay
    end = start if train.weight_decay_end is None else train.weight_decay_end
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / max(1, total_steps - 1)))
