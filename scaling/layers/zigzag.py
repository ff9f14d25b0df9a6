"""Eight zigzag paths through a map of tokens, and through a pyramid of maps.

- A zigzag (boustrophedon) path goes along one row, back along the next, and so on, so that tokens
  that follow each other are neighbours in the map (ZigMa, 2403.13802). Four corners to start from, by
  rows or by columns, make eight.
- Their order over the layers follows the list of FlexVAR's appendix on Mamba (2502.20313): top left,
  bottom left, bottom right, top right, two each. Which of the two comes first, rows or columns, is only
  in its figure; here it is rows.
- In a pyramid every map is gone through by itself, coarse to fine.

Shapes: L tokens in row-major order, map after map.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Size = tuple[int, int]
PATHS = 8
_CORNERS = ((False, False), (True, False), (True, True), (False, True))
"""(starts at the bottom, starts at the right) in the order of the paths, two paths each."""


def zigzag(size: Size, path: int) -> tuple[int, ...]:
    """The row-major indices of a map's tokens in the order in which ``path`` (0 to 7) meets them.

    Args:
        size: (rows, columns) of the map.
        path: even by rows, odd by columns.
    """
    bottom, right = _CORNERS[path // 2]
    rows = range(size[0])[::-1] if bottom else range(size[0])
    columns = range(size[1])[::-1] if right else range(size[1])
    if path % 2 == 0:
        return tuple(
            row * size[1] + column
            for turn, row in enumerate(rows)
            for column in (columns[::-1] if turn % 2 else columns)
        )
    return tuple(
        row * size[1] + column
        for turn, column in enumerate(columns)
        for row in (rows[::-1] if turn % 2 else rows)
    )


def pyramid_path(sizes: Sequence[Size], path: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(order, inverse), each (L,): ``x[order]`` is in the path's order and ``x[order][inverse]`` is x.

    Cached; do not write into the result.
    """
    return _pyramid_path(tuple(sizes), path, device)


@functools.lru_cache(maxsize=64)  # eight paths of the latest step schedules; random ones have thousands
def _pyramid_path(sizes: tuple[Size, ...], path: int, device: torch.device) -> tuple[Tensor, Tensor]:
    orders, inverses, start = list[Tensor](), list[Tensor](), 0
    for size in sizes:
        order, inverse = _map_path(size, path, device)
        orders.append(order + start)
        inverses.append(inverse + start)
        start += size[0] * size[1]
    return torch.cat(orders), torch.cat(inverses)


@functools.lru_cache(maxsize=1024)  # eight paths of all sides up to 16 and of many other shapes
def _map_path(size: Size, path: int, device: torch.device) -> tuple[Tensor, Tensor]:
    order = torch.tensor(zigzag(size, path))
    return order.to(device), order.argsort().to(device)
