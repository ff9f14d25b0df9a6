"""Block-causal attention over the steps of an image, causal attention over a row of tokens, and the cache.

A token of step k attends to every token of the steps up to k. Three back ends compute the same:
- ``masked``: one scaled-dot-product call with a boolean mask over all L² pairs; the reference.
- ``blockwise``: step by step over the keys up to that step; no masked work. On a CPU by matrix products
  (``Blockwise``), elsewhere by fused calls (``fused_by_steps``).
  Compiled layers call both from outside: every size goes into them, so that each draw of random steps would
  be compiled anew.
- ``flex``: FlexAttention, which passes over blocks of pairs that are masked as a whole; GPUs only
  (``scaling.layers.flex``).

Shapes: B batch, H heads, L tokens, E head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scaling.layers.block import Attend, full_precision

Size = tuple[int, int]
Backend = Literal["auto", "masked", "blockwise", "flex"]
FUSED_ALONE = 128
"""Tokens of a step that is worth a fused call of its own: a tile of queries of the GPU's kernels."""


def back_end(wanted: Backend, device: torch.device) -> Backend:
    """The one to use on a kind of device; ``auto`` by rule where no run has chosen (``scaling.backends``)."""
    if wanted != "auto":
        return wanted
    return "blockwise" if device.type == "cpu" else "masked"


@lru_cache(maxsize=32)
def block_causal_mask(sizes: tuple[Size, ...], device: torch.device | None = None) -> Tensor:
    """Boolean (L, L); True where a query (row) may see a key (column)."""
    level_L = torch.cat([torch.full((h * w,), k, device=device) for k, (h, w) in enumerate(sizes)])
    return level_L[:, None] >= level_L[None, :]


def block_causal(sizes: Sequence[Size], backend: Backend, device: torch.device) -> Attend:
    """Attention of teacher forcing over all steps at once."""
    chosen = back_end(backend, device)
    if chosen == "masked":
        mask_LL = block_causal_mask(tuple(sizes), device)

        def masked(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float) -> Tensor:
            return F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=mask_LL, scale=scale)

        return masked
    if chosen == "flex":
        from scaling.layers.flex import flex  # brings torch's compiler, a second, which few commands need

        return flex(tuple(sizes), device)
    if device.type != "cpu":
        return fused_by_steps(tuple(sizes), device)

    counts = [h * w for h, w in sizes]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def blockwise(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float) -> Tensor:
        if not torch.is_grad_enabled():  # nothing is kept for a backward pass: the fused call takes less time
            parts, ends = q_BHLE.split(counts, dim=2), itertools.accumulate(counts)
            return torch.cat([
                F.scaled_dot_product_attention(part, k_BHLE[:, :, :end], v_BHLE[:, :, :end], scale=scale)
                for part, end in zip(parts, ends, strict=True)
            ], dim=2)  # fmt: skip
        result: Tensor = Blockwise.apply(q_BHLE, k_BHLE, v_BHLE, scale, counts)
        return result

    return blockwise


@lru_cache(maxsize=1024)
def fused_by_steps(sizes: tuple[Size, ...], device: torch.device) -> Attend:
    """One fused call per large step, which needs no mask, and one with a mask for a row of small ones.

    Without a mask a GPU's fastest kernels can be taken. A call for each small step would not fill it: for
    the paper's ten steps there are three calls, over 67 % of all pairs where the mask allows 62 %.
    """
    counts = [h * w for h, w in sizes]
    calls = list[tuple[int, int, Tensor | None]]()  # queries from, queries and keys up to, mask
    start = first = 0
    for step, count in enumerate(counts):
        last = step + 1 == len(counts)
        # A row of small steps ends before a large one.
        if not last and count < FUSED_ALONE and counts[step + 1] < FUSED_ALONE:
            continue
        end = start + sum(counts[first : step + 1])
        mask = None
        if step > first:
            mask = block_causal_mask(sizes[: step + 1], device)[start:]
        calls.append((start, end, mask))
        start, first = end, step + 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def fused(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float) -> Tensor:
        parts = [
            F.scaled_dot_product_attention(
                q_BHLE[:, :, start:end], k_BHLE[:, :, :end], v_BHLE[:, :, :end], attn_mask=mask, scale=scale
            )
            for start, end, mask in calls
        ]
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    return fused


class Blockwise(torch.autograd.Function):
    """Step by step over the keys up to each step, forwards and backwards by plain matrix products.

    Against one fused call per step under autograd: the gradients of keys and values are added up in place
    instead of being padded with zeros to all keys at every step, and in bf16 a CPU's matrix products are
    several times as fast as its fused kernel. Scores and softmax are in fp32 whatever the type of q and k (a
    learned scale makes scores of up to 100, which bf16 would round by 0.25); probabilities are kept in it.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float, counts: list[int]
    ) -> Tensor:
        """``scale`` of the scores; ``counts`` tokens of each step."""
        shape, kind = q_BHLE.shape, q_BHLE.dtype
        q, k, v = (x.reshape(-1, *shape[2:]) for x in (q_BHLE, k_BHLE, v_BHLE))
        precise_q, precise_k = q.float() * scale, k.float()
        out, kept, start = torch.empty_like(q), list[Tensor](), 0
        with full_precision(q.device):  # autocast would take fp32 to bf16 for the scores
            for count in counts:
                end = start + count
                scores = torch.bmm(precise_q[:, start:end], precise_k[:, :end].mT)
                weights = torch.softmax(scores, dim=-1).to(kind)
                torch.bmm(weights, v[:, :end], out=out[:, start:end])
                kept.append(weights)
                start = end
        ctx.scale, ctx.counts, ctx.shape = scale, counts, shape
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, grad_BHLE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """With P the weights: dV = Pᵀ·dO, dS = P ∘ (dO·Vᵀ − Σ dO ∘ O), dQ = s·dS·K, dK = s·dSᵀ·Q."""
        q, k, v, out, *kept = ctx.saved_tensors
        grad = grad_BHLE.reshape(q.shape)
        mean = (grad.float() * out.float()).sum(dim=-1, keepdim=True).to(q.dtype)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        end = q.shape[1]
        for count, weights in zip(reversed(ctx.counts), reversed(kept), strict=True):
            start = end - count
            own = grad[:, start:end]
            scores = torch.bmm(own, v[:, :end].mT).sub_(mean[:, start:end]).mul_(weights)
            torch.bmm(scores, k[:, :end], out=dq[:, start:end])
            if end == q.shape[1]:  # the last step sees all keys: it comes first, and nothing needs zeros
                torch.bmm(scores.mT, q[:, start:end], out=dk)
                torch.bmm(weights.mT, own, out=dv)
            else:
                dk[:, :end].baddbmm_(scores.mT, q[:, start:end])
                dv[:, :end].baddbmm_(weights.mT, own)
            end = start
        shape = ctx.shape
        return dq.mul_(ctx.scale).view(shape), dk.mul_(ctx.scale).view(shape), dv.view(shape), None, None


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
