"""One layer: a token mixer and an MLP, each behind a layer norm and, with adaLN, a gated residual.

- Where a norm's scale and shift and a branch's gate come from is ``ModelConfig.adaln``: a matrix of the
  layer's own (``own``), one for all layers plus learned offsets (``shared``), or learned vectors and no
  gates (``none``: the GPT-2 block, and VAR without adaLN).
- The mixer is self-attention, or whatever a family brings in its place. How its tokens see each other
  (``place``) is handed through: the same layer serves teacher forcing and cached sampling.
- With ``recompute`` training keeps only a layer's input, and computes the rest again when its gradient is
  due (activation checkpointing, 1604.06174). Nothing random happens in a layer, so the numbers are the same,
  bit for bit; a step takes up to a third more products, which no count of FLOPs here includes.

Shapes: B images, L tokens, H heads, E head width, W width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scaling.config import ModelConfig
from scaling.layers.linear import Linear, linear

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From q, k, v (B, H, L, E) and the scale of the scores to what every token gets."""
Modulation = tuple[Tensor, ...]
"""γ1, γ2, scale1, scale2, shift1, shift2 of a layer, each (B, 1, W); empty without adaLN."""
MAX_LOG_SCALE = math.log(100)
NORM_EPS = 1e-6
NORMALIZE_EPS = 1e-12
"""The least length that a query or key is divided by."""


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without learned parameters; adaLN brings scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class SelfAttention(nn.Module):
    """Multi-head attention; q and k of unit length with a learned scale per head if ``qk_norm``.

    Args:
        score_scale: of the scores without ``qk_norm``.
    """

    def __init__(self, config: ModelConfig, score_scale: float) -> None:
        super().__init__()
        w = config.width
        self.heads, self.qk_norm, self.score_scale = config.heads, config.qk_norm, score_scale
        self.qkv = nn.Linear(w, 3 * w, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(w))
        self.v_bias = nn.Parameter(torch.zeros(w))  # k has none: softmax is blind to it
        self.out = Linear(w, w)
        if config.qk_norm:
            self.log_scale = nn.Parameter(torch.full((config.heads,), math.log(4.0)))

    def forward(self, x_BLW: Tensor, attend: Attend) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x_BLW, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        qk, v_BLHE = qkv[:, :, :2], qkv[:, :, 2]
        scale = self.score_scale
        if self.qk_norm:
            factor_H = self.log_scale.clamp_max(MAX_LOG_SCALE).exp()
            precise = torch.promote_types(qk.dtype, torch.float32)
            length_BL2H = torch.linalg.vector_norm(qk, dim=-1, dtype=precise).clamp_min(NORMALIZE_EPS)
            # One factor for both, so that the vectors are gone through once.
            factor_BL2H = torch.stack([factor_H, torch.ones_like(factor_H)]) / length_BL2H
            qk = (qk * factor_BL2H[..., None]).to(v_BLHE.dtype)
            scale = 1.0
        q_BHLE, k_BHLE = qk.transpose(1, 3).unbind(2)
        out_BHLE = attend(q_BHLE, k_BHLE, v_BLHE.transpose(1, 2), scale)
        out_BLW: Tensor = self.out(out_BHLE.transpose(1, 2).flatten(2))
        return out_BLW


class Block(nn.Module):
    """One layer around a mixer: a module that maps (x_BLW, place) to (B, L, W) and ends in ``mixer.out``."""

    def __init__(self, config: ModelConfig, mixer: nn.Module) -> None:
        super().__init__()
        w = config.width
        self.kind = config.adaln
        self.recompute = False
        """Whether training keeps only the layer's input."""
        self.mixer = mixer
        self.mlp_in = Linear(w, config.mlp_ratio * w, gelu=True)
        self.mlp_out = Linear(config.mlp_ratio * w, w)
        if config.adaln == "own":
            self.adaln = nn.Linear(w, 6 * w)
        elif config.adaln == "shared":
            self.adaln_offset = nn.Parameter(torch.randn(6, w) / w**0.5)
        else:
            self.norm1 = nn.LayerNorm(w, eps=NORM_EPS)
            self.norm2 = nn.LayerNorm(w, eps=NORM_EPS)

    def modulation(self, cond: Tensor | None) -> Modulation:
        """This layer's own, from the condition; it is the same for all tokens of an image.

        Args:
            cond: the class embedding (B, W); (B, 6, W) from the shared adaLN; None without adaLN.
        """
        if cond is None:
            return ()
        if self.kind == "own":
            return self.adaln(F.silu(cond)).unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)
        return (self.adaln_offset + cond).unsqueeze(1).unbind(2)

    def forward(
        self, x_BLW: Tensor, cond: Tensor | None, place: Any, path_scale_2B: Tensor | None = None
    ) -> Tensor:
        """One layer under teacher forcing.

        Args:
            cond: as of ``modulation``.
            place: what the mixer needs to know beside the tokens (attention: an ``Attend``).
            path_scale_2B: factors on the two residual branches of each image (drop path).
        """
        if self.recompute and torch.is_grad_enabled():
            result: Tensor = checkpoint(
                self._conditioned, x_BLW, cond, place, path_scale_2B,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            return result
        return self._conditioned(x_BLW, cond, place, path_scale_2B)

    def _conditioned(
        self, x_BLW: Tensor, cond: Tensor | None, place: Any, path_scale_2B: Tensor | None
    ) -> Tensor:
        return self.modulated(x_BLW, self.modulation(cond), place, path_scale_2B)

    def modulated(
        self, x_BLW: Tensor, modulation: Modulation, place: Any, path_scale_2B: Tensor | None = None
    ) -> Tensor:
        """One layer, its modulation known: sampling computes it once for all steps."""
        mixed = self.mixer(self._normed(x_BLW, modulation, 0), place)
        x_BLW = self._added(x_BLW, mixed, modulation, 0, path_scale_2B)
        out = self.mlp_out(self.mlp_in(self._normed(x_BLW, modulation, 1)))
        return self._added(x_BLW, out, modulation, 1, path_scale_2B)

    def _normed(self, x_BLW: Tensor, modulation: Modulation, branch: int) -> Tensor:
        if not modulation:
            return (self.norm1, self.norm2)[branch](x_BLW)
        return torch.addcmul(modulation[4 + branch], layer_norm(x_BLW), 1 + modulation[2 + branch])

    def _added(
        self,
        x_BLW: Tensor,
        branch_BLW: Tensor,
        modulation: Modulation,
        branch: int,
        path_scale_2B: Tensor | None,
    ) -> Tensor:
        """The residual x with a branch through its gate and its drop path."""
        if path_scale_2B is None:
            return torch.addcmul(x_BLW, modulation[branch], branch_BLW) if modulation else x_BLW + branch_BLW
        kept_B11 = path_scale_2B[branch, :, None, None].to(x_BLW.dtype)
        gate = modulation[branch] * kept_B11 if modulation else kept_B11
        return torch.addcmul(x_BLW, gate, branch_BLW)

    @torch.no_grad()
    def initialise(self, config: ModelConfig) -> None:
        """After the truncated normal of all matrices: small branches, and small gates with adaLN."""
        for last in (self.mixer.out, self.mlp_out):
            assert isinstance(last, nn.Linear)
            last.weight.div_(math.sqrt(2 * config.depth))
        gates = 2 * config.width  # γ1 and γ2 come first
        if self.kind == "own":
            self.adaln.weight[:gates].mul_(config.init_adaln_gamma)
            self.adaln.weight[gates:].mul_(config.init_adaln)
        elif self.kind == "shared":
            self.adaln_offset[:2].mul_(config.init_adaln_gamma)
            self.adaln_offset[2:].mul_(config.init_adaln)


class Head(nn.Module):
    """Norm (adaLN of its own, or plain; in fp32) and the matrix to the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        w = config.width
        self.plain = config.adaln == "none"
        if self.plain:
            self.norm = nn.LayerNorm(w, eps=NORM_EPS)
        else:
            self.adaln = nn.Linear(w, 2 * w)
        self.to_vocab = Linear(w, config.vocab)

    def features(self, x_BLW: Tensor, cond_BW: Tensor) -> Tensor:
        """What the vocabulary's matrix takes, (B, L, W) in fp32; ``cond_BW`` is the class embedding."""
        if self.plain:
            normed_BLW: Tensor = self.norm(x_BLW.float())
            return normed_BLW
        scale_BW, shift_BW = self.adaln(F.silu(cond_BW)).chunk(2, dim=-1)
        return torch.addcmul(shift_BW[:, None], layer_norm(x_BLW.float()), 1 + scale_BW[:, None])

    def forward(self, x_BLW: Tensor, cond_BW: Tensor, guidance: float | None = None) -> Tensor:
        """Logits (B, L, V), in the type that the matrix is multiplied in.

        Args:
            guidance: t of classifier-free guidance; the second half of the batch is then the first without
                its classes, and the logits are c + t·(c − u) of the two, for the first half.
        """
        normed_BLW = self.features(x_BLW, cond_BW)
        if guidance is not None:
            # Logits are linear in this: guiding here halves the largest matrix product.
            conditional, unconditional = normed_BLW.chunk(2)
            normed_BLW = torch.lerp(unconditional, conditional, 1 + guidance)
        logits_BLV: Tensor = self.to_vocab(normed_BLW)
        return logits_BLV

    @torch.no_grad()
    def initialise(self, config: ModelConfig) -> None:
        """Small, so that the first predictions are nearly even."""
        self.to_vocab.weight.mul_(config.init_head)
        if not self.plain:
            self.adaln.weight.mul_(config.init_adaln)


@torch.no_grad()
def truncated_normal(model: nn.Module, std: float) -> None:
    """The published start of every matrix and embedding: normal within ±2, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast type if autocast is on here, else the tensor's own."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast off inside; the meta device, on which FLOPs are counted, knows no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
