"""What the laws fitted so far say of a sweep's runs, as tables and displays take it.

The fitting is another house's (``analysis.expectation``): whoever calls ``plan`` and ``status`` hands over
the function that does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from scaling.config import RunConfig, to_dict
from scaling.flops import params, spent


class Forecast(Protocol):
    """A run's loss of the last scale, by the finished runs."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def level(self) -> float: ...
    @property
    def reached(self) -> float | None:
        """Of a finished run."""

    @property
    def outside(self) -> bool:
        """Whether a finished run was not to be expected from the others."""


class Forecasts(Protocol):
    """Of a sweep."""

    @property
    def runs(self) -> Mapping[str, Forecast]:
        """By run id, where anything can be said."""

    @property
    def note(self) -> str:
        """Why there is none for the others; empty where there is nothing to say."""


class Point(NamedTuple):
    """Where a run stands: what a forecast is made for."""

    family: str
    params: int
    tokens: int
    config: Mapping[str, Any]
    """As in ``config.json``: of what setting and on what tokens it trains."""
    varied: tuple[str, ...]
    """Names of what the recipe at hand varies, beside those that ``sweep.json`` knows of."""


MakeForecasts = Callable[[Path, Mapping[str, Point]], Forecasts]


def point_of(config: RunConfig, varied: Sequence[str] = ()) -> Point:
    """N and D of a run at its end, and what it is trained with."""
    tokens = spent(config, config.total_steps).tokens
    return Point(config.model.family, params(config.model), tokens, to_dict(config), tuple(varied))


def surprises(found: Forecasts) -> list[str]:
    """A sentence for every finished run that the others did not forecast."""
    return [
        f"{run}: its loss {f.reached:.3f} is outside [{f.low:.3f}, {f.high:.3f}], which the other sizes "
        f"forecast at {f.level:.1%} (5 % over all runs judged): look at it before the fit is believed"
        for run, f in found.runs.items()
        if f.outside and f.reached is not None
    ]
