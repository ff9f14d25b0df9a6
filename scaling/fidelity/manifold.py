"""Improved precision and recall (Kynkäänniemi et al. 2019): how much of each image set lies in the other's.

- A set's manifold is the union of balls around its features, each as large as the distance to its k-th
  nearest neighbour, not counting itself but counting duplicates. Precision is the share of generated
  images in the manifold of the real ones, recall the share of real ones in that of the generated.
- A point on the edge of a ball is inside (≤), as in the published definition; ties on the edge are as
  exact as float64: features on a grid tie exactly.
- Distances are |u|² + |v|² − 2u·v in blocks of rows, so 10 000 against 10 000 need no 10 000² matrix. In
  float64, since the difference of large numbers decides; what is below its rounding is zero, so that
  copies have no distance and a ball of copies has no radius. (The ADM toolkit takes half precision here
  where its numbers fit.)

Shapes: N images of one set, M of the other, D features, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from scaling.config import require

NEIGHBOURS = 3
BLOCK = 1024


def precision_recall(
    real_ND: Tensor, generated_MD: Tensor, k: int = NEIGHBOURS, block: int = BLOCK
) -> tuple[float, float]:
    """Precision and recall, 0 to 1, computed where the features lie.

    Raises:
        ConfigError: a set of no more than k images, or sets of different features.
    """
    real_ND, generated_MD = real_ND.double(), generated_MD.double()
    require(
        real_ND.shape[1] == generated_MD.shape[1],
        f"precision and recall compare features of one kind, got {real_ND.shape[1]} and "
        f"{generated_MD.shape[1]} of them; use a reference made with the same extractor",
    )
    real_radii_N, generated_radii_M = radii(real_ND, k, block), radii(generated_MD, k, block)
    precise_M = torch.zeros(len(generated_MD), dtype=torch.bool, device=real_ND.device)
    recalled_N = torch.zeros(len(real_ND), dtype=torch.bool, device=real_ND.device)
    for rows, squares_bM in squared_distances(real_ND, generated_MD, block):
        precise_M |= (squares_bM <= real_radii_N[rows, None]).any(dim=0)
        recalled_N[rows] = (squares_bM <= generated_radii_M).any(dim=1)
    return precise_M.double().mean().item(), recalled_N.double().mean().item()


def radii(features_ND: Tensor, k: int = NEIGHBOURS, block: int = BLOCK) -> Tensor:
    """Squared distance (N,) from each feature to its k-th nearest neighbour.

    Raises:
        ConfigError: no more than k images.
    """
    count = len(features_ND)
    require(count > k, f"the {k}-nearest neighbours of {count} images: at least {k + 1} are needed")
    found_N = torch.empty(count, dtype=torch.float64, device=features_ND.device)
    for rows, squares_bN in squared_distances(features_ND, features_ND, block):
        squares_bN[:, rows].fill_diagonal_(torch.inf)
        found_N[rows] = squares_bN.topk(k, dim=1, largest=False).values[:, -1]
    return found_N


def squared_distances(one_ND: Tensor, other_MD: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances (b, M) of ``block`` rows of ``one_ND`` at a time; which rows, and the distances."""
    one_ND, other_MD = one_ND.double(), other_MD.double()
    norms_N, norms_M = one_ND.square().sum(dim=1), other_MD.square().sum(dim=1)
    rounding = one_ND.shape[1] * torch.finfo(torch.float64).eps
    for begin in range(0, len(one_ND), block):
        rows = slice(begin, min(begin + block, len(one_ND)))
        norms_bM = norms_N[rows, None] + norms_M
        squares_bM = torch.addmm(norms_bM, one_ND[rows], other_MD.T, alpha=-2)
        yield rows, squares_bM.masked_fill_(squares_bM <= rounding * norms_bM, 0.0)
