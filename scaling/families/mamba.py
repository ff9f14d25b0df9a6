"""FlexVAR-Mamba: FlexVAR with selective state spaces in the place of attention (FlexVAR, appendix on Mamba).

The paper's:
- FlexVAR in all else: ground truth at every step, scalable positions, any steps.
- A causal scan cannot let all tokens of a step see each other; layers therefore take turns with eight zigzag
  paths through a step (ZigMa, 2403.13802), two from each corner. No attention layers beside it, unlike
  earlier Mamba models of next-scale prediction.
- At depths 16 and 20: 370 M and 700 M parameters (310 M and 600 M with attention), FID 4.22 and 3.80 after 40
  epochs against 4.32 and 3.71.

Chosen here, where the paper is silent and no code was published:
- One scan over all steps, coarse to fine: a token sees every coarser step, and of its own step what comes
  before it on the path. It may, as all inputs of a step are known when the step is predicted.
- Only attention is replaced; adaLN and the MLP stay. A layer's matrices are 6·w² + 4·w·(R + S) of the mixer
  (rank R = ⌈w/16⌉ of Δ, S numbers of state), 8·w² of the MLP and 6·w² of adaLN: 20.25·w² + 64·w at the usual
  S = 16, N(d) = 82944·d³ + 4096·d². With the published vocabulary that is 355 M and 684 M parameters in all
  at depths 16 and 20; without the MLP it would be 221 M and 422 M, far from the paper's.
- The mixer is Mamba's own (so is AiM's, 2408.12245): state 16, two channels per width, four taps.
- Rows before columns among the two paths of a corner.

Shapes: L tokens, W width; a step is (h, w) tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scaling.families.flexvar import FlexVAR
from scaling.layers.attention import Size
from scaling.layers.block import Block
from scaling.layers.mamba import Mamba, ScanPlace
from scaling.layers.zigzag import PATHS, pyramid_path


class FlexVARMamba(FlexVAR):
    """The model; the attention back end does not matter to it."""

    NO_DECAY = (*FlexVAR.NO_DECAY, *Mamba.NO_DECAY)

    def mixer(self, layer: int) -> nn.Module:
        """A selective state space; its path is the layer's place in eight."""
        config = self.config
        return Mamba(config.width, config.ssm_state, config.ssm_expand, config.ssm_conv)

    def teacher_places(self, sizes: tuple[Size, ...], device: torch.device) -> list[Any]:
        """The path through all steps, from no state."""
        return [ScanPlace(*pyramid_path(sizes, layer % PATHS, device)) for layer in range(self.config.depth)]

    def cached_places(self, sizes: tuple[Size, ...], batch: int, like: Tensor) -> list[Any]:
        """The first step's path, from no state."""
        places = self.teacher_places(sizes[:1], like.device)
        for place in places:
            place.goes_on = True
        return places

    def enter_step(self, places: list[Any], sizes: tuple[Size, ...], step: int) -> None:
        """The step's path, from the state that the last one ended in."""
        for place, alone in zip(
            places, self.teacher_places((sizes[step],), places[0].order_L.device), strict=True
        ):
            place.order_L, place.inverse_L = alone.order_L, alone.inverse_L

    @torch.no_grad()
    def initialise(self) -> None:
        """As FlexVAR; then what is Mamba's own."""
        super().initialise()
        for block in self.blocks:
            assert isinstance(block, Block)
            assert isinstance(block.mixer, Mamba)
            block.mixer.initialise()
