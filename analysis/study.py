"""Everything that a sweep's records say in numbers: laws, frontiers, forecasts, and what weakens them.

The report only words and draws what is here; ``Study.to_json`` is ``fits.json``.

- Laws over N use the last evaluation of every finished run, one point per run.
- Laws over C use the Pareto frontier (and, beside it, the log-log lower hull) of all
  evaluations; the points of one run are not independent, so runs are the groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.errors import DataError
from analysis.forecast import Forecast, backtest
from analysis.frontier import Frontier, pareto_frontier
from analysis.powerlaw import PowerLaw, fit_power_law
from analysis.records import read_sweep
from scaling.records import RecordsError, read_json

if TYPE_CHECKING:
    import pandas as pd

QUANTITIES = ("loss_last", "loss_avg", "error_last", "error_avg")
Points = Literal["final", "pareto", "hull"]
LEVEL = 0.95
REPLICATES = 400
"""Bootstrap over runs, for the free offset along a frontier only."""


@dataclass(frozen=True)
class Law:
    """One row of the table of laws; without a ``law``, ``problem`` says why there is none."""

    quantity: str
    x: str
    points: Points
    offset: bool
    law: PowerLaw | None
    problem: str

    @property
    def drawable(self) -> bool:
        """Fitted and converged."""
        return self.law is not None and self.law.converged

    @property
    def status(self) -> str:
        """How the fit ended."""
        return self.law.status if self.law else self.problem


@dataclass(frozen=True)
class Study:
    """A sweep, read and fitted."""

    folder: Path
    sweep: dict[str, Any]
    frame: pd.DataFrame
    runs: list[dict[str, Any]]
    """Facts, config and status of every run, those without an evaluation too."""
    flops: str
    laws: tuple[Law, ...]
    frontiers: dict[tuple[str, str], Frontier]
    """By (quantity, pareto or hull)."""
    forecasts: dict[str, tuple[tuple[bool, Forecast], ...]]
    """By quantity: (with offset, the largest depth's forecast)."""
    forecast_problem: str
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The sweep's name."""
        return str(self.sweep.get("name", self.folder.name))

    @property
    def final(self) -> pd.DataFrame:
        """Last evaluations of finished runs, with finite losses, by growing N."""
        rows = self.frame[self.frame["final"] & finite_rows(self.frame)]
        return rows.sort_values(["params", "seed"], kind="stable")

    def law(self, quantity: str, x: str = "params", points: Points = "final", offset: bool = False) -> Law:
        """The law asked for."""
        return next(
            r for r in self.laws if (r.quantity, r.x, r.points, r.offset) == (quantity, x, points, offset)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, with null where a number is not finite."""
        forecasts = [
            {
                "quantity": quantity, "offset": offset, "hidden_params": f.x, "fitted_on": f.trained,
                "predicted": f.predicted, "low": f.low, "high": f.high, "level": f.level,
                "reached": f.actual, "relative_error": f.error, "covered": f.covered,
                "converged": f.law.converged, "status": f.law.status,
            }
            for quantity, found in self.forecasts.items()
            for offset, f in found
        ]  # fmt: skip
        value: dict[str, Any] = _plain(
            {
                "sweep": self.name,
                "commit": self.sweep.get("commit"),
                "flops_convention": self.flops,
                "level": LEVEL,
                "laws": [_law_json(row) for row in self.laws],
                "forecasts": forecasts,
                "notes": list(self.notes),
            }
        )
        return value


def finite_rows(frame: pd.DataFrame) -> pd.Series[bool]:
    """Rows whose losses and errors are positive numbers, as a law needs."""
    values = frame[list(QUANTITIES)]
    return ((values > 0) & (values < np.inf)).all(axis=1)


def make_study(sweep_folder: str | Path, flops: Literal["flops", "flops_6nd"] = "flops") -> Study:
    """Read a sweep and fit everything.

    Args:
        sweep_folder: runs/<sweep>.
        flops: the compute convention of every law over C: exact, or 6·N·D.

    Raises:
        RecordsError: as ``load_runs``; or runs of more than one family, whose laws are not one.
    """
    folder = Path(sweep_folder)
    frame, runs = read_sweep(folder)
    families = sorted(frame["family"].unique())
    if len(families) > 1:
        raise RecordsError(f"{folder}: runs of several families ({', '.join(families)}); a sweep has one")
    sweep = read_json(folder / "sweep.json") if (folder / "sweep.json").exists() else {}
    good = frame[finite_rows(frame)]
    final = good[good["final"]].sort_values(["params", "seed"], kind="stable")
    laws: list[Law] = []
    frontiers: dict[tuple[str, str], Frontier] = {}
    for quantity in QUANTITIES:
        for offset in (False, True):
            law, problem = _try_fit(final["params"], final[quantity], offset)
            laws.append(Law(quantity, "params", "final", offset, law, problem))
        for kind in ("pareto", "hull"):
            frontier = pareto_frontier(good[flops], good[quantity], kind)
            frontiers[quantity, kind] = frontier
            groups = good["run"].to_numpy()[frontier.index]
            for offset in (False, True) if kind == "pareto" else (False,):
                law, problem = _try_fit(frontier.x, frontier.y, offset, groups)
                laws.append(Law(quantity, flops, kind, offset, law, problem))
    forecasts, problem = _forecasts(final)
    notes = (*frame.attrs["notes"], *_cautions(frame, final))
    return Study(folder, sweep, frame, runs, flops, tuple(laws), frontiers, forecasts, problem, notes)


def _try_fit(x: Any, y: Any, offset: bool, groups: Any = None) -> tuple[PowerLaw | None, str]:
    clustered = groups is not None and len(set(groups)) < len(groups)
    try:
        return fit_power_law(
            x, y, offset=offset, groups=groups, bootstrap=REPLICATES if offset and clustered else 0
        ), ""
    except DataError as error:
        return None, str(error)


def _forecasts(final: pd.DataFrame) -> tuple[dict[str, tuple[tuple[bool, Forecast], ...]], str]:
    found: dict[str, tuple[tuple[bool, Forecast], ...]] = {}
    problem = ""
    for quantity in QUANTITIES:
        rows: list[tuple[bool, Forecast]] = []
        for offset in (False, True):
            try:
                rows += [(offset, f) for f in backtest(final["params"], final[quantity], offset, level=LEVEL)]
            except DataError as error:
                problem = problem or str(error)
        if rows:
            found[quantity] = tuple(rows)
    return found, problem if not found else ""


def _cautions(frame: pd.DataFrame, final: pd.DataFrame) -> Iterator[str]:
    """What weakens the conclusions, in words."""
    depths = sorted(int(d) for d in final["depth"].unique())
    if not depths:
        yield "no run has finished: there are no final losses, so no law over N"
        return
    if len(depths) < 8:
        yield f"only {len(depths)} depth{'s' if len(depths) > 1 else ''} finished ({_list(depths)})"
    seeds = final.groupby("depth")["seed"].nunique()
    if seeds.max() == 1:
        yield "one seed per depth: the scatter between seeds is seen only as scatter around the law"
    spread = final["tokens"].max() / final["tokens"].min()
    if spread > 1.01:
        yield (
            f"the finished runs saw different numbers of training tokens (×{spread:.3g}), so a law over N "
            "mixes the effects of size and of data"
        )
    span = final["params"].max() / final["params"].min()
    if len(depths) > 1 and span < 100:
        yield f"N spans ×{span:.3g} only"
    most = float(final["epochs"].max())
    if most > 4:
        yield f"the data were seen up to {most:.3g} times; repeated data are worth less than fresh ones"
    for quantity, word in (("loss_avg", "average loss"), ("loss_last", "last-scale loss")):
        means = final.groupby("params")[quantity].mean().to_numpy()
        rises = [
            f"d{depths[i]} to d{depths[i + 1]}" for i in range(len(means) - 1) if means[i + 1] > means[i]
        ]
        if rises:
            yield f"the {word} rises from {', '.join(rises)}"
    turned = [
        str(name)
        for name, part in frame.groupby("run", sort=False)
        if len(part) > 2 and part["loss_avg"].iloc[-1] > part["loss_avg"].min() * 1.005
    ]
    if turned:
        yield (
            "validation loss ends more than 0.5 % above its lowest (overfitting or instability) in "
            f"{', '.join(turned)}"
        )


def _list(values: list[int]) -> str:
    return ", ".join(f"d{v}" for v in values)


def _law_json(row: Law) -> dict[str, Any]:
    head = {"quantity": row.quantity, "x": row.x, "points": row.points, "offset": row.offset}
    law = row.law
    if law is None:
        return head | {"converged": False, "status": row.problem}
    intervals = law.interval(LEVEL) if law.uncertainty else None
    return head | {
        "params": dict(law.params), "log_beta": law.log_beta,
        "interval": {k: list(v) for k, v in intervals.items()} if intervals else None,
        "interval_method": law.interval_method if law.uncertainty else None,
        "pearson": law.pearson, "objective": law.objective, "n": len(law.x), "independent": law.groups,
        "converged": law.converged, "status": law.status,
        "data": {"x": law.x.tolist(), "y": law.y.tolist()},
    }  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
