"""Every random draw of a training step as a pure function of (seed, step).

The draws are made for the whole global batch and each process takes its rows, so they depend
neither on the number of processes nor on where a run was killed and resumed. A fresh stream per
step rather than a running generator: step s needs no history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling.config import ModelConfig

_STREAM = 0x647261


@dataclass(frozen=True)
class Draws:
    """Draws of one step for B images."""

    drop_label: np.ndarray
    """(B,) bool; True replaces the label by the null class."""
    path_scale: np.ndarray | None
    """(depth, 2, B) float32 factors of the residual branches, 0 or 1/keep; None without drop path."""


def step_draws(model: ModelConfig, seed: int, step: int, batch: int) -> Draws:
    """The label drops and drop-path factors of one step.

    Drop path rises linearly over the layers from 0 to ``model.drop_path`` (as published), per image
    and branch, and kept branches are scaled by 1/keep so that the expectation is unchanged.
    """
    # Raw words only: NumPy promises their values across releases, not those of its higher-level draws.
    words = np.random.PCG64(np.random.SeedSequence([_STREAM, seed, step])).random_raw(
        batch * (1 + 2 * model.depth)
    )
    uniforms = (words >> np.uint64(11)) / 2.0**53
    drop_label = uniforms[:batch] < model.label_drop
    uniform = uniforms[batch:].reshape(model.depth, 2, batch)
    rates = np.linspace(0.0, model.drop_path, model.depth)
    if not rates.any():
        return Draws(drop_label, None)
    keep = (1 - rates)[:, None, None]
    return Draws(drop_label, ((uniform < keep) / keep).astype(np.float32))
