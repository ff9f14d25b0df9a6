"""Is this table fit to be fitted? What is left out is counted by reason; what cannot be is refused.

- Left out, row by row, with the first reason that holds: a missing, infinite or non-positive
  value; a run that did not finish; a checkpoint before the end of its run, whose learning rate had
  not come down; a row that another repeats.
- Refused: one run recorded twice with different values, schedules or families mixed in one fit
  (``mixed=True`` allows them), too few points or distinct sizes for the form, N and D that only
  vary together. The message counts what was left out before, because that is often why.
- Said in ``notes``: several rows per run, batches, numbers of tokens and data seen many times over,
  which weaken a fit without forbidding it.
- A bare table has no run states: every row then counts as the end of a run, unless ``horizon``
  (planned steps) stands beside ``step``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.errors import DataError
from analysis.tables import plain_column, require

if TYPE_CHECKING:
    import pandas as pd

Form = Literal["power", "offset", "parametric", "isoflop"]
FORMS: dict[Form, tuple[str, int, int]] = {
    "power": ("L = (βX)^α", 3, 2),
    "offset": ("L = L∞ + (βX)^α", 4, 3),
    "parametric": ("L = E + A/N^α + B/D^β", 6, 3),
    "isoflop": ("an IsoFLOP analysis", 9, 3),
}
"""Form -> in words, the fewest points, the fewest distinct values of each x."""
FINISHED = ("done", "finished", "complete", "completed", "success", "succeeded")
FLAT = ("constant", "const", "none")
"""Schedules under which a checkpoint is as good as the end of a run."""
MEASURED = ("loss", "loss_", "error_", "eval_images", "seconds")
TOGETHER = 1 - 1e-6
"""Correlation of log N and log D beyond which their terms cannot be told apart: D = 20·N but for rounding."""


@dataclass(frozen=True, eq=False)
class Ready:
    """The rows to fit, and all that is not among them."""

    frame: pd.DataFrame
    """With the row labels that it had."""
    dropped: pd.DataFrame
    """The rows left out, with their ``reason``."""
    notes: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Rows left out, by reason."""
        return {str(k): int(v) for k, v in self.dropped["reason"].value_counts(sort=False).items()}

    def summary(self) -> str:
        """What was left out and what to keep in mind, a line each."""
        total = len(self.frame) + len(self.dropped)
        lines = [f"{len(self.frame)} of {total} rows used"]
        lines += [f"left out: {line}" for line in _left_out(self.dropped)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def ready(
    frame: pd.DataFrame,
    columns: Sequence[str] = ("params", "loss"),
    form: Form = "power",
    mixed: bool = False,
    below: float | None = None,
) -> Ready:
    """The rows of a table that a law can be fitted to.

    Args:
        frame: from ``load_table`` or ``load_runs``.
        columns: those of the fit, the quantity last; all must be positive numbers.
        form: the law, which decides how many points and distinct sizes it takes.
        mixed: fit several schedules or families as one.
        below: leave out rows whose quantity is not strictly below this.

    Raises:
        DataError: a column that is not there (with what comes close), or a table that cannot carry
            the law; the message names rows and reasons.
    """
    import pandas as pd

    require(frame, columns)
    frame = frame.copy(deep=False)
    for column in frame.columns:
        frame[column] = plain_column(frame[column])
    reasons = pd.Series("", index=range(len(frame)), dtype=object)

    def leave_out(mask: Any, reason: str) -> None:
        # A comparison with a missing value is neither true nor false.
        marked = pd.Series(mask).astype("boolean").fillna(False).to_numpy(dtype=bool)
        reasons[(reasons == "") & marked] = reason

    for column in columns:
        values = frame[column].to_numpy(dtype=np.float64, na_value=np.nan)
        leave_out(np.isnan(values), f"{column} is missing or NaN")
        leave_out(np.isinf(values), f"{column} is infinite")
        leave_out(values <= 0, f"{column} is 0 or negative")
    if below is not None:
        leave_out(frame[columns[-1]] >= below, f"{columns[-1]} is not below {below:g}")
    if "state" in frame:
        for state in sorted({str(s) for s in frame["state"].dropna()}):
            if state.lower() not in FINISHED:
                leave_out(frame["state"] == state, f"its run is {state}")
    for mask in _checkpoints(frame):
        leave_out(mask, "checkpoint before the end of its run")
    leave_out(_repeated(frame, reasons == ""), "repeats another row")

    used, dropped = frame[(reasons == "").to_numpy()], frame[(reasons != "").to_numpy()]
    dropped = dropped.assign(reason=reasons[reasons != ""].to_numpy())
    if used.empty:
        raise DataError("no row is left to fit" + _because(dropped))
    _refuse_contradictions(used, columns[-1])
    mixes = list(_mixes(used))
    if mixes and not mixed:
        one = "one of them with --family" if mixes[0].endswith(OTHER_TOKENS) else "one of them"
        raise DataError(f"{mixes[0]}; fit {one}, or pass --mixed (mixed=True)")
    _enough(used, columns, form, dropped)
    return Ready(used, dropped, (*mixes, *_cautions(used, columns, form)))


def _checkpoints(frame: pd.DataFrame) -> Iterator[Any]:
    """Masks of evaluations in the middle of a schedule."""
    if "final" in frame:
        known = frame["final"].isin([True, False])
        if not known.all():
            raise DataError(
                "column 'final' (the end of its run) must be true or false; "
                f"{rows_of(frame[~known])} are not, such as {frame['final'][~known].iloc[0]!r}"
            )
        yield ~frame["final"].astype(bool)
    elif {"horizon", "step"} <= set(frame.columns):
        early = frame["step"] < frame["horizon"]
        if "schedule" in frame:
            early &= ~frame["schedule"].astype(str).str.lower().isin(FLAT)
        yield early


def _setup(frame: pd.DataFrame) -> list[Any]:
    """Columns that say what was run, not what came out; lists cannot be compared and are left aside."""
    return [
        column
        for column in frame.columns
        if not str(column).startswith(MEASURED)
        and column not in ("run", "final", "state")
        and not frame[column].map(lambda v: isinstance(v, list | dict | np.ndarray)).any()
    ]


def _repeated(frame: pd.DataFrame, among: pd.Series[bool]) -> Any:
    """Later rows equal to an earlier one in all columns; under another name too if the seed is equal."""
    plain = [
        column
        for column in frame.columns
        if not frame[column].map(lambda v: isinstance(v, list | dict | np.ndarray)).any()
        and not (column == "run" and "seed" in frame)
    ]
    mask = np.zeros(len(frame), dtype=bool)
    mask[among.to_numpy()] = frame.loc[among.to_numpy(), plain].duplicated().to_numpy()
    return mask


def _refuse_contradictions(frame: pd.DataFrame, quantity: str) -> None:
    """One run, or one setup and seed, with two values of the quantity."""
    places = [c for c in ("params", "step", "tokens", "flops", "epochs") if c in frame]
    keys: list[tuple[list[Any], str]] = []
    if "run" in frame and len(places) > 1:
        keys.append((["run", *places], "of one run at one place"))
    if "seed" in frame:
        keys.append((_setup(frame), "of one setup and seed"))
    for key, words in keys:
        twice = frame[frame.duplicated(key, keep=False)]
        if twice.empty:
            continue
        first = twice[twice.groupby(key, dropna=False, sort=False).ngroup() == 0]
        found = " and ".join(f"{v:g}" for v in first[quantity][:3])
        raise DataError(
            f"{rows_of(first)} are {words}, with {quantity} {found}; keep one "
            f"({len(twice)} rows are so in all)"
        )


OTHER_TOKENS = "; their losses may be of other tokens"


def _mixes(frame: pd.DataFrame) -> Iterator[str]:
    for column, words, beside in (
        ("schedule", "learning-rate schedules", ""), ("family", "model families", OTHER_TOKENS),
    ):  # fmt: skip
        if column in frame and frame[column].nunique() > 1:
            parts = [f"{name} ({rows_of(part)})" for name, part in frame.groupby(column, sort=True)]
            yield f"the table mixes {len(parts)} {words}: {', '.join(parts)}{beside}"


def _enough(frame: pd.DataFrame, columns: Sequence[str], form: Form, dropped: pd.DataFrame) -> None:
    words, points, distinct = FORMS[form]
    because = _because(dropped)
    *xs, quantity = columns
    for x in xs[:2]:  # unique_tokens, a third, may well be the same for all
        if (have := frame[x].nunique()) < distinct:
            values = ", ".join(f"{v:g}" for v in sorted(frame[x].unique()))
            raise DataError(
                f"{words} needs {distinct} distinct values of {x} at least; {rows_of(frame)} have {have} "
                f"({values}){because}"
            )
    if len(frame) < points:
        raise DataError(f"{words} needs {points} points at least, got {len(frame)}{because}")
    if frame[quantity].nunique() == 1:
        raise DataError(f"{quantity} is {frame[quantity].iloc[0]:g} in all {len(frame)} rows: nothing to fit")
    if form == "parametric":
        n, d = (np.log(frame[x].to_numpy(dtype=np.float64)) for x in xs[:2])
        if abs(np.corrcoef(n, d)[0, 1]) > TOGETHER:
            raise DataError(
                f"{words} needs {xs[0]} and {xs[1]} that vary apart; here one follows from the other "
                "(as in D = 20·N), so that their terms cannot be told from each other"
            )


def _cautions(frame: pd.DataFrame, columns: Sequence[str], form: Form) -> Iterator[str]:
    """What weakens a fit of these rows, in words."""
    if "run" in frame and frame["run"].dropna().duplicated().any():
        yield (
            f"{len(frame)} rows of {frame['run'].nunique()} runs: rows of one run are not independent, and "
            "those before its end belong to no finished schedule"
        )
    if "batch" in frame and (batches := sorted(frame["batch"].dropna().unique())) and len(batches) > 1:
        yield f"global batches {', '.join(f'{b:g}' for b in batches[:6])} in one fit"
    if form in ("power", "offset"):
        other = {"params": "tokens", "tokens": "params"}.get(columns[0])
        if other and other in frame and (spread := frame[other].max() / frame[other].min()) > 1.01:
            yield f"{other} differ too (×{spread:.3g}): a law over {columns[0]} alone mixes both effects"
        if columns[0].startswith("flops"):
            yield "a law over C of the runs as they were, not of the best run at each C (see pareto_frontier)"
    if "epochs" in frame:
        yield from repeated_data(frame["epochs"])


def repeated_data(epochs: pd.Series[float]) -> Iterator[str]:
    """A caution about many passes over the same data (2305.16264: up to four are nearly harmless)."""
    if (most := float(epochs.max())) > 4:
        yield f"the data were seen up to {most:.3g} times; repeated data are worth less than fresh ones"


def _left_out(dropped: pd.DataFrame) -> list[str]:
    return [
        f"{len(part)} because {reason} ({rows_of(part)})"
        for reason, part in dropped.groupby("reason", sort=False)
    ]


def _because(dropped: pd.DataFrame) -> str:
    return f"; left out: {'; '.join(_left_out(dropped))}" if len(dropped) else ""


def rows_of(frame: pd.DataFrame) -> str:
    """Row labels, at most six, and the runs that they belong to, at most three."""
    labels = [str(label) for label in frame.index]
    more = f" and {len(labels) - 6} more" if len(labels) > 6 else ""
    words = f"row{'s' if len(labels) > 1 else ''} {', '.join(labels[:6])}{more}"
    runs = list(dict.fromkeys(str(r) for r in frame["run"].dropna())) if "run" in frame else []
    if not runs:
        return words
    others = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
    return f"{words} of {', '.join(runs[:3])}{others}"
