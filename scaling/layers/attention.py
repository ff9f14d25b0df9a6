"""Block-causal self-attention over a pyramid of token maps, and its key-value cache.

A token of scale k attends to every token of scales up to k. Two back ends compute the same:
- ``masked``: one scaled-dot-product call with a boolean mask over all L² pairs; the reference.
- ``blockwise``: one unmasked call per scale over the keys up to that scale; no masked work.

Shapes: B batch, H heads, L tokens, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def block_causal_mask(scales: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Boolean (L, L); True where a query (row) may see a key (column)."""
    level_L = torch.cat([torch.full((s * s,), k, device=device) for k, s in enumerate(scales)])
    return level_L[:, None] >= level_L[None, :]


def masked_attention(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float, mask_LL: Tensor) -> Tensor:
    """Softmax(scale · q kᵀ) v over the allowed pairs, (B, H, L, E)."""
    return F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=mask_LL, scale=scale)


def blockwise_attention(
    q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float, scales: tuple[int, ...]
) -> Tensor:
    """As ``masked_attention`` with the block-causal mask of ``scales``, one call per scale."""
    outputs, start = [], 0
    for side in scales:
        end = start + side * side
        outputs.append(
            F.scaled_dot_product_attention(
                q_BHLE[:, :, start:end], k_BHLE[:, :, :end], v_BHLE[:, :, :end], scale=scale
            )
        )
        start = end
    return torch.cat(outputs, dim=2)


class KeyValueCache:
    """Keys and values of one layer for all scales, allocated once; sampling fills it scale by scale."""

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor) -> None:
        self.keys = like.new_empty(batch, heads, length, head_width)
        self.values = like.new_empty(batch, heads, length, head_width)
        self.filled = 0

    def extend(self, k_BHLE: Tensor, v_BHLE: Tensor) -> tuple[Tensor, Tensor]:
        """Append one scale's keys and values; returns all so far."""
        end = self.filled + k_BHLE.shape[2]
        self.keys[:, :, self.filled : end] = k_BHLE
        self.values[:, :, self.filled : end] = v_BHLE
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]
