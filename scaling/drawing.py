"""Choosing tokens from logits: the filters top-k and top-p, and the Gumbel race.

The argmax of log p + Gumbel noise is distributed as p. The noise is a function of the image's seed, the
token's place and the word (``scaling.noise``), so that a token does not depend on what is drawn beside it.

On a CPU it goes by portions of rows that stay in a core's cache, through NumPy, whose partition, sort and
argmax use the vector units; torch's do not, and a tensor of all logits is fresh memory each time. On other
devices the same is done by torch, all rows at once.

Shapes: B images, l tokens of one chunk, r of them at once, R rows of whatever, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaling.noise import gumbel, gumbel_rows

PORTION = 2**17
"""Logits that one thread looks at at once: half a MiB; smaller ones are all handing on of Python's lock."""
RACE, SMOOTHING = 0, 1
"""What noise is for; the two of a token are independent."""

Floats = np.ndarray[Any, np.dtype[np.float32]]


def draw(
    logits_BlV: Tensor, seeds: Sequence[int], first: int = 0, top_k: int = 0, top_p: float = 0.0
) -> Tensor:
    """One token id per position, (B, l), among those that ``keep_top`` keeps.

    Args:
        seeds: of the images.
        first: the place in the image of the first token here.
    """
    batch, count, vocab = logits_BlV.shape
    if logits_BlV.device.type != "cpu":
        noise_BlV = gumbel(seeds, RACE, first, count, vocab, logits_BlV.device)
        return (keep_top(logits_BlV, top_k, top_p).float() + noise_BlV).argmax(dim=-1)
    rows_BlV, ids_Bl = _as_numpy(logits_BlV), np.empty((batch, count), np.int64)

    def race(image: int, start: int) -> None:
        values_rV = _as_floats(rows_BlV[image, start : start + portion])
        noise_rV = gumbel_rows(seeds[image], RACE, first + start, len(values_rV), vocab)
        if top_k or top_p:
            np.copyto(noise_rV, -math.inf, where=values_rV < _bounds(values_rV, top_k, top_p))
        noise_rV += values_rV
        ids_Bl[image, start : start + portion] = noise_rV.argmax(axis=-1)

    portion = max(1, PORTION // vocab)
    parts = [(image, start) for image in range(batch) for start in range(0, count, portion)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        for part in parts:
            race(*part)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(race, *zip(*parts, strict=True)))
    return torch.from_numpy(ids_Bl)


def keep_top(logits_BlV: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits with everything outside the top k and, among them, the nucleus p set to −∞; 0 keeps all.

    The nucleus is the smallest set of most likely tokens whose probability reaches p.
    """
    vocab = logits_BlV.shape[-1]
    if top_k == 0 and top_p == 0:
        return logits_BlV
    if logits_BlV.device.type == "cpu":
        rows_RV = _as_floats(_as_numpy(logits_BlV.reshape(-1, vocab)))
        outside_RV = torch.from_numpy(rows_RV < _bounds(rows_RV, top_k, top_p))
        return logits_BlV.masked_fill(outside_RV.view_as(logits_BlV), -math.inf)
    # Only the k most likely are sorted, and the nucleus is sought among them.
    values_Blk = logits_BlV.topk(min(top_k or vocab, vocab), dim=-1).values
    bound_Bl1 = values_Blk[..., -1:]
    if top_p > 0:
        ascending_Blk = values_Blk.flip(-1)
        outside_Blk = ascending_Blk.float().softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        outside_Blk[..., -1] = False
        bound_Bl1 = ascending_Blk.gather(-1, outside_Blk.sum(dim=-1, keepdim=True))
    return logits_BlV.masked_fill(logits_BlV < bound_Bl1, -math.inf)


def _bounds(values_RV: Floats, top_k: int, top_p: float) -> Floats:
    """The least value that is kept of each row, (R, 1)."""
    vocab = values_RV.shape[1]
    out = vocab - min(top_k or vocab, vocab)
    ordered_RV = values_RV.copy()
    if out or not top_p:
        ordered_RV.partition(out, axis=-1)  # what is before place ``out`` is less, what comes after is more
    kept_Rk = ordered_RV[:, out:]
    if top_p == 0:
        return kept_Rk[:, :1]
    kept_Rk.sort(axis=-1)
    mass_Rk = np.exp(kept_Rk - kept_Rk[:, -1:]).cumsum(axis=-1)
    outside_Rk = mass_Rk[:, :-1] <= (1 - top_p) * mass_Rk[:, -1:]  # the likeliest one always stays
    return np.take_along_axis(kept_Rk, np.count_nonzero(outside_Rk, axis=-1, keepdims=True), axis=-1)


def _as_numpy(logits: Tensor) -> np.ndarray[Any, Any]:
    """A view where NumPy has the type; bf16 as its bits."""
    if logits.dtype == torch.bfloat16:
        return logits.view(torch.int16).numpy().view(np.uint16)
    return logits.float().numpy()


def _as_floats(rows_RV: np.ndarray[Any, Any]) -> Floats:
    """Of a part of ``_as_numpy``."""
    if rows_RV.dtype == np.uint16:
        wide_RV = rows_RV.astype(np.uint32)
        wide_RV <<= 16
        return wide_RV.view(np.float32)
    return rows_RV
