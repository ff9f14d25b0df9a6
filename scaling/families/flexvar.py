"""FlexVAR: next-scale prediction of ground truth, with any number and size of steps (FlexVAR, 2502.20313).

Beside what all next-scale models share (``scaling.families.next_scale``):
- Every step's tokens are those of the image itself at that size, not of what the steps before left over
  (``ScalableQuantizer``); a step's input is the codes of the step before, enlarged.
- Positions are one learned map, twice as wide and high as the largest step, area-averaged to each step's
  size: any size and aspect ratio has positions. No step embedding.
- Trained on random steps (``scaling.steps``).

Shapes: L tokens, W width; a step is (h, w) tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.families.next_scale import NextScale
from scaling.layers.attention import Size


class FlexVAR(NextScale):
    """The transformer of the paper; samples with steps that it was not trained on, rectangular ones too."""

    def make_positions(self) -> None:
        """One map for all sizes."""
        side = 2 * self.config.scales[-1]
        self.positions = nn.Parameter(torch.empty(self.config.width, side, side))

    def initialise_positions(self, std: float) -> None:
        """Sine and cosine; ``std`` is not used."""
        self.positions.copy_(sin_cos_map(self.config.width, *self.positions.shape[1:]))

    def positions_of(self, sizes: Sequence[Size]) -> Tensor:
        """The map area-averaged to each step's size, (L, W)."""
        return torch.cat([self._resized(size) for size in sizes])

    def step_positions(self, sizes: tuple[Size, ...], step: int) -> Tensor:
        """Of one step alone: the others need not be resized for it."""
        return self._resized(sizes[step])

    def _resized(self, size: Size) -> Tensor:
        resized_WHW = F.interpolate(self.positions[None], size, mode="area")[0]
        return resized_WHW.flatten(1).T


def sin_cos_map(width: int, rows: int, columns: int) -> Tensor:
    """The published start (width, rows, columns): even channels the sine of the row, odd ones the cosine of
    the column, at frequencies 10000^(−2i/width)."""
    rate_i = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    sine_iR1 = torch.sin(rate_i[:, None] * torch.arange(rows)).unsqueeze(2)
    cosine_i1C = torch.cos(rate_i[:, None] * torch.arange(columns)).unsqueeze(1)
    both_i2RC = torch.stack(torch.broadcast_tensors(sine_iR1, cosine_i1C), dim=1)
    return both_i2RC.flatten(0, 1)
