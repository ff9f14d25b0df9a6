"""The one error of this house, and the checks that raise it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaling.records import RecordsError

Floats = NDArray[np.float64]


class DataError(RecordsError, ValueError):
    """Numbers that cannot be fitted; the message, one printable line, says which rows and why."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(line: str) -> str:
    """Names from a table may hold anything, escape sequences of a terminal too."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in line)


def rows(mask: NDArray[np.bool_]) -> str:
    """The marked positions in words, at most six of them: ``rows 0, 3, 4``."""
    places = np.flatnonzero(mask)
    shown = ", ".join(str(i) for i in places[:6])
    more = f" and {len(places) - 6} more" if len(places) > 6 else ""
    return f"row{'s' if len(places) > 1 else ''} {shown}{more}"


def positive(values: ArrayLike, name: str) -> Floats:
    """A one-dimensional float array of finite, positive numbers.

    Raises:
        DataError: another shape, NaN, infinite, zero or negative; names the rows (from 0).
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected numbers ({error})") from None
    if array.ndim != 1:
        raise DataError(f"{name}: expected one column of numbers, got shape {array.shape}")
    bad = ~np.isfinite(array)
    if bad.any():
        raise DataError(f"{name}: NaN or infinite in {rows(bad)}; drop them and say so")
    bad = array <= 0
    if bad.any():
        raise DataError(f"{name}: must be positive for a power law, {rows(bad)} are not")
    return array


def same_length(**columns: Sequence[Any] | NDArray[Any]) -> None:
    """Raise ``DataError`` unless all columns have as many rows."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError("columns differ in length: " + ", ".join(f"{k} {n}" for k, n in lengths.items()))


def check_level(level: float) -> float:
    """The level of an interval; ``DataError`` unless it lies between 0 and 1."""
    if not 0 < level < 1:
        raise DataError(f"level must lie between 0 and 1, got {level}")
    return level
