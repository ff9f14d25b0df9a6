"""A law through runs of which several share a place and differ in their seed.

Seeds of one size share whatever keeps that size off the law, so their number does not divide it
away: without an offset the places are the groups (CR2). With a free offset grouped points have a
bootstrap only; the geometric means of the places, one point each, have the profile likelihood.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.bootstrap import group_codes
from analysis.errors import positive, same_length
from analysis.powerlaw import PowerLaw, fit_power_law


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
