"""A law through runs of which several share a place and differ in their seed.

Seeds of one size share whatever keeps that size off the law, so their number does not divide it
away: without an offset the places are the groups (CR2). With a free offset grouped points have a
bootstrap only; the geometric means of the places, one point each, have the profile likelihood.

A published checkpoint of a size that was trained here too is no further seed of it: it was trained otherwise,
and is a place of its own (``places_of``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.bootstrap import group_codes
from analysis.errors import positive, same_length
from analysis.powerlaw import PowerLaw, fit_power_law

if TYPE_CHECKING:
    import pandas as pd


def places_of(frame: pd.DataFrame, xs: Sequence[str]) -> pd.Series[int]:
    """A number for the place of every row: its ``xs``, and of an imported run the run itself."""
    own = frame["run"].where(frame["imported"].eq(True), "") if {"run", "imported"} <= set(frame) else ""
    return frame[list(xs)].assign(own=own).groupby([*xs, "own"]).ngroup()


def fit_seeds(x: ArrayLike, y: ArrayLike, places: ArrayLike, offset: bool, **options: Any) -> PowerLaw:
    """``fit_power_law`` of points whose independent units are ``places``, one value of x each.

    With an offset the geometric means are fitted, weighted by their runs.

    Raises:
        DataError: as ``fit_power_law``.
    """
    if not offset:
        return fit_power_law(x, y, offset, None, places, **options)
    x_n, y_n = positive(x, "x"), positive(y, "y")
    same_length(x=x_n, y=y_n)
    codes = group_codes(places, len(x_n))
    count = np.bincount(codes)
    first = np.unique(codes, return_index=True)[1]
    means = np.exp(np.bincount(codes, np.log(y_n)) / count)
    return fit_power_law(x_n[first], means, offset, count, **options)
