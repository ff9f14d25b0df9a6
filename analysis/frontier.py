"""The best loss for the compute: two estimands under one name elsewhere, so each says which it is.

- ``pareto``: the points that no cheaper point matches, L strictly below all seen at less X. It
  weighs compute by how often runs were evaluated and holds points above the final envelope.
- ``hull``: the vertices of the lower convex hull of (log X, log L) (plain X and L with
  ``log=False``), where L falls: the envelope itself, of few points.
On one set of runs they gave 0.553 and 0.499 for the same exponent; a figure must name its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.errors import DataError, Floats, positive

FrontierKind = Literal["pareto", "hull"]


@dataclass(frozen=True)
class Frontier:
    """The chosen points, by growing ``x`` and falling ``y``."""

    kind: FrontierKind
    log: bool
    index: NDArray[np.int64]
    """Their positions in the data given."""
    x: Floats
    y: Floats

    @property
    def estimand(self) -> str:
        """What the points are, in words."""
        if self.kind == "pareto":
            return "Pareto set (lower than everything cheaper)"
        return f"lower convex hull in {'log-log' if self.log else 'linear'} axes"


def pareto_frontier(x: ArrayLike, y: ArrayLike, kind: FrontierKind = "pareto", log: bool = True) -> Frontier:
    """The frontier of lowest ``y`` (loss, error) for ``x`` (FLOPs).

    Args:
        x, y: positive columns of equal length.
        kind: pareto or hull, see the module.
        log: whether the hull is convex in log-log axes; the Pareto set is the same in both.

    Raises:
        DataError: NaN or non-positive values (rows named), unequal lengths, unknown kind.
    """
    x_n, y_n = positive(x, "x"), positive(y, "y")
    if len(x_n) != len(y_n):
        raise DataError(f"x has {len(x_n)} rows, y has {len(y_n)}")
    if kind not in ("pareto", "hull"):
        raise DataError(f"kind: expected 'pareto' or 'hull', got {kind!r}")
    order = np.lexsort((y_n, x_n))
    lowest = np.minimum.accumulate(y_n[order])
    better = np.append(True, lowest[1:] < lowest[:-1])[: len(order)]
    index = order[better]
    if kind == "hull":
        u, v = (np.log(x_n), np.log(y_n)) if log else (x_n, y_n)
        hull: list[int] = []
        for i in index:
            while len(hull) > 1 and _above(u, v, hull[-2], hull[-1], i):
                hull.pop()
            hull.append(i)
        index = np.array(hull, dtype=np.int64)
    return Frontier(kind, log, index.astype(np.int64), x_n[index], y_n[index])


def _above(u: Floats, v: Floats, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the chord from a to c."""
    return bool((v[b] - v[a]) * (u[c] - u[a]) >= (v[c] - v[a]) * (u[b] - u[a]))
