"""Everything that the records of one family say in numbers: laws, frontiers, forecasts, what weakens them.

The report only words and draws what is here. A sweep of several families has a study of each
(``make_studies``); ``analysis.families`` compares them.

- Laws over N use the last evaluation of every finished run; of several lengths or settings, of one length
  (``analysis.grids``) and of the best settings (``analysis.settings``). Where a depth has several seeds,
  depths are the independent units (``analysis.seeds``).
- Laws over C use the Pareto frontier (and, beside it, the log-log lower hull) of all
  evaluations of runs that did not fail; runs are the groups. See ``FRONTIER_CAUTION``.
- A value that has no logarithm is left out of the laws of its quantity, not of the others'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.conventions import Costs, conventions_table, load_costs
from analysis.errors import DataError
from analysis.files import plain
from analysis.forecast import Forecast, backtest
from analysis.frontier import Frontier, pareto_frontier
from analysis.grids import QUANTITIES as GRIDDED
from analysis.grids import Grid, comparable, fit_grid, has_lengths, of_one_length
from analysis.outlook import Outlook, look_ahead
from analysis.powerlaw import PowerLaw, fit_power_law
from analysis.records import QUANTITIES, Records, read_records
from analysis.seeds import fit_seeds, places_of
from analysis.settings import Settings, of_best_settings, varied
from analysis.tidy import repeated_data
from scaling.records import ListedRun, RecordsError, RunFolder

if TYPE_CHECKING:
    import pandas as pd

Points = Literal["final", "pareto", "hull"]
LEVEL = 0.95
REPLICATES = 400
"""Bootstrap over runs, for the free offset along a frontier only."""
FRONTIER_CAUTION = (
    "laws over C take the frontier as given: it is not found anew for every resample, most of its points "
    "lie in the middle of a learning-rate schedule, and their intervals mostly say how far the frontier is "
    "from a line"
)
ANNEALED_CAUTION = (
    "the frontiers take only the ends of runs with the schedule wsd: before its decay a run's loss stands "
    "above what the same steps give once the learning rate has come down"
)
CONVENTIONS_OF = "loss_last"
"""The quantity whose exponents are told under other conventions."""
WORDS = {"loss_last": "last-scale loss", "loss_avg": "average loss"}
FORMS = {False: "without an offset", True: "with an offset"}
NOTHING = 1e-3
"""An offset's interval that starts below this share of its end does not exclude 0."""


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

    @property
    def falls(self) -> bool:
        """Whether the exponent is negative and its interval below 0."""
        return self.law is not None and not self.law.no_interval() and self.law.interval()["alpha"][1] < 0

    @property
    def floor(self) -> bool:
        """Whether a law with an offset converged, falls, and excludes that the offset is 0: the form without
        one is rejected then."""
        if not (self.offset and self.drawable and self.falls):
            return False
        assert self.law is not None
        low, high = self.law.interval()["offset"]
        return low > NOTHING * high


@dataclass(frozen=True)
class Study:
    """One family of a sweep, read and fitted."""

    folder: Path
    sweep: dict[str, Any]
    family: str
    listed: tuple[ListedRun, ...]
    """The family's runs as ``sweep.json`` lists them; none without one."""
    frame: pd.DataFrame
    runs: list[dict[str, Any]]
    """Facts, config and status of every run, those without an evaluation too."""
    flops: str
    laws: tuple[Law, ...]
    frontiers: dict[tuple[str, str], Frontier]
    """By (quantity, pareto or hull)."""
    forecasts: dict[str, tuple[tuple[bool, Forecast], ...]]
    """By quantity: (with offset, the largest depth's forecast)."""
    forecast_problems: tuple[str, ...]
    """Why a form has no forecast."""
    conventions: tuple[dict[str, Any], ...]
    """The last scale's exponents again under other counts of N and C (``conventions_table``), and the
    axis, ``x``: params over final losses, flops along the Pareto frontier."""
    notes: tuple[str, ...]
    ladder: pd.DataFrame
    """``frame`` without the ends of runs that laws over N leave out."""
    settings: Settings | None
    """Which of the settings that the recipe varies are the best; None where it varies none."""

    @property
    def name(self) -> str:
        """The sweep's name."""
        return str(self.sweep.get("name", self.folder.name))

    @property
    def finished(self) -> pd.DataFrame:
        """Last evaluations of finished runs, by growing N."""
        return _finished(self.frame)

    def final(self, quantity: str) -> pd.DataFrame:
        """Those of them that the law of ``quantity`` over N is fitted to."""
        final = _finished(self.ladder)
        return final[usable(final, quantity)]

    def law(self, quantity: str, x: str = "params", points: Points = "final", offset: bool = False) -> Law:
        """The law asked for."""
        return next(
            r for r in self.laws if (r.quantity, r.x, r.points, r.offset) == (quantity, x, points, offset)
        )

    @cached_property
    def outlook(self) -> tuple[Outlook, ...]:
        """Forecasts of depths that were not trained (``analysis.outlook``)."""
        return look_ahead(_finished(self.ladder), self.law, self.flops, LEVEL)

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """The losses over N and D; none where no depth has several training lengths."""
        if not has_lengths(self.finished):
            return ()
        budgets = bool(_recipe(self.sweep).get("budgets"))
        return tuple(fit_grid(self.gridded(q), q, self.flops, budgets) for q in GRIDDED)

    def gridded(self, quantity: str) -> pd.DataFrame:
        """The runs that a surface of ``quantity`` is fitted to, by their last evaluation."""
        best, _ = of_best_settings(self.finished, *_settings_of(self.sweep, self.runs))
        return best[usable(best, quantity)]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with null where a number is not finite: the family's part of ``fits.json``."""
        forecasts = [
            {
                "quantity": quantity, "offset": offset, "hidden_params": f.x, "fitted_on": f.trained,
                "predicted": f.predicted, "low": f.low, "high": f.high, "level": f.level,
                "reached": f.actual, "relative_error": f.error, "runs": f.runs, "inside": f.inside,
                "converged": f.law.converged, "status": f.law.status,
            }
            for quantity, found in self.forecasts.items()
            for offset, f in found
        ]  # fmt: skip
        value: dict[str, Any] = plain(
            {
                "laws": [_law_json(row) for row in self.laws],
                "forecasts": forecasts,
                "conventions": list(self.conventions),
                "outlook": [o.to_json() for o in self.outlook],
                "grids": [grid.to_json() for grid in self.grids],
                "settings": dataclasses.asdict(self.settings) if self.settings else None,
                "notes": list(self.notes),
            }
        )
        return value


def usable(frame: pd.DataFrame, quantity: str) -> pd.Series[bool]:
    """Rows whose ``quantity`` is a positive number, as a law needs."""
    values = frame[quantity]
    return (values > 0) & (values < np.inf)


def _finished(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["final"]].sort_values(["params", "seed"], kind="stable")


def make_study(
    sweep_folder: str | Path, flops: Literal["flops", "flops_6nd"] = "flops", family: str | None = None
) -> Study:
    """Read one family of a sweep and fit everything.

    Args:
        sweep_folder: runs/<sweep>.
        flops: the compute convention of every law over C: exact, or 6·N·D.
        family: needed where the sweep has several.

    Raises:
        RecordsError: as ``load_runs``; several families and none chosen, or none of that name.
    """
    records = read_records(sweep_folder)
    families = records.families
    if family is None and len(families) > 1:
        raise RecordsError(
            f"{records.folder}: runs of several families ({', '.join(families)}), whose laws are not one; "
            "name one of them (family=…)"
        )
    if family is not None and family not in families:
        raise RecordsError(f"{records.folder}: no runs of family '{family}'; there are {', '.join(families)}")
    return study_of(records.of(family or families[0]), flops)


def make_studies(
    sweep_folder: str | Path, flops: Literal["flops", "flops_6nd"] = "flops"
) -> dict[str, Study]:
    """A study of every family of a sweep that has an evaluation, in the sweep's order.

    Raises:
        RecordsError: as ``load_runs``.
    """
    return studies_of(read_records(sweep_folder), flops)


def studies_of(records: Records, flops: Literal["flops", "flops_6nd"]) -> dict[str, Study]:
    """``make_studies`` of records that have been read."""
    parts = {family: records.of(family) for family in records.families}
    return {family: study_of(part, flops) for family, part in parts.items() if len(part.frame)}


def left_out(records: Records) -> Iterator[str]:
    """What became of the families that have no study: why there is none, and their runs' own notes."""
    for family in records.families:
        part = records.of(family)
        if not len(part.frame):
            yield f"{family} has no part below: none of its runs has an evaluation"
            yield from part.frame.attrs["notes"]


def study_of(records: Records, flops: Literal["flops", "flops_6nd"]) -> Study:
    """Fit everything to the records of one family.

    Raises:
        RecordsError: none of its runs has been evaluated.
    """
    folder, frame = records.folder, records.frame
    if not len(frame):
        raise RecordsError(f"{folder}: no evaluation of {', '.join(records.families)} recorded yet")
    laws: list[Law] = []
    frontiers: dict[tuple[str, str], Frontier] = {}
    finished = _finished(frame)
    best, settings = of_best_settings(finished, *_settings_of(records.sweep, records.runs))
    chosen, one_length = of_one_length(best)
    ladder = frame[~frame["final"] | frame.index.isin(chosen.index)]
    for quantity in QUANTITIES:
        final = _finished(ladder[usable(ladder, quantity)])
        for offset in (False, True):
            law, problem = _fit_final(final, quantity, offset)
            laws.append(Law(quantity, "params", "final", offset, law, problem))
        good = frame[usable(frame, quantity) & (frame["state"] != "failed") & comparable(frame)]
        for kind in ("pareto", "hull"):
            frontier = pareto_frontier(good[flops], good[quantity], kind)
            frontiers[quantity, kind] = frontier
            groups = good["run"].to_numpy()[frontier.index]
            for offset in (False, True) if kind == "pareto" else (False,):
                law, problem = _try_fit(frontier.x, frontier.y, offset, groups)
                laws.append(Law(quantity, flops, kind, offset, law, problem))
    forecasts, problems = _forecasts(ladder)
    conventions, lacking = _conventions(folder, ladder, frame[comparable(frame)])
    notes = (
        *frame.attrs["notes"], *_unreadable(records), *_of_design(frame, finished, settings, one_length),
        *_cautions(frame, ladder), *lacking,
    )  # fmt: skip
    return Study(
        folder, records.sweep, records.families[0], records.listed, frame, records.runs, flops, tuple(laws),
        frontiers, forecasts, problems, conventions, notes, ladder, settings,
    )  # fmt: skip


def _recipe(sweep: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe of a ``sweep.json``; empty without one."""
    recipe = sweep.get("recipe")
    return recipe if isinstance(recipe, Mapping) else {}


def _settings_of(
    sweep: Mapping[str, Any], runs: list[dict[str, Any]]
) -> tuple[dict[str, Mapping[str, Any]], tuple[str, ...]]:
    """Configs by run, and the names of what the recipe varies."""
    return {str(run["run"]): run["config"] for run in runs}, varied(_recipe(sweep))


def _of_design(
    frame: pd.DataFrame, finished: pd.DataFrame, settings: Settings | None, one_length: str
) -> Iterator[str]:
    """What runs the laws are of, and what sharing has saved."""
    if settings is not None:
        yield (
            f"the recipe varies {', '.join(settings.names)}: laws are of the setting with the lowest "
            "last-scale loss at each depth and length, and the lowest of several noisy values is a little low"
        )
    if one_length:
        yield one_length
    ends = frame.groupby("run", sort=False).tail(1)
    spent, recorded = ends["flops_spent"].sum(), ends["flops"].sum()
    if spent < recorded:
        yield (
            f"shorter runs start from checkpoints of longer ones: by the records {spent:.3g} FLOPs were "
            f"spent on runs of {recorded:.3g} in all ({spent / recorded:.2f}); C is of each run as trained "
            "alone"
        )


def _conventions(
    folder: Path, ladder: pd.DataFrame, along: pd.DataFrame
) -> tuple[tuple[dict[str, Any], ...], list[str]]:
    """The table, by part where all runs have costs that hold; and why it is not.

    Args:
        ladder, along: rows for laws over N, and for those along a frontier.
    """
    sets: dict[Literal["params", "flops"], pd.DataFrame] = {"params": ladder, "flops": along}
    good = {x: rows[usable(rows, CONVENTIONS_OF) & (rows["state"] != "failed")] for x, rows in sets.items()}
    names = list(dict.fromkeys(str(name) for rows in good.values() for name in rows["run"].unique()))
    older = [name for name in names if not (folder / name / "costs.json").exists()]
    try:
        if not older:
            return _convention_rows(good, load_costs(folder, names)), []
        note = f"{len(older)} of {len(names)} runs have no costs.json: no exponents by part"
    except RecordsError as error:
        # One bad file is not to cost the report.
        note = f"no exponents by part: {str(error).replace(f'{folder}/', '')}"
    return _convention_rows(good, None), [note]


def _convention_rows(
    good: dict[Literal["params", "flops"], pd.DataFrame], costs: Costs | None
) -> tuple[dict[str, Any], ...]:
    found: list[dict[str, Any]] = []
    for x, rows in good.items():
        table = conventions_table(rows, costs, x, CONVENTIONS_OF, level=LEVEL)
        for row in table.to_dict("records"):
            found.append(
                {"x": x, "quantity": CONVENTIONS_OF} | {str(key): value for key, value in row.items()}
            )
    return tuple(found)


def _unreadable(records: Records) -> Iterator[str]:
    """Images that the token caches had to leave out, if they are kept beside the sweep."""
    for link in dict.fromkeys(run.tokens for run in records.listed):
        for split, count in RunFolder(records.folder / link).unreadable().items():
            yield f"unreadable {split} images left out of the tokens: {count}"


def _fit_final(final: pd.DataFrame, quantity: str, offset: bool) -> tuple[PowerLaw | None, str]:
    places = places_of(final, ["params"])
    if not places.duplicated().any():
        return _try_fit(final["params"], final[quantity], offset)
    try:
        return fit_seeds(final["params"], final[quantity], places, offset), ""
    except DataError as error:
        return None, str(error)


def _try_fit(x: Any, y: Any, offset: bool, groups: Any = None) -> tuple[PowerLaw | None, str]:
    clustered = groups is not None and len(set(groups)) < len(groups)
    bootstrap = REPLICATES if offset and clustered else 0
    try:
        return fit_power_law(x, y, offset, None, groups, bootstrap), ""
    except DataError as error:
        return None, str(error)


def _forecasts(frame: pd.DataFrame) -> tuple[dict[str, tuple[tuple[bool, Forecast], ...]], tuple[str, ...]]:
    found: dict[str, tuple[tuple[bool, Forecast], ...]] = {}
    problems: dict[str, list[str]] = {}
    for quantity in QUANTITIES:
        final = _finished(frame[usable(frame, quantity)])
        places = places_of(final, ["params"])
        rows: list[tuple[bool, Forecast]] = []
        for offset in (False, True):
            groups = places if places.duplicated().any() and not offset else None
            try:
                said = backtest(final["params"], final[quantity], offset, groups=groups, level=LEVEL)
                rows += [(offset, f) for f in said]
            except DataError as error:
                problems.setdefault(f"{FORMS[offset]}: {error}", []).append(quantity)
        if rows:
            found[quantity] = tuple(rows)
    every = len(QUANTITIES)
    return found, tuple(p if len(q) == every else f"{p} ({', '.join(q)})" for p, q in problems.items())


def _cautions(frame: pd.DataFrame, ladder: pd.DataFrame) -> Iterator[str]:
    """What weakens the conclusions, in words."""
    annealed = frame["schedule"] == "wsd"
    if not annealed.all():
        yield FRONTIER_CAUTION
    if annealed.any():
        yield ANNEALED_CAUTION
    states = frame.groupby("run", sort=False)["state"].first()
    if failed := int((states == "failed").sum()):
        yield f"the frontiers leave out {failed} failed run{'s' if failed > 1 else ''}"
    if partial := int((~states.isin(["failed", "done"])).sum()):
        yield f"the frontiers hold evaluations of {partial} unfinished run{'s' if partial > 1 else ''}"
    final = _finished(ladder)
    depths = sorted(int(d) for d in final["depth"].unique())
    if not depths:
        yield "no run has finished: there are no final losses, so no law over N"
        return
    if len(depths) < 8:
        yield f"only {len(depths)} depth{'s' if len(depths) > 1 else ''} finished ({_list(depths)})"
    seeds = final[~final["imported"]].groupby("depth")["seed"].nunique()
    if not len(seeds):
        yield "every finished run is imported: nothing shows the scatter between seeds"
    elif seeds.max() == 1:
        yield "one seed per depth: the scatter between seeds is seen only as scatter around the law"
    else:
        yield (
            "seeds of one depth are not independent: laws without an offset take the depths as the "
            "independent units, laws with one are fitted to the depths' geometric means; the forecast with "
            "an offset takes the runs as independent"
        )
    if len(seeds) and seeds.max() > seeds.min():
        counts = ", ".join(f"d{depth}: {count}" for depth, count in seeds.items())
        yield f"unequal numbers of seeds ({counts}); depths with more weigh more"
    spread = final["tokens"].max() / final["tokens"].min()
    if spread > 1.01:
        yield (
            f"the finished runs saw different numbers of training tokens (×{spread:.3g}), so a law over N "
            "mixes the effects of size and of data"
        )
    span = final["params"].max() / final["params"].min()
    if len(depths) > 1 and span < 100:
        yield f"N spans ×{span:.3g} only"
    yield from repeated_data(final["epochs"])
    for quantity, word in WORDS.items():
        means = final.groupby("params")[quantity].mean().to_numpy()
        rises = [
            f"d{depths[i]} to d{depths[i + 1]}" for i in range(len(means) - 1) if means[i + 1] > means[i]
        ]
        if rises:
            yield f"the {word} rises from {', '.join(rises)}"
    for quantity, word in WORDS.items():
        turned = [
            str(name)
            for name, part in frame.groupby("run", sort=False)
            if len(part) > 2 and part[quantity].iloc[-1] > part[quantity].min() * 1.005
        ]
        if turned:
            yield (
                f"the {word} on the validation set ends more than 0.5 % above its lowest (overfitting or "
                f"instability) in {', '.join(turned)}"
            )


def _list(values: list[int]) -> str:
    return ", ".join(f"d{v}" for v in values)


def _law_json(row: Law) -> dict[str, Any]:
    head = {"quantity": row.quantity, "x": row.x, "points": row.points, "offset": row.offset}
    law = row.law
    if law is None:
        return head | {"converged": False, "status": row.problem}
    intervals = None if law.no_interval(LEVEL) else law.interval(LEVEL)
    return head | {
        "params": dict(law.params), "log_beta": law.log_beta,
        "interval": {k: list(v) for k, v in intervals.items()} if intervals else None,
        "interval_method": law.interval_method if intervals else None,
        "no_interval": law.no_interval(LEVEL) or None,
        "pearson": law.pearson, "objective": law.objective, "n": len(law.x), "independent": law.groups,
        "converged": law.converged, "status": law.status,
        "data": {"x": law.x.tolist(), "y": law.y.tolist()},
    }  # fmt: skip
