"""VAR: next-scale prediction of what the coarser scales left over (VAR, 2404.02905).

Beside what all next-scale models share (``scaling.families.next_scale``):
- The input of scale k+1 is the area-downsampled cumulative reconstruction up to scale k.
- Every token has a learned position of its own, every scale a learned embedding: the scales are fixed.
- The published variants: adaLN of every layer, shared (``-s``), or none; with and without QK normalisation.

Shapes: L tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scaling.families.next_scale import NextScale
from scaling.layers.attention import Size
from scaling.schema import require


class VAR(NextScale):
    """The transformer of the paper; its scales are those of the config and no others."""

    NO_DECAY = (*NextScale.NO_DECAY, "scale_embedding")

    def make_positions(self) -> None:
        """One per token and one per scale."""
        config = self.config
        self.positions = nn.Parameter(torch.empty(config.seq_len, config.width))
        self.scale_embedding = nn.Embedding(len(config.scales), config.width)
        level_L = torch.cat([torch.full((s * s,), k) for k, s in enumerate(config.scales)])
        self.register_buffer("level_L", level_L, persistent=False)
        self.level_L: Tensor

    def initialise_positions(self, std: float) -> None:
        """Truncated normal; the scales' embedding is one of the matrices."""
        nn.init.trunc_normal_(self.positions, std=std)

    def positions_of(self, sizes: Sequence[Size]) -> Tensor:
        """What is added to the tokens, (L, W).

        Raises:
            ConfigError: other scales than the trained ones.
        """
        require(
            tuple(sizes) == self.config.sizes,
            f"a VAR samples with the scales that it was trained on, {list(self.config.scales)}; other steps "
            "need a FlexVAR",
        )
        return self.positions + self.scale_embedding(self.level_L)
