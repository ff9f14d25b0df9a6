"""While a sweep runs: what its finished runs say of those to come, and which finished run is a surprise.

- The loss is ``loss_last`` of the last evaluation. Runs to be compared saw as many tokens, within ``ALIKE``:
  then the law is one in N. The value is that of the form without an offset; the interval holds, from
  ``LEAST_WITH_OFFSET`` sizes on, also that of the form with one, since runs this few do not settle the form
  and the two part beyond the data. (Below that number the offset's interval has no use: four sizes leave one
  degree of freedom.) Where fewer than three sizes saw as many tokens, the surface in N and D of all finished
  runs says it, if they carry one.
- Only runs like it speak of a run: on the same tokens, and in the same setting where the recipe varies any
  (``grid``, ``zip``). Of several learning rates each has a law of its own; runs at a bad one are neither
  forecast by those at a good one nor taken for their seeds. Imported checkpoints have no setting and count
  in all.
- Intervals are of one new run, its own scatter included, at 95 %.
- A finished run is *outside* when the others, without those of its size, do not forecast it: its loss lies
  outside that interval, made at 1 − 5 %/n for the n finished runs of the family (Bonferroni), so that a sweep
  that obeys the law has a run flagged in at most one case of twenty.
- Both need three other sizes at least; with three an interval is very wide, as it should be.
- Runs that share a stable trunk are less independent than this takes them to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from analysis.errors import DataError
from analysis.grids import imported
from analysis.parametric import fit_parametric
from analysis.powerlaw import fit_power_law
from analysis.records import read_records
from analysis.seeds import fit_seeds
from analysis.settings import alike_in, varied
from analysis.tokens import same_tokens
from scaling.records import RecordsError

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95
FALSE_ALARMS = 0.05
"""Chance that a sweep which obeys its law has a run flagged."""
ALIKE = 0.02
"""Runs whose tokens differ by less saw as many: random steps differ a little by seed."""
LEAST, LEAST_WITH_OFFSET = 3, 5
"""Sizes that a law needs."""
QUANTITY = "loss_last"


class Place(NamedTuple):
    """Where a run stands or will stand."""

    family: str
    params: int
    tokens: int
    config: Mapping[str, Any]
    """As in ``config.json``."""
    varied: tuple[str, ...]
    """Names of what a recipe that was not run yet varies, beside those of ``sweep.json``."""


class Said(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Expected:
    """What the other runs of a sweep say of one."""

    value: float
    low: float
    high: float
    level: float
    reached: float | None
    """Of a finished run; None of one to come."""

    @property
    def outside(self) -> bool:
        """Whether a finished run was not to be expected."""
        return self.reached is not None and not self.low <= self.reached <= self.high


@dataclass(frozen=True)
class Expectations:
    """By run id, those that anything can be said of; and in words why nothing is said of the others."""

    runs: Mapping[str, Expected]
    note: str


def expect(sweep: Path, places: Mapping[str, Place]) -> Expectations:
    """What the finished runs of a sweep forecast for each of ``places``, finished or not.

    Nothing is said, without an error, of a sweep without records.
    """
    try:
        records = read_records(sweep)
    except RecordsError as error:
        return Expectations({}, f"no forecasts yet: {error}")
    frame, configs = records.frame, {str(run["run"]): run["config"] for run in records.runs}
    final = frame[frame["final"] & (frame[QUANTITY] > 0) & (frame[QUANTITY] < np.inf)]
    recipe = records.sweep.get("recipe")
    recipe = recipe if isinstance(recipe, Mapping) else {}
    found: dict[str, Expected] = {}
    missing = False
    for family in dict.fromkeys(place.family for place in places.values()):
        own = final[[configs[run]["model"]["family"] == family for run in final["run"]]]
        targets = {run: place for run, place in places.items() if place.family == family}
        done = {
            str(run): (int(tokens), float(loss))
            for run, tokens, loss in zip(own["run"], own["tokens"], own[QUANTITY], strict=True)
        }
        judged = [run for run in targets if run in done]
        level = 1 - FALSE_ALARMS / max(1, len(judged))
        for run, place in targets.items():
            alike = own[_alike(own, configs, place, recipe)]
            if run in done:
                others = alike[alike["params"] != place.params]
                place = place._replace(tokens=done[run][0])
                said = forecast(others, place, level)
                reached: float | None = done[run][1]
            else:
                said, reached = forecast(alike, place, LEVEL), None
            if said is not None:
                found[run] = Expected(*said, level if run in done else LEVEL, reached)
            missing = missing or (said is None and run not in done)
    note = ""
    if missing:
        note = (
            f"no forecast for some runs yet: it needs {LEAST} finished sizes of a family at as many tokens, "
            f"or a grid of {LEAST} sizes and {LEAST} lengths, all of the same setting and tokenizer"
        )
    return Expectations(found, note)


def _alike(
    final: pd.DataFrame,
    configs: Mapping[str, Mapping[str, Any]],
    place: Place,
    recipe: Mapping[str, Any],
) -> np.ndarray:
    """The rows whose losses say something of a run at ``place``."""
    names = tuple(dict.fromkeys((*varied(recipe), *place.varied)))

    setting = alike_in(place.config, names, recipe)
    same = [
        same_tokens(configs[run], place.config) and alike_in(configs[run], names, recipe) == setting
        for run in final["run"]
    ]
    return np.array(same, bool) | imported(final).to_numpy(bool)


def forecast(final: pd.DataFrame, place: Place, level: float) -> Said | None:
    """A new run's loss from final evaluations of others; None where they do not carry a law."""
    alike = final[(final["tokens"] / place.tokens - 1).abs() <= ALIKE]
    if not len(final):
        return None
    if alike["params"].nunique() >= LEAST:
        return _by_size(alike, place.params, level)
    try:
        law = fit_parametric(final["params"], final["tokens"], final[QUANTITY], "squared")
        if not law.converged:
            return None
        said = law.predict([place.params], [place.tokens], level=level, observation=True)
    except DataError:
        return None
    return _finite(Said(float(said.value[0]), float(said.low[0]), float(said.high[0])))


def _by_size(alike: pd.DataFrame, params: float, level: float) -> Said | None:
    """By the law over N, in both forms where there are sizes enough."""
    found: list[Said] = []
    several = alike["params"].duplicated().any()
    for offset in (False, True) if alike["params"].nunique() >= LEAST_WITH_OFFSET else (False,):
        x, y = alike["params"], alike[QUANTITY]
        try:
            law = fit_seeds(x, y, x, offset) if several else fit_power_law(x, y, offset)
        except DataError:
            continue
        if not law.converged or law.no_interval(level):
            continue
        said = law.predict([params], level, observation=True)
        one = _finite(Said(float(said.value[0]), float(said.low[0]), float(said.high[0])))
        if one is not None:
            found.append(one)
    if not found:
        return None
    return Said(found[0].value, min(s.low for s in found), max(s.high for s in found))


def _finite(said: Said) -> Said | None:
    return said if np.isfinite(said).all() else None
