"""A sweep of several training lengths: which of its runs a law over N takes, and the surface over N and D.

- A law over N compares sizes, so of several lengths it takes the longest that all depths share; where they
  share none (an isoFLOP design), each depth's longest, which mixes N with D.
- The surface ``L = E + A/N^α + B/D^β`` takes every finished run. Squared residuals, as for all runs of one's
  own; seeds of one place are no independent points.
- Minima at each budget need runs that meet at budgets: only a recipe with ``budgets`` has them.
- With ``train.schedule: wsd`` only the end of a run is comparable: until its decay the loss stands above what
  the same steps give once annealed. So frontiers hold ends alone (``comparable``).
- Imported checkpoints are no runs of the design, and stay in all laws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.errors import DataError
from analysis.isoflop import IsoFlop, fit_isoflop
from analysis.parametric import ParametricLaw, fit_parametric

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 2
"""Of log D: lengths within a percent are one."""
QUANTITIES = ("loss_last", "loss_avg")


@dataclass(frozen=True)
class Grid:
    """One quantity over N and D; without a fit, the problem says why there is none."""

    quantity: str
    surface: ParametricLaw | None
    problem: str
    isoflop: IsoFlop | None
    isoflop_problem: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        law, minima = self.surface, self.isoflop
        value: dict[str, Any] = {"quantity": self.quantity, "problem": self.problem, "surface": None}
        if law is not None:
            value["surface"] = {
                "params": {name: v for name, v, _, _ in law.rows()},
                "interval": {name: [low, high] for name, _, low, high in law.rows()},
                "converged": law.converged, "status": law.status,
                "n": len(law.loss), "independent": law.groups,
            }  # fmt: skip
        if minima is not None or self.isoflop_problem:
            value["isoflop"] = {"problem": self.isoflop_problem}
        if minima is not None:
            value["isoflop"] |= {
                "status": minima.status, "params": minima.params, "budgets": minima.table.to_dict("records")
            }  # fmt: skip
        return value


def comparable(frame: pd.DataFrame) -> pd.Series[bool]:
    """Rows whose loss may stand on a frontier: of wsd, the ends of finished runs."""
    return frame["final"] | (frame["schedule"] != "wsd")


def lengths(final: pd.DataFrame) -> pd.Series[float]:
    """The training length of every row, as a label: log D to two digits."""
    return np.log(final["tokens"]).round(DIGITS)


def imported(final: pd.DataFrame) -> pd.Series[bool]:
    """Rows of published checkpoints."""
    return final["imported"].astype(bool)


def has_lengths(final: pd.DataFrame) -> bool:
    """Whether a depth was trained for several lengths."""
    own = final[~imported(final)]
    return bool(len(own)) and bool((lengths(own).groupby(own["depth"]).nunique() > 1).any())


def of_one_length(every: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows that a law over N takes, and in words why not the others; all where no depth has several."""
    if not has_lengths(every):
        return every, ""
    final = every[~imported(every)]
    label = lengths(final)
    shared = set.intersection(*(set(part) for _, part in label.groupby(final["depth"])))
    if shared:
        kept = final[label == max(shared)]
        return every[imported(every) | every.index.isin(kept.index)], (
            f"runs of several lengths: laws over N, and forecasts by them, are of the {len(kept)} runs of "
            f"{kept['tokens'].max():.3g} training tokens, the longest length that all depths share; the "
            "surface over N and D takes all"
        )
    kept = final[label == label.groupby(final["depth"]).transform("max")]
    return every[imported(every) | every.index.isin(kept.index)], (
        "no training length is shared by all depths: laws over N, and forecasts by them, are of each depth's "
        "longest run and mix the effects of N and D; the surface over N and D tells them apart"
    )


def fit_grid(final: pd.DataFrame, quantity: str, flops: str, budgets: bool) -> Grid:
    """The surface, and with ``budgets`` the minima at each.

    Args:
        final: last evaluations of finished runs whose ``quantity`` is a positive number.
        flops: the column of C.
    """
    surface, minima, problem, isoflop_problem = None, None, "", ""
    places = final.groupby(["depth", lengths(final)]).ngroup()
    groups = places if places.duplicated().any() else None
    try:
        surface = fit_parametric(final["params"], final["tokens"], final[quantity], "squared", groups=groups)
    except DataError as error:
        problem = str(error)
    if budgets:
        try:
            minima = fit_isoflop(final["params"], final[quantity], final["tokens"], final[flops])
        except DataError as error:
            isoflop_problem = str(error)
    return Grid(quantity, surface, problem, minima, isoflop_problem)
