"""VAR: next-scale prediction (VAR, 2404.02905), the whole transformer in one file.

- The start token of every image is its class embedding, which is also the condition of every
  adaLN; label ``num_classes`` is the null class of classifier-free guidance.
- Input of scale k+1 is the area-downsampled cumulative reconstruction up to scale k
  (``MultiScaleQuantizer.teacher_inputs``); all tokens of a scale are predicted at once.
- No randomness inside: label drop changes the labels given, drop path comes in as factors
  (``scaling.draws``), so that a step is a pure function of its arguments on any number of processes.
- Precision as published: embeddings and the head's norm in fp32, the blocks in the autocast type.

Shapes: B images, L tokens (l without the first scale), D depth, H heads, E head width, W width,
C latent channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.config import ModelConfig
from scaling.layers.attention import KeyValueCache, block_causal_mask, blockwise_attention, masked_attention

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
MAX_LOG_SCALE = math.log(100)


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without learned parameters; adaLN brings scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Block(nn.Module):
    """Attention and MLP, each between an adaLN and a gated residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        w = config.width
        self.heads, self.qk_norm = config.heads, config.qk_norm
        self.qkv = nn.Linear(w, 3 * w, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(w))
        self.v_bias = nn.Parameter(torch.zeros(w))  # k has none: softmax is blind to it
        self.attention_out = nn.Linear(w, w)
        self.mlp_in = nn.Linear(w, config.mlp_ratio * w)
        self.mlp_out = nn.Linear(config.mlp_ratio * w, w)
        if config.qk_norm:
            self.qk_log_scale = nn.Parameter(torch.full((config.heads,), math.log(4.0)))
        if config.shared_adaln:
            self.adaln_offset = nn.Parameter(torch.randn(6, w) / w**0.5)
        else:
            self.adaln = nn.Linear(w, 6 * w)

    def modulation(self, cond_BW: Tensor) -> tuple[Tensor, ...]:
        """γ1, γ2, scale1, scale2, shift1, shift2 of this layer, each (B, 1, W).

        Args:
            cond_BW: the class embedding, or (B, 6, W) from the shared adaLN.
        """
        if hasattr(self, "adaln"):
            return self.adaln(F.silu(cond_BW)).unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)
        return (self.adaln_offset + cond_BW).unsqueeze(1).unbind(2)

    def forward(
        self, x_BLW: Tensor, cond: Tensor, attend: Attend, path_scale_2B: Tensor | None = None
    ) -> Tensor:
        """One layer; ``path_scale_2B`` multiplies the two residual branches of each image (drop path)."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(cond)
        if path_scale_2B is not None:
            gate1 = gate1 * path_scale_2B[0, :, None, None].to(gate1.dtype)
            gate2 = gate2 * path_scale_2B[1, :, None, None].to(gate2.dtype)
        x_BLW = x_BLW + gate1 * self.attention(layer_norm(x_BLW) * (1 + scale1) + shift1, attend)
        hidden = F.gelu(self.mlp_in(layer_norm(x_BLW) * (1 + scale2) + shift2), approximate="tanh")
        return x_BLW + gate2 * self.mlp_out(hidden)

    def attention(self, x_BLW: Tensor, attend: Attend) -> Tensor:
        """Multi-head attention; q and k of unit length with a learned scale per head if ``qk_norm``."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BLW, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        q_BHLE, k_BHLE, v_BHLE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.qk_norm:
            factor_H11 = self.qk_log_scale.clamp_max(MAX_LOG_SCALE).exp()[:, None, None]
            dtype = v_BHLE.dtype
            q_BHLE = (F.normalize(q_BHLE, dim=-1) * factor_H11).to(dtype)
            k_BHLE = F.normalize(k_BHLE, dim=-1).to(dtype)
            scale = 1.0
        else:
            scale = 0.25 / math.sqrt(q_BHLE.shape[-1])  # as published, not the usual 1/√64
        out_BHLE = attend(q_BHLE, k_BHLE, v_BHLE, scale)
        return self.attention_out(out_BHLE.transpose(1, 2).flatten(2))


class VAR(nn.Module):
    """The transformer. ``forward`` is teacher forcing; ``begin`` and ``extend`` sample with a cache."""

    NO_DECAY = ("start_position", "positions", "scale_embedding", "adaln_offset")
    """Weight decay also leaves out biases and everything one-dimensional, as published."""

    def __init__(self, config: ModelConfig, attention: Literal["masked", "blockwise"] = "masked") -> None:
        super().__init__()
        self.config, self.attention_backend = config, attention
        w, scales = config.width, config.scales
        self.class_embedding = nn.Embedding(config.num_classes + 1, w)
        self.token_embedding = nn.Linear(config.latent_channels, w)
        self.start_position = nn.Parameter(torch.empty(scales[0] ** 2, w))
        self.positions = nn.Parameter(torch.empty(config.seq_len, w))
        self.scale_embedding = nn.Embedding(len(scales), w)
        if config.shared_adaln:
            self.shared_adaln = nn.Linear(w, 6 * w)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_adaln = nn.Linear(w, 2 * w)
        self.head = nn.Linear(w, config.vocab)
        level_L = torch.cat([torch.full((s * s,), k) for k, s in enumerate(scales)])
        self.register_buffer("level_L", level_L, persistent=False)
        self.register_buffer("mask_LL", block_causal_mask(scales), persistent=False)
        self.level_L: Tensor
        self.mask_LL: Tensor
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The published initialisation: truncated normal of std √(1/(3w)), small gates, a small head."""
        config, std = self.config, math.sqrt(1 / (3 * self.config.width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        nn.init.trunc_normal_(self.start_position, std=std)
        nn.init.trunc_normal_(self.positions, std=std)
        self.head.weight.mul_(config.init_head)
        self.head_adaln.weight.mul_(config.init_adaln)
        gates = 2 * config.width  # γ1 and γ2 come first
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention_out.weight.div_(math.sqrt(2 * config.depth))
            block.mlp_out.weight.div_(math.sqrt(2 * config.depth))
            if config.shared_adaln:
                block.adaln_offset[:2].mul_(config.init_adaln_gamma)
                block.adaln_offset[2:].mul_(config.init_adaln)
            else:
                block.adaln.weight[:gates].mul_(config.init_adaln_gamma)
                block.adaln.weight[gates:].mul_(config.init_adaln)

    def forward(self, labels_B: Tensor, inputs_BlC: Tensor, path_scale_D2B: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) in fp32 for every token, given the true tokens of coarser scales.

        Args:
            labels_B: class ids; ``num_classes`` is the null class.
            inputs_BlC: ``MultiScaleQuantizer.teacher_inputs`` of the true tokens.
            path_scale_D2B: drop-path factors per layer, branch and image; None in evaluation.
        """
        with _full_precision(labels_B.device):
            cond_BW = self.class_embedding(labels_B)
            start_BLW = cond_BW[:, None] + self.start_position
            x_BLW = torch.cat([start_BLW, self.token_embedding(inputs_BlC.float())], dim=1)
            x_BLW = x_BLW + self._position(0, self.config.seq_len)
        cond = self._condition(cond_BW)
        x_BLW = x_BLW.to(_compute_dtype(x_BLW))
        for index, block in enumerate(self.blocks):
            x_BLW = block(
                x_BLW, cond, self._attend, None if path_scale_D2B is None else path_scale_D2B[index]
            )
        return self._logits(x_BLW, cond_BW)

    # -- sampling, one scale at a time -----------------------------------------------------------

    def begin(self, labels_B: Tensor) -> tuple[Tensor, list[KeyValueCache]]:
        """The class embedding (B, W) and empty caches for ``extend``."""
        cond_BW, config = self.class_embedding(labels_B), self.config
        like = cond_BW.new_empty(0, dtype=_compute_dtype(cond_BW))
        shape = (len(labels_B), config.heads, config.seq_len, config.width // config.heads)
        return cond_BW, [KeyValueCache(*shape, like=like) for _ in self.blocks]

    def extend(
        self, scale: int, cond_BW: Tensor, caches: list[KeyValueCache], inputs_BlC: Tensor | None
    ) -> Tensor:
        """Logits (B, l, V) of scale number ``scale``; fills the caches.

        Args:
            inputs_BlC: the downsampled cumulative reconstruction; None at the first scale.
        """
        side, first = self.config.scales[scale], caches[0].filled
        with _full_precision(cond_BW.device):
            if inputs_BlC is None:
                x_BLW = cond_BW[:, None] + self.start_position
            else:
                x_BLW = self.token_embedding(inputs_BlC.float())
            x_BLW = x_BLW + self._position(first, first + side * side)
        cond = self._condition(cond_BW)
        x_BLW = x_BLW.to(_compute_dtype(x_BLW))
        for block, cache in zip(self.blocks, caches, strict=True):
            x_BLW = block(x_BLW, cond, _cached_attention(cache))
        return self._logits(x_BLW, cond_BW)

    # -- parts -----------------------------------------------------------------------------------

    def _position(self, start: int, end: int) -> Tensor:
        return self.positions[start:end] + self.scale_embedding(self.level_L[start:end])

    def _condition(self, cond_BW: Tensor) -> Tensor:
        """What the blocks' adaLN take: the class embedding, or (B, 6, W) when shared."""
        if self.config.shared_adaln:
            return self.shared_adaln(F.silu(cond_BW)).unflatten(-1, (6, -1))
        return cond_BW

    def _attend(self, q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float) -> Tensor:
        if self.attention_backend == "masked":
            return masked_attention(q_BHLE, k_BHLE, v_BHLE, scale, self.mask_LL)
        return blockwise_attention(q_BHLE, k_BHLE, v_BHLE, scale, self.config.scales)

    def _logits(self, x_BLW: Tensor, cond_BW: Tensor) -> Tensor:
        scale_BW, shift_BW = self.head_adaln(F.silu(cond_BW)).chunk(2, dim=-1)
        normed = layer_norm(x_BLW.float()) * (1 + scale_BW[:, None]) + shift_BW[:, None]
        return self.head(normed).float()


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast type if autocast is on here, else the tensor's own."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast off inside; the meta device, on which FLOPs are counted, knows no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _cached_attention(cache: KeyValueCache) -> Attend:
    """Attention of one new scale over everything in the cache; no mask is needed."""

    def attend(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float) -> Tensor:
        keys, values = cache.extend(k_BHLE, v_BHLE)
        return F.scaled_dot_product_attention(q_BHLE, keys, values, scale=scale)

    return attend
