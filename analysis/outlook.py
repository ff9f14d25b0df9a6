"""What the laws of a sweep say of depths that nobody trained: the question that a sweep is for.

- Depths at 1.5, 2 and 3 times the largest finished one: near enough that a line in log-log axes is
  a guess with a reason, far enough that the forms without and with an offset part.
- Intervals are of one new run, its own scatter included, trained as the sweep's runs were: as many
  tokens, the recipe's learning rate. They take the law's form for granted; that the two forms
  differ by more than an interval says that the form is not settled.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from analysis.errors import DataError
from analysis.ladder import Ladder

if TYPE_CHECKING:
    import pandas as pd

    from analysis.powerlaw import PowerLaw


class Fitted(Protocol):
    """What this needs of ``analysis.study.Law``."""

    @property
    def law(self) -> PowerLaw | None:
        """None where the fit failed."""


class Laws(Protocol):
    """A quantity's law over N over final losses."""

    def __call__(self, quantity: str, *, offset: bool) -> Fitted: ...


FACTORS = (1.5, 2.0, 3.0)
QUANTITIES = ("loss_last", "loss_avg")


@dataclass(frozen=True)
class Outlook:
    """One untrained depth, by one law."""

    depth: int
    params: float
    """N(d), from the runs' own."""
    flops: float
    """C of as many tokens as the largest run saw, in the study's convention."""
    quantity: str
    offset: bool
    """Which form said so."""
    value: float
    low: float
    high: float
    level: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def look_ahead(final: pd.DataFrame, laws: Laws, flops_column: str, level: float) -> tuple[Outlook, ...]:
    """Forecasts by every converged law over N that has an interval, by depth, quantity and form.

    Args:
        final: last evaluations of the finished runs.
        laws: the fitted laws.
        flops_column: the convention of C.

    Empty where no law does, or where the depth does not fix N.
    """
    if not len(final):
        return ()
    # Where steps are drawn at random, a seed has its own cost per token, the same at every depth.
    seeds = set.intersection(*(set(part["seed"]) for _, part in final.groupby("depth")))
    alike = final[final["seed"] == min(seeds)] if seeds else final
    try:
        ladder = Ladder.from_runs(alike, "params", flops_column)
    except DataError:
        return ()
    largest = int(final["depth"].max())
    depths = np.array(sorted({int(np.ceil(factor * largest)) for factor in FACTORS} - {largest}))
    sizes = ladder.size(depths.astype(np.float64))
    tokens = float(final.loc[final["depth"] == largest, "tokens"].max())
    flops = ladder.cost(depths.astype(np.float64)) * tokens
    found: list[Outlook] = []
    for quantity in QUANTITIES:
        for offset in (False, True):
            law = laws(quantity, offset=offset).law
            if law is None or not law.converged or law.no_interval(level):
                continue
            said = law.predict(sizes, level, observation=True)
            for i, depth in enumerate(depths.tolist()):
                value, low, high = (float(a[i]) for a in (said.value, said.low, said.high))
                found.append(
                    Outlook(
                        depth, float(sizes[i]), float(flops[i]), quantity, offset, value, low, high, level
                    )
                )
    return tuple(sorted(found, key=lambda o: (o.depth, QUANTITIES.index(o.quantity), o.offset)))
