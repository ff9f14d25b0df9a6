"""What a depth costs: parameters and FLOPs per token as functions of the dial, learnt from the runs' records.

- N(d) and the cost per token are ``k₁d + k₂d² + k₃d³`` exactly (``scaling.flops`` at fixed scales:
  head and embeddings grow with w, attention with w·d, blocks and adaLN with w²·d, and w = 64d), so
  three depths determine them for every depth. ``6·N·D`` is off by half here.
- The polynomial is held against every run: two families or resolutions in one table are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from analysis.conventions import labels_of
from analysis.errors import DataError, Floats, positive

if TYPE_CHECKING:
    import pandas as pd

SAME = 1e-3
"""Relative scatter of cost per token or N within one depth, and off the polynomial, that is no other family
or resolution: those differ by a tenth or more. Steps drawn at random make the cost per token differ by 4e-5
between depths of other training lengths, far less than any forecast of compute is good for."""
NEWTON = 6
"""Steps to invert N(d): far more than rounding needs."""
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Ladder:
    """What a depth costs: N(d) and FLOPs per training token, each ``k₁d + k₂d² + k₃d³``."""

    params: Triple
    """k₁, k₂, k₃ of N(d)."""
    flops_per_token: Triple
    """k₁, k₂, k₃ of C/D."""
    trained: Mapping[str, tuple[float, float]]
    """Smallest and largest depth, params, tokens, flops, epochs of the runs; may be empty."""
    epoch_tokens: float | None = None
    """Tokens of one pass over the data."""
    labels: Mapping[str, str] | None = None
    """What N and C count."""
    note: str = ""
    """Which approximation is used with fewer than three depths; empty if none is."""

    @classmethod
    def from_runs(cls, runs: pd.DataFrame, params: str = "params", flops: str = "flops") -> Ladder:
        """The ladder that the runs stand on.

        Args:
            runs: rows with depth, tokens, and the columns named; epochs if known.
            params, flops: the columns of N and C, e.g. ``N`` and ``C`` of ``with_conventions``.

        Raises:
            DataError: a column is missing or not positive; the depth does not fix N and the cost
                per token (several families or resolutions in one table).
        """
        for name in ("depth", "tokens", params, flops):
            if name not in runs:
                raise DataError(f"a ladder needs the column {name}; there are {', '.join(map(str, runs))}")
        depth, tokens, N, C = (positive(runs[name], name) for name in ("depth", "tokens", params, flops))
        depths = np.unique(depth)
        sizes = _by_depth(depth, depths, N, params)
        costs = _by_depth(depth, depths, C / tokens, f"{flops} per token")
        trained = {
            "depth": span(depth), "params": span(N), "tokens": span(tokens), "flops": span(C),
        }  # fmt: skip
        epoch_tokens = None
        if "epochs" in runs and (runs["epochs"] > 0).all():
            trained["epochs"] = span(runs["epochs"].to_numpy(dtype=np.float64))
            low, high = span(tokens / runs["epochs"].to_numpy(dtype=np.float64))
            epoch_tokens = high if high - low <= SAME * high else None
        note = ""
        if len(depths) < 3:
            form = "k₃d³" if len(depths) == 1 else "k₂d² + k₃d³"
            note = (
                f"only {len(depths)} depth{'s' if len(depths) > 1 else ''}: N and cost per token taken as "
                f"{form}, an approximation; three depths determine them exactly"
            )
        return cls(
            _polynomial(depths, sizes, params), _polynomial(depths, costs, f"{flops} per token"),
            trained, epoch_tokens, labels_of(runs, params, flops), note,
        )  # fmt: skip

    def size(self, depth: ArrayLike) -> Floats:
        """N(d)."""
        return _evaluate(self.params, depth)

    def cost(self, depth: ArrayLike) -> Floats:
        """Training FLOPs per token at depth d."""
        return _evaluate(self.flops_per_token, depth)

    def depth_of(self, params: ArrayLike) -> Floats:
        """The depth (a fraction) with N = ``params``."""
        N = np.asarray(params, dtype=np.float64)
        d = (N / self.size(1.0)) ** (1 / 3)
        # Newton's; N(d) grows and bends upwards, and is d³ but for what is lost in rounding.
        for _ in range(NEWTON):
            k1, k2, k3 = self.params
            d = d - (self.size(d) - N) / (k1 + d * (2 * k2 + d * 3 * k3))
        return np.asarray(d)

    def tokens(self, depth: ArrayLike, budget: float) -> Floats:
        """The tokens that ``budget`` FLOPs buy at depth d."""
        return np.asarray(budget / self.cost(depth))

    def runs(self, depths: Sequence[int], tokens: Sequence[float]) -> pd.DataFrame:
        """Every depth at every training length: candidates for ``next_run``, with params and flops."""
        import pandas as pd

        d, D = (m.ravel() for m in np.meshgrid(depths, np.asarray(tokens, dtype=np.float64), indexing="ij"))
        frame = pd.DataFrame({"depth": d, "params": self.size(d), "tokens": D, "flops": self.cost(d) * D})
        if self.epoch_tokens:
            frame["epochs"] = D / self.epoch_tokens
        return frame


def _by_depth(depth: Floats, depths: Floats, values: Floats, name: str) -> Floats:
    """The one value of every depth."""
    found = []
    for d in depths:
        low, high = span(values[depth == d])
        if high - low > SAME * high:
            raise DataError(
                f"{name} at depth {d:g} lies between {low:.6g} and {high:.6g}: the depth alone does "
                "not fix it; give runs of one family at one resolution"
            )
        found.append((low + high) / 2)
    return np.array(found)


def _polynomial(depths: Floats, values: Floats, name: str) -> Triple:
    """k₁, k₂, k₃ through the values; fewer depths determine the highest powers only."""
    powers = np.arange(1, 4)[max(0, 3 - len(depths)) :]
    # Rows divided by the value, columns scaled: relative errors, and a well-conditioned system.
    top = depths.max()
    X = (depths[:, None] / top) ** powers / values[:, None]
    scale = np.linalg.norm(X, axis=0)
    solved = np.linalg.lstsq(X / scale, np.ones(len(depths)), rcond=None)[0] / scale
    off = np.abs(X @ solved - 1)
    if off.max() > SAME:
        raise DataError(
            f"{name} does not follow k₁d + k₂d² + k₃d³: off by {off.max():.2g} at depth "
            f"{depths[off.argmax()]:g}; give runs of one family at one resolution"
        )
    k = np.zeros(3)
    k[powers - 1] = solved / top**powers
    return float(k[0]), float(k[1]), float(k[2])


def _evaluate(k: Triple, depth: ArrayLike) -> Floats:
    d = np.asarray(depth, dtype=np.float64)
    return np.asarray(d * (k[0] + d * (k[1] + d * k[2])))


def span(values: Floats) -> tuple[float, float]:
    """Smallest and largest."""
    return float(values.min()), float(values.max())
