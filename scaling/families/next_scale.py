"""What all next-scale models share: class token, steps of tokens, layers, head, and sampling step by step.

- The start token of every image is its class embedding, which is also the condition of every adaLN; label
  ``num_classes`` is the null class of classifier-free guidance.
- All tokens of a step are predicted at once, from codes that follow from the steps before (the quantiser's
  ``teacher_inputs``) at the positions of the step.
- No randomness inside: label drop changes the labels given, drop path comes in as factors
  (``scaling.draws``), so that a training step is a pure function of its arguments on any number of processes.
- Precision as published: embeddings and the head's norm in fp32, the layers in the autocast type.

A family says what its positions are, what its layers mix with, and how that goes on from step to step.

Shapes: B images, L tokens (l of one step), D depth, W width, C latent channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scaling.config import ModelConfig
from scaling.families.interface import Decoding, guided_labels
from scaling.layers.attention import Backend, KeyValueCache, Size, block_causal
from scaling.layers.block import (
    Block,
    Head,
    SelfAttention,
    compute_dtype,
    full_precision,
    truncated_normal,
)


class NextScale(nn.Module):
    """The transformer: ``forward`` is teacher forcing, ``begin`` and ``extend`` sample with a cache."""

    NO_DECAY: tuple[str, ...] = ("start_position", "positions", "adaln_offset")
    """Weight decay also leaves out biases and everything one-dimensional, as published."""

    def __init__(self, config: ModelConfig, attention: Backend = "auto") -> None:
        super().__init__()
        self.config, self.attention_backend = config, attention
        w = config.width
        self.class_embedding = nn.Embedding(config.num_classes + 1, w)
        self.token_embedding = nn.Linear(config.latent_channels, w)
        self.start_position = nn.Parameter(torch.empty(config.scales[0] ** 2, w))
        if config.adaln == "shared":
            self.shared_adaln = nn.Linear(w, 6 * w)
        self.blocks = nn.ModuleList(Block(config, self.mixer(layer)) for layer in range(config.depth))
        self.head = Head(config)
        self.make_positions()
        self.initialise()

    # -- what a family says ------------------------------------------------------------------------

    def mixer(self, layer: int) -> nn.Module:
        """The token mixer of a layer."""
        return SelfAttention(self.config, score_scale=0.25 / math.sqrt(64))  # as published, not 1/√64

    def make_positions(self) -> None:
        """Make the parameters that ``positions_of`` reads."""
        raise NotImplementedError

    def initialise_positions(self, std: float) -> None:
        """Fill them."""
        raise NotImplementedError

    def positions_of(self, sizes: Sequence[Size]) -> Tensor:
        """What is added to the tokens of these steps, (L, W)."""
        raise NotImplementedError

    def teacher_places(self, sizes: tuple[Size, ...], device: torch.device) -> list[Any]:
        """Each layer's ``place`` when all steps are there at once."""
        return [block_causal(sizes, self.attention_backend, device)] * self.config.depth

    def cached_places(self, sizes: tuple[Size, ...], batch: int, like: Tensor) -> list[Any]:
        """Each layer's ``place`` for going on step by step, empty; ``like`` has its type and device."""
        config = self.config
        shape = (batch, config.heads, sum(h * w for h, w in sizes), config.width // config.heads)
        return [KeyValueCache(*shape, like=like).attend for _ in range(config.depth)]

    def enter_step(self, places: list[Any], sizes: tuple[Size, ...], step: int) -> None:
        """Called before a step goes through the layers; attention needs nothing."""

    # -- training ----------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self) -> None:
        """The published start: truncated normal of std √(1/(3w)), small gates, a small head."""
        std = math.sqrt(1 / (3 * self.config.width))
        truncated_normal(self, std)
        nn.init.trunc_normal_(self.start_position, std=std)
        self.initialise_positions(std)
        self.head.initialise(self.config)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.initialise(self.config)

    def forward(
        self,
        labels_B: Tensor,
        inputs_BlC: Tensor,
        path_scale_D2B: Tensor | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> Tensor:
        """Logits (B, L, V) in fp32 for every token, given the true tokens of coarser steps.

        Arguments as of ``features``.
        """
        return self.head.to_vocab(self.features(labels_B, inputs_BlC, path_scale_D2B, sizes)).float()

    def features(
        self,
        labels_B: Tensor,
        inputs_BlC: Tensor,
        path_scale_D2B: Tensor | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> Tensor:
        """What ``head.to_vocab`` makes the logits of, (B, L, W) in fp32.

        Args:
            labels_B: class ids; ``num_classes`` is the null class.
            inputs_BlC: the quantiser's ``teacher_inputs`` of the true tokens, all steps but the first.
            path_scale_D2B: drop-path factors per layer, branch and image; None in evaluation.
            sizes: the steps (h, w); None for the config's.
        """
        steps = self.config.sizes if sizes is None else tuple(sizes)
        with full_precision(labels_B.device):
            cond_BW = self.class_embedding(labels_B)
            x_BLW = torch.cat([self._start(cond_BW), self.token_embedding(inputs_BlC.float())], dim=1)
            x_BLW = x_BLW + self.positions_of(steps)
        cond = self._condition(cond_BW)
        x_BLW = x_BLW.to(compute_dtype(x_BLW))
        places = self.teacher_places(steps, x_BLW.device)
        for layer, (block, place) in enumerate(zip(self.blocks, places, strict=True)):
            path_scale_2B = None if path_scale_D2B is None else path_scale_D2B[layer]
            x_BLW = block(x_BLW, cond, place, path_scale_2B)
        return self.head.features(x_BLW, cond_BW)

    # -- sampling, one step at a time ----------------------------------------------------------------

    def chunks(self, sizes: Sequence[Size] | None = None) -> list[int]:
        """Tokens that each call of ``extend`` predicts: those of one step."""
        return [h * w for h, w in (self.config.sizes if sizes is None else sizes)]

    def begin(self, labels_B: Tensor, sizes: Sequence[Size] | None = None, guided: bool = False) -> Decoding:
        """Start sampling images of these classes and steps (None: the config's), with guidance or without."""
        steps = self.config.sizes if sizes is None else tuple(sizes)
        labels_B = guided_labels(labels_B, self.config.num_classes, guided)
        with full_precision(labels_B.device):
            cond_BW = self.class_embedding(labels_B)
        cond = self._condition(cond_BW)
        like = cond_BW.new_empty(0, dtype=compute_dtype(cond_BW))
        return Decoding(
            sizes=steps,
            cond_BW=cond_BW,
            modulations=[block.modulation(cond) for block in self.blocks],  # type: ignore[operator]
            places=self.cached_places(steps, len(labels_B), like),
            guided=guided,
        )

    def extend(self, decoding: Decoding, inputs_BlC: Tensor | None, guidance: float = 0.0) -> Tensor:
        """Logits (B, l, V) of the next step.

        Args:
            inputs_BlC: the codes that the step is predicted from; None at the first.
            guidance: t of c + t·(c − u), if the decoding is guided.
        """
        step, cond_BW = decoding.step, decoding.cond_BW
        with full_precision(cond_BW.device):
            if inputs_BlC is None:
                x_BLW = self._start(cond_BW)
            else:
                x_BLW = self.token_embedding(inputs_BlC.float())
                x_BLW = x_BLW.repeat(2, 1, 1) if decoding.guided else x_BLW
            x_BLW = x_BLW + self.step_positions(decoding.sizes, step)
        x_BLW = x_BLW.to(compute_dtype(x_BLW))
        self.enter_step(decoding.places, decoding.sizes, step)
        for block, modulation, place in zip(self.blocks, decoding.modulations, decoding.places, strict=True):
            x_BLW = block.modulated(x_BLW, modulation, place)  # type: ignore[operator]
        decoding.step += 1
        return self.head(x_BLW, cond_BW, guidance if decoding.guided else None)

    def step_positions(self, sizes: tuple[Size, ...], step: int) -> Tensor:
        """What is added to the tokens of one step, (l, W)."""
        start = sum(h * w for h, w in sizes[:step])
        h, w = sizes[step]
        return self.positions_of(sizes)[start : start + h * w]

    # -- parts ---------------------------------------------------------------------------------------

    def _start(self, cond_BW: Tensor) -> Tensor:
        """The first step's tokens: the class embedding at every place."""
        return cond_BW[:, None] + self.start_position

    def _condition(self, cond_BW: Tensor) -> Tensor | None:
        """What the layers' modulation takes: the class embedding, (B, 6, W) when shared, None without."""
        if self.config.adaln == "none":
            return None
        if self.config.adaln == "shared":
            return self.shared_adaln(nn.functional.silu(cond_BW)).unflatten(-1, (6, -1))
        return cond_BW
