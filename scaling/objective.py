"""What training minimises and evaluation reports: every token's cross-entropy, without all logits at once.

The logits of 4096 codes are the largest tensor of a step, and cross-entropy under autograd goes through four
of their size. Here the vocabulary's product, the softmax and both gradients are done for a portion of the
tokens at a time, while it is in the cache, all in the forward pass: with h a token's features, W the matrix,
y the token and g its weight in the total, p = softmax(W·h + b) gives the loss −log p_y and the gradients
g·Wᵀ(p − e_y) and g·(p − e_y)hᵀ. (Known as a fused linear cross-entropy; Liger Kernel, 2410.10989, for GPUs.)

Products in the autocast type, softmax and sums in fp32, as with plain logits. Equal to them within rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scaling.families.interface import FamilyModel
from scaling.flops import LOGITS_AT_ONCE
from scaling.layers.attention import Size
from scaling.layers.block import compute_dtype
from scaling.layers.linear import linear


class TokenLosses(NamedTuple):
    """Of a batch."""

    total: Tensor
    """Σ weight · loss, to be differentiated."""
    loss_BL: Tensor
    """Nats of every token, fp32, detached."""
    wrong_BL: Tensor
    """1.0 where the likeliest token is another one."""


class Objective(nn.Module):
    """A family's model with its loss on top: one ``forward`` is all that is wrapped and differentiated."""

    def __init__(self, model: FamilyModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        labels_B: Tensor,
        inputs: Tensor,
        tokens_BL: Tensor,
        path_scale_D2B: Tensor | None = None,
        sizes: Sequence[Size] | None = None,
        weight: float = 1.0,
    ) -> TokenLosses:
        """Losses of the true tokens under teacher forcing.

        Args:
            inputs: as the family's model takes them.
            weight: of every token's loss in the total.
        """
        features_BLW = self.model.features(labels_B, inputs, path_scale_D2B, sizes)
        matrix = self.model.head.to_vocab
        kind = compute_dtype(features_BLW)
        total, loss_N, wrong_N = _Loss.apply(
            features_BLW.flatten(0, 1), matrix.weight, matrix.bias, tokens_BL.flatten(), weight, kind
        )
        return TokenLosses(total, loss_N.view_as(tokens_BL), wrong_N.view_as(tokens_BL))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_NW: Tensor,
        weight_VW: Tensor,
        bias_V: Tensor,
        tokens_N: Tensor,
        weight: float,
        kind: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        low_VW, low_V, low_NW = weight_VW.to(kind), bias_V.to(kind), h_NW.to(kind)
        wanted = any(ctx.needs_input_grad[:3])
        loss_N = torch.empty(len(h_NW), device=h_NW.device)
        wrong_N = torch.empty_like(loss_N)
        if wanted:
            grad_NW = torch.empty_like(low_NW)
            grad_VW = torch.zeros_like(weight_VW, dtype=torch.float32)
            grad_V = torch.zeros_like(bias_V, dtype=torch.float32)
        rows = max(1, LOGITS_AT_ONCE.get(h_NW.device.type, LOGITS_AT_ONCE["cuda"]) // len(weight_VW))
        with torch.autocast(h_NW.device.type, enabled=False):
            for start in range(0, len(h_NW), rows):
                part = slice(start, start + rows)
                logits = linear(low_NW[part], low_VW, low_V).float()
                true = tokens_N[part, None]
                top, likeliest = logits.max(dim=-1, keepdim=True)
                picked = logits.gather(1, true) - top
                probabilities = logits.sub_(top).exp_()
                norm = probabilities.sum(dim=-1, keepdim=True)
                loss_N[part] = (norm.log() - picked)[:, 0]
                wrong_N[part] = (likeliest != true)[:, 0].float()
                if wanted:
                    delta = probabilities.mul_(weight / norm)
                    delta.scatter_add_(1, true, delta.new_full(true.shape, -weight))
                    grad_V += delta.sum(dim=0)
                    low = delta.to(kind)
                    grad_NW[part] = low @ low_VW
                    grad_VW += low.mT @ low_NW[part]
        if wanted:
            ctx.save_for_backward(grad_NW.to(h_NW.dtype), grad_VW, grad_V)
        ctx.mark_non_differentiable(loss_N, wrong_N)
        return loss_N.sum() * weight, loss_N, wrong_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_NW, grad_VW, grad_V = ctx.saved_tensors
        return grad_NW * grad, grad_VW * grad, grad_V * grad, None, None, None
