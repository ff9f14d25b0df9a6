"""Resampling whole runs, as weights, and the intervals drawn from replicates.

- Checkpoints of one run are not independent: the unit that is drawn is the *group* (a run, a
  seed), or the point where no groups are given. A replicate is a vector of weights, how often
  each point was drawn, so that all replicates are one batched fit and nothing is copied.
- Draws that cannot carry the form (fewer distinct x than it needs) are drawn again; how many
  were is counted.
- The plain percentile interval is too short for few groups: it misses the factor √(G/(G − p))
  and uses the normal's tails. ``expanded_percentile`` widens the level by both (Hesterberg
  2015, "What teachers should know about the bootstrap", §3.3 and table 4).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.errors import DataError, Floats, rows


def group_codes(groups: ArrayLike | None, n: int) -> NDArray[np.int64]:
    """Group numbers 0…G−1 in order of first appearance; every point its own group for ``None``.

    Raises:
        DataError: ``groups`` has another length than the data, or a row without a label.
    """
    if groups is None:
        return np.arange(n)
    labels = np.asarray(groups)
    if labels.shape != (n,):
        raise DataError(f"groups: expected {n} labels, one per point, got shape {labels.shape}")
    missing = np.array([label is None or label != label for label in labels.tolist()], dtype=bool)
    if missing.any():
        raise DataError(f"groups: no label in {rows(missing)}; an interval hangs on which run each row is of")
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels.tolist()], dtype=np.int64)


def group_weights(
    codes: NDArray[np.int64],
    replicates: int,
    seed: int,
    *needs: tuple[Floats, int],
) -> tuple[Floats, int]:
    """Weights of ``replicates`` resamples of whole groups, with replacement.

    Args:
        codes: group number of each point.
        replicates: how many resamples, R.
        seed: of the draws.
        needs: columns (n,), each with how many distinct values of it a resample must hold; draws that
            hold fewer are thrown back.

    Returns:
        weights (R, n) and the number of draws thrown back.

    Raises:
        DataError: a negative number of replicates, or a column that has too few distinct values itself.
    """
    if replicates < 1:
        raise DataError(f"bootstrap must be a positive number of replicates, got {replicates}")
    rng = np.random.default_rng(seed)
    G = int(codes.max()) + 1
    members: list[tuple[Floats, int]] = []
    for column, distinct in needs:
        values, which = np.unique(column, return_inverse=True)
        if len(values) < distinct:
            raise DataError(f"{distinct} distinct x are needed, got {len(values)}")
        member = np.zeros((G, len(values)))
        member[codes, which] = 1
        members.append((member, distinct))
    kept: list[Floats] = []
    have = thrown = 0
    while have < replicates:
        counts = rng.multinomial(G, np.full(G, 1 / G), size=replicates).astype(np.float64)
        enough = np.ones(len(counts), bool)
        for member, distinct in members:
            enough &= ((counts @ member) > 0).sum(1) >= distinct
        good = np.flatnonzero(enough)[: replicates - have]
        have += len(good)
        # Draws after the last one that is wanted were not needed, good or bad.
        thrown += (good[-1] + 1 if have == replicates else len(counts)) - len(good)
        kept.append(counts[good])
    return np.concatenate(kept)[:, codes], int(thrown)


def replicates_note(replicates: int, redrawn: int, unconverged: int) -> str:
    """How the bootstrap went, for a summary."""
    return f"  {replicates} replicates; {redrawn} resamples drawn again, {unconverged} fits did not converge"


def expanded_tail(level: float, groups: int, parameters: int) -> float:
    """The share of replicates beyond either end: Φ(−√(G/(G−p)) · t_{G−p}), t the Student quantile."""
    from scipy.special import ndtr, stdtrit

    freedom = groups - parameters
    if freedom < 1:
        raise DataError(
            f"intervals of {parameters} parameters need more than {parameters} independent runs, got {groups}"
        )
    return float(ndtr(-np.sqrt(groups / freedom) * stdtrit(freedom, 0.5 + level / 2)))


def unresolved(replicates: int, level: float, groups: int, parameters: int) -> str:
    """Why so many replicates hold no interval; empty if they do.

    Beyond the outermost replicate nothing is known: with less than one of them in the tail the
    interval would be their range, whatever the level.
    """
    tail = expanded_tail(level, groups, parameters)
    if tail * replicates >= 1:
        return ""
    few = (
        f"{groups} independent runs are too few for a bootstrap interval of {parameters} parameters "
        f"at {level:.4g}"
    )
    if tail < 1e-6:
        return few
    return f"{few} (it would need {math.ceil(1 / tail)} replicates, there are {replicates})"


def expanded_percentile(
    replicates: Floats, level: float, groups: int, parameters: int
) -> tuple[Floats, Floats]:
    """Percentile interval along axis 0, at a level widened for ``groups`` independent units.

    Raises:
        DataError: fewer groups than parameters + 1, or too few replicates (``unresolved``).
    """
    if why := unresolved(len(replicates), level, groups, parameters):
        raise DataError(why)
    tail = expanded_tail(level, groups, parameters)
    low, high = np.quantile(replicates, [tail, 1 - tail], axis=0)
    return np.asarray(low), np.asarray(high)
