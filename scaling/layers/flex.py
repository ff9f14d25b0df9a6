"""Block-causal attention by FlexAttention: a kernel, compiled for the mask, that passes over whole blocks.

- Tokens are padded to whole blocks of 128. The kernels then need no checks at the edge, where FlexAttention
  had its errors (wrong sums and NaN at lengths that are no multiple), and training on random steps sees only
  as many shapes as there are multiples: a kernel is compiled for each, and no more. Padding comes last, so
  no true token sees it, and what it sees is cut off.
- A learned scale is multiplied into the queries beforehand (``SelfAttention``), so scores need no function
  of their own, with gradients that FlexAttention would have to find.
- A block is worked on if one pair of it is allowed: of the paper's 680 tokens 28 blocks of 36, which is 99 %
  of 680² pairs. What is won is the fused kernel, more than fewer pairs.
- torch has no gradients of it on a CPU (2.13); its uncompiled form there serves the tests.

Shapes: B batch, H heads, L tokens, P tokens with padding, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from scaling.compilation import allow_graphs
from scaling.layers.block import Attend

BLOCK = 128
"""Tokens to a side of a block. The kernels' own tiles, up to 128 on an H100, must divide it."""


@lru_cache(maxsize=4096)
def block_mask(sizes: tuple[tuple[int, int], ...], device: torch.device) -> BlockMask:
    """The mask of these steps over P tokens."""
    length = sum(h * w for h, w in sizes)
    padded = -(-length // BLOCK) * BLOCK
    counts = [h * w for h, w in sizes]
    level = [k for k, count in enumerate(counts) for _ in range(count)] + [len(sizes)] * (padded - length)
    level_P = torch.tensor(level, dtype=torch.int32, device=device)

    def allowed(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return level_P[query] >= level_P[key]

    return create_block_mask(allowed, None, None, padded, padded, device=str(device), BLOCK_SIZE=BLOCK)


@lru_cache(maxsize=1)
def compiled() -> Callable[..., Tensor]:
    """FlexAttention, a kernel for each padded length, number of images, type, and with or without gradients;
    one for many shapes would have to look for edges."""
    allow_graphs()
    kernel: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return kernel


def flex(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Attend:
    """Attention of teacher forcing over all steps at once."""
    mask = block_mask(sizes, device)
    padded = mask.shape[-1]
    kernel = cast(Callable[..., Tensor], flex_attention) if device.type == "cpu" else compiled()

    def attend(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float) -> Tensor:
        length = q_BHLE.shape[2]
        if padded > length:
            q_BHLE, k_BHLE, v_BHLE = (F.pad(x, (0, 0, 0, padded - length)) for x in (q_BHLE, k_BHLE, v_BHLE))
        out_BHPE: Tensor = kernel(q_BHLE, k_BHLE, v_BHLE, block_mask=mask, scale=scale)
        return out_BHPE[:, :, :length]

    return attend
