"""Block-causal attention over the steps of an image, causal attention over a row of tokens, and the cache.

A token of step k attends to every token of the steps up to k. Two back ends compute the same:
- ``masked``: one scaled-dot-product call with a boolean mask over all L² pairs; the reference.
- ``blockwise``: one unmasked call per step over the keys up to that step; no masked work.

Shapes: B batch, H heads, L tokens, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scaling.layers.block import Attend

Size = tuple[int, int]
Backend = Literal["masked", "blockwise"]


@lru_cache(maxsize=32)
def block_causal_mask(sizes: tuple[Size, ...], device: torch.device | None = None) -> Tensor:
    """Boolean (L, L); True where a query (row) may see a key (column)."""
    level_L = torch.cat([torch.full((h * w,), k, device=device) for k, (h, w) in enumerate(sizes)])
    return level_L[:, None] >= level_L[None, :]


def block_causal(sizes: Sequence[Size], backend: Backend, device: torch.device) -> Attend:
    """Attention of teacher forcing over all steps at once."""
    if backend == "masked":
        mask_LL = block_causal_mask(tuple(sizes), device)

        def masked(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float) -> Tensor:
            return F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=mask_LL, scale=scale)

        return masked

    def blockwise(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float) -> Tensor:
        outputs, start = [], 0
        for h, w in sizes:
            end = start + h * w
            keys, values = k_BHLE[:, :, :end], v_BHLE[:, :, :end]
            outputs.append(F.scaled_dot_product_attention(q_BHLE[:, :, start:end], keys, values, scale=scale))
            start = end
        return torch.cat(outputs, dim=2)

    return blockwise


def causal(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float) -> Tensor:
    """Attention of teacher forcing where every token sees itself and those before it."""
    return F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, is_causal=True, scale=scale)


class KeyValueCache:
    """Keys and values of one layer, allocated once; sampling fills it chunk by chunk."""

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor) -> None:
        self.keys = like.new_empty(batch, heads, length, head_width)
        self.values = like.new_empty(batch, heads, length, head_width)
        self.filled = 0

    def extend(self, k_BHLE: Tensor, v_BHLE: Tensor) -> tuple[Tensor, Tensor]:
        """Append one chunk's keys and values; returns all so far."""
        end = self.filled + k_BHLE.shape[2]
        self.keys[:, :, self.filled : end] = k_BHLE
        self.values[:, :, self.filled : end] = v_BHLE
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def attend(self, q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float) -> Tensor:
        """Attention of a new chunk over itself and everything before it; no mask is needed."""
        keys, values = self.extend(k_BHLE, v_BHLE)
        return F.scaled_dot_product_attention(q_BHLE, keys, values, scale=scale)
