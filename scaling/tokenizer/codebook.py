"""Keeping every code and every scale of the one codebook alive: seeding, revival, usage.

Collapse at the coarse scales is the usual failure of multi-scale residual quantisers: a random
codebook lies far from the features, a handful of codes wins every argmin, and no gradient ever reaches
the others.

Design choices
- Seeding: k-means on what is really quantised, the residuals of every scale of real images. The
  residuals depend on the codebook, so the two are found together, coarse to fine: a scale's share of
  the codes is fitted to its residuals, given the codes of the scales before it.
- The sizes that a scalable tokenizer trains on in a step are drawn, like everything else, from the step.
- Revival: a code that nobody used since the last revival is moved onto a vector of the current batch,
  the scales taking turns. Its moments in the optimiser are forgotten, or it would be thrown back.
- All draws are pure functions of (seed, step), so every process and every resumed run does the same.

Shapes: N vectors, C channels, V codes, K scales, M codes of one scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scaling.config import TokenizerConfig, TokenizerTrainConfig
from scaling.tokenizer.quantizer import Quantizer, nearest_codes

_SEEDING, _REVIVAL, _SIZES = 0x5EED, 0x4E3, 0x512E
KMEANS_ROUNDS = 6


def hits(tokens_BL: Tensor, scales: Sequence[int], vocab: int) -> Tensor:
    """How often each code was chosen at each scale: (K, V) int64."""
    parts = tokens_BL.split([s * s for s in scales], dim=1)
    return torch.stack([part.reshape(-1).bincount(minlength=vocab) for part in parts])


def usage(hits_KV: Tensor) -> list[float]:
    """Share of the codebook used at each scale, 0 to 1."""
    return [float(u) for u in (hits_KV > 0).double().mean(dim=1)]


def perplexity(hits_KV: Tensor) -> list[float]:
    """exp of the entropy of the codes chosen at each scale, 1 to V; 0 for a scale without any."""
    counts_KV = hits_KV.double()
    p_KV = counts_KV / counts_KV.sum(dim=1, keepdim=True).clamp_min(1)
    return [float(h) for h in torch.special.entr(p_KV).sum(dim=1).exp() * (counts_KV.sum(dim=1) > 0)]


def choose(count: int, wanted: int, *key: int) -> list[int]:
    """``wanted`` of ``count`` indices, distinct while there are enough; a pure function of ``key``."""
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    order = np.argsort(words, kind="stable")
    return [int(i) for i in np.resize(order, wanted)]


def step_scales(tokenizer: TokenizerConfig, train: TokenizerTrainConfig, step: int) -> list[int]:
    """Which of the tokenizer's scales a training step uses, as indices: all; scalable: some and the last."""
    last = len(tokenizer.scales) - 1
    if tokenizer.quantizer == "residual":
        return list(range(last + 1))
    return [*sorted(choose(last, min(last, train.random_sizes), _SIZES, train.seed, step)), last]


@torch.no_grad()
def kmeans(vectors_NC: Tensor, count: int, *key: int) -> Tensor:
    """``count`` centres (M, C) of vectors by Lloyd's algorithm; a centre that loses all its vectors stays."""
    centres_MC = vectors_NC[choose(len(vectors_NC), count, *key)].clone()
    for _ in range(KMEANS_ROUNDS):
        nearest_N = nearest_codes(vectors_NC, centres_MC)
        sums_MC = torch.zeros_like(centres_MC).index_add_(0, nearest_N, vectors_NC)
        sizes_M1 = nearest_N.bincount(minlength=count).unsqueeze(1)
        centres_MC = torch.where(sizes_M1 > 0, sums_MC / sizes_M1.clamp_min(1), centres_MC)
    return centres_MC


@torch.no_grad()
def seeded_codebook(quantizer: Quantizer, f_BCHW: Tensor, seed: int) -> Tensor:
    """A codebook (V, C) fitted to what every scale quantises of the features of real images.

    Each scale gets V/K codes (the finest the remainder), fitted to the residuals that the codes of the
    scales before it leave; later scales may then use all of them.
    """
    sizes, vocab = quantizer.sizes, quantizer.config.vocab
    shares = [vocab // len(sizes)] * len(sizes)
    shares[-1] += vocab - sum(shares)
    book_MC, residual_BCHW = f_BCHW.new_empty(0, f_BCHW.shape[1]), f_BCHW.float()
    for k, share in enumerate(shares):
        vectors_NC = quantizer.vectors(k, residual_BCHW)
        book_MC = torch.cat([book_MC, kmeans(vectors_NC, share, _SEEDING, seed, k)])
        if k < len(sizes) - 1:
            residual_BCHW = quantizer.left_over(k, residual_BCHW, vectors_NC, book_MC)
    return book_MC


@torch.no_grad()
def revive(
    codebook_VC: Tensor, unused_V: Tensor, vectors: Sequence[Tensor], seed: int, step: int
) -> list[int]:
    """Move the unused codes onto vectors of the current batch, in place; returns their rows.

    Args:
        codebook_VC: the codebook.
        unused_V: bool; which codes nobody chose since the last revival.
        vectors: per scale, what was quantised in this batch (N_k, C), over all processes.
    """
    rows = [int(v) for v in unused_V.nonzero().flatten()]
    scales = len(vectors)
    for k, vectors_NC in enumerate(vectors):
        mine = rows[k::scales]
        if mine:
            chosen = choose(len(vectors_NC), len(mine), _REVIVAL, seed, step, k)
            codebook_VC[mine] = vectors_NC[chosen].to(codebook_VC.dtype)
    return rows


def forget_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: list[int]) -> None:
    """Zero the optimiser's moments of some rows of a parameter."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[rows] = 0
