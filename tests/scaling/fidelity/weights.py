"""Inception weights that anyone can make again: numbers of one seed, in the order of the keys' names."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from scaling.fidelity.inception import Inception


@cache
def random_weights() -> dict[str, Tensor]:
    """A state dict that keeps activations near 1 through all layers."""
    rng = np.random.default_rng(0)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Inception().state_dict().items()}
    state = {}
    for key in sorted(shapes):
        shape = shapes[key]
        if key.endswith("num_batches_tracked"):
            continue
        if len(shape) > 1:
            value = rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif key.endswith(("running_var", "bn.weight")):
            value = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            value = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        state[key] = torch.from_numpy(value)
    return state


def random_images(count: int, side: int) -> Tensor:
    """uint8 (count, 3, side, side) of one seed."""
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8))
