"""Raster-scan next-token prediction: the baseline that VAR is measured against (as in VQGAN, 2012.09841).

- A GPT-2: plain layer norms, no gates, attention scores scaled by 1/√64, learned positions.
- The tokens of one map, row by row; the first is predicted from the class alone, token i from the class and
  the tokens before it. Label ``num_classes`` is the null class of classifier-free guidance.
- ``extend`` predicts one token at a time with a key-value cache.

Shapes: B images, L tokens, D depth, W width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scaling.config import ModelConfig
from scaling.families.interface import Decoding, guided_labels
from scaling.layers.attention import Backend, KeyValueCache, Size, causal
from scaling.layers.block import (
    Block,
    Head,
    SelfAttention,
    compute_dtype,
    full_precision,
    truncated_normal,
)
from scaling.schema import require


class Raster(nn.Module):
    """The transformer. ``forward`` is teacher forcing; ``begin`` and ``extend`` sample with a cache."""

    NO_DECAY: tuple[str, ...] = ("positions",)
    """Weight decay also leaves out biases and everything one-dimensional."""

    def __init__(self, config: ModelConfig, attention: Backend = "auto") -> None:
        """``attention`` is for families with steps; causal attention has one form."""
        super().__init__()
        self.config = config
        w = config.width
        self.class_embedding = nn.Embedding(config.num_classes + 1, w)
        self.token_embedding = nn.Embedding(config.vocab, w)
        self.positions = nn.Parameter(torch.empty(config.seq_len, w))
        score_scale = 1 / math.sqrt(w // config.heads)
        self.blocks = nn.ModuleList(
            Block(config, SelfAttention(config, score_scale)) for _ in range(config.depth)
        )
        self.head = Head(config)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As the next-scale models: truncated normal of std √(1/(3w)), small branches, a small head."""
        std = math.sqrt(1 / (3 * self.config.width))
        truncated_normal(self, std)
        nn.init.trunc_normal_(self.positions, std=std)
        self.head.initialise(self.config)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.initialise(self.config)

    def forward(
        self,
        labels_B: Tensor,
        tokens_BL: Tensor,
        path_scale_D2B: Tensor | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> Tensor:
        """Logits (B, L, V) in fp32 for every token, given the class and the true tokens before it.

        Arguments as of ``features``.
        """
        return self.head.to_vocab(self.features(labels_B, tokens_BL, path_scale_D2B, sizes)).float()

    def features(
        self,
        labels_B: Tensor,
        tokens_BL: Tensor,
        path_scale_D2B: Tensor | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> Tensor:
        """What ``head.to_vocab`` makes the logits of, (B, L, W) in fp32.

        Args:
            labels_B: class ids; ``num_classes`` is the null class.
            tokens_BL: the true tokens; the last is not looked at.
            path_scale_D2B: drop-path factors per layer, branch and image; None in evaluation.
            sizes: None, or the one map of the config.
        """
        self._check(sizes)
        with full_precision(labels_B.device):
            cond_BW = self.class_embedding(labels_B)
            x_BLW = torch.cat([cond_BW[:, None], self.token_embedding(tokens_BL[:, :-1])], dim=1)
            x_BLW = x_BLW + self.positions
        x_BLW = x_BLW.to(compute_dtype(x_BLW))
        for layer, block in enumerate(self.blocks):
            x_BLW = block(x_BLW, None, causal, None if path_scale_D2B is None else path_scale_D2B[layer])
        return self.head.features(x_BLW, cond_BW)

    def chunks(self, sizes: Sequence[Size] | None = None) -> list[int]:
        """Tokens that each call of ``extend`` predicts: one."""
        self._check(sizes)
        return [1] * self.config.seq_len

    def begin(self, labels_B: Tensor, sizes: Sequence[Size] | None = None, guided: bool = False) -> Decoding:
        """Start sampling images of these classes, with guidance or without."""
        self._check(sizes)
        config = self.config
        labels_B = guided_labels(labels_B, config.num_classes, guided)
        with full_precision(labels_B.device):
            cond_BW = self.class_embedding(labels_B)
        like = cond_BW.new_empty(0, dtype=compute_dtype(cond_BW))
        shape = (len(labels_B), config.heads, config.seq_len, config.width // config.heads)
        places = [KeyValueCache(*shape, like=like).attend for _ in range(config.depth)]
        return Decoding(config.sizes, cond_BW, [()] * config.depth, places, guided)

    def extend(self, decoding: Decoding, tokens_B1: Tensor | None, guidance: float = 0.0) -> Tensor:
        """Logits (B, 1, V) of the next token.

        Args:
            tokens_B1: the token before it; None at the first.
            guidance: t of c + t·(c − u), if the decoding is guided.
        """
        cond_BW = decoding.cond_BW
        with full_precision(cond_BW.device):
            if tokens_B1 is None:
                x_B1W = cond_BW[:, None]
            else:
                x_B1W = self.token_embedding(tokens_B1)
                x_B1W = x_B1W.repeat(2, 1, 1) if decoding.guided else x_B1W
            x_B1W = x_B1W + self.positions[decoding.step]
        x_B1W = x_B1W.to(compute_dtype(x_B1W))
        for block, place in zip(self.blocks, decoding.places, strict=True):
            x_B1W = block.modulated(x_B1W, (), place)  # type: ignore[operator]
        decoding.step += 1
        return self.head(x_B1W, cond_BW, guidance if decoding.guided else None)

    def _check(self, sizes: Sequence[Size] | None) -> None:
        require(
            sizes is None or tuple(sizes) == self.config.sizes,
            f"raster draws one map of {self.config.scales[0]} x {self.config.scales[0]} tokens; other steps "
            "need a FlexVAR",
        )
