"""Learning rate and weight decay as pure functions of the step (the published ``lr_wd_annealing``).

A schedule object passed to Accelerate steps once per process; a pure function cannot drift, needs
no checkpoint and can be plotted before anything runs.
"""

from __future__ import annotations

import math

from scaling.config import TrainConfig, decay_start


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of 0-based ``step``; linear warm-up, then the chosen shape down to ``lr_end``."""
    warmup = round(train.warmup * total_steps) if train.warmup_steps is None else train.warmup_steps
    if step < warmup:
        return train.peak_lr * (train.lr_start + (1 - train.lr_start) * step / warmup)
    if train.schedule == "wsd":
        return train.peak_lr * wsd(train, step, total_steps)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return train.peak_lr * shape(train.schedule, progress, train.lr_end)


def wsd(train: TrainConfig, step: int, total_steps: int) -> float:
    """Share of the peak after warm-up: 1, then 1 − √p or 1 − p (2405.18392, eq. 1) down to ``lr_end``.

    p is the share of the decay with this step, so the last step has ``lr_end`` itself. Before the decay the
    value does not depend on ``total_steps``.
    """
    stable = decay_start(train, total_steps)
    if step < stable:
        return 1.0
    progress = (step + 1 - stable) / (total_steps - stable)
    fallen = math.sqrt(progress) if train.decay_shape == "1-sqrt" else progress
    return train.lr_end + (1 - train.lr_end) * (1 - fallen)


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
