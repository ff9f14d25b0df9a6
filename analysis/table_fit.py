"""``run_sweep.py fit TABLE``: anyone's runs in, a law in words out.

- The table is read by ``load_table`` (or, a sweep's folder, by ``read_records``), cleaned by
  ``tidy.ready``, fitted, and told with all that was left out and by which convention N, D, C count.
- Of a sweep the last evaluations of finished runs are fitted, as in its report.
- Huber's loss for the parametric law, as Hoffmann et al. (2203.15556) fit it; squares for a power
  law, whose intervals then need no bootstrap. IsoFLOP fits parabolas by least squares.
- Rows of one run are not independent: runs are the groups wherever one has several rows. Failing
  that, the places of the fit (equal N, or equal N and D, ...) are wherever one has several seeds; with
  an offset the law then goes through their geometric means, as in a sweep's report (``analysis.seeds``).
- ``--y``, ``--groups`` and ``--budget`` are names of the table's own columns, or what they became.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.errors import DataError, printable
from analysis.files import plain, write_bytes
from analysis.records import read_records
from analysis.seeds import places_of
from analysis.tables import load_table, require
from analysis.tidy import FORMS, Form, Ready, ready, rows_of
from scaling.records import write_atomic, write_json

if TYPE_CHECKING:
    import pandas as pd

    from analysis.isoflop import IsoFlop
    from analysis.parametric import ParametricLaw
    from analysis.powerlaw import PowerLaw

    Law = PowerLaw | ParametricLaw | IsoFlop

AXES = {"N": "params", "D": "tokens", "C": "flops"}
X_LABELS = {
    "params": "parameters N", "tokens": "training tokens D", "flops": "training compute C (FLOP)",
}  # fmt: skip
OWN = {
    "power": ("x", "offset", "at"), "parametric": ("repeated",), "isoflop": ("budget", "tolerance"),
    "power parametric": ("loss_fn", "delta", "bootstrap"),
}  # fmt: skip
"""Laws -> options that mean something to them only."""
SWEEP_CONVENTIONS = {
    "params": "parameters of the blocks' matrices (VAR eq. 8)",
    "tokens": "training tokens seen",
    "flops": "exact training FLOP",
}


@dataclass(frozen=True)
class FitOptions:
    """Options of ``fit``."""

    law: Literal["power", "parametric", "isoflop"] = "power"
    """power: L = (βX)^α; parametric: L = E + A/N^α + B/D^β; isoflop: the best N of each compute budget."""
    x: Literal["N", "D", "C"] = "N"
    """The scale X of a power law."""
    y: str | None = None
    """The column to fit, by its name in the table (which chooses between several losses) or here; by default
    loss, of a sweep loss_last."""
    offset: bool = False
    """A power law with an irreducible part: L = L∞ + (βX)^α."""
    at: tuple[float, ...] = ()
    """Also forecast one new run at these values of X, such as 1e9 1e10."""
    loss_fn: Literal["huber", "squared"] | None = None
    """The loss of the residuals of log L; by default squared for power, huber for parametric."""
    delta: float = 1e-3
    """Huber's δ, in units of log L."""
    bootstrap: int = 0
    """Resamples for intervals, such as 4000; huber needs them, and an offset with several rows per run."""
    groups: str | None = None
    """Column of what is independent of each other; by default run where one has several rows, else the places
    of the fit where one has several seeds."""
    level: float = 0.95
    """Of the intervals."""
    budget: str | None = None
    """isoflop: column of the compute budgets; by default rows whose C agree within tolerance."""
    tolerance: float = 0.05
    """isoflop: C within this share of one another are one budget."""
    below: float | None = None
    """Leave out rows whose y is not strictly below this."""
    repeated: bool = False
    """parametric: tokens beyond the column unique_tokens count less and less (Muennighoff et al. 2023)."""
    family: str | None = None
    """Only the rows of this model family."""
    mixed: bool = False
    """Fit several learning-rate schedules or model families as one, though families' losses may be of other
    tokens."""
    derive: bool = False
    """Compute the one of N, D and C that the table lacks by C = 6·N·D."""
    out: str | None = None
    """A folder for fit.json, fit.svg and fit.png."""
    json: bool = False
    """Print JSON instead of words."""

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise DataError(f"--level must lie between 0 and 1, got {self.level:g}")
        if self.bootstrap < 0:
            raise DataError(f"--bootstrap must not be negative, got {self.bootstrap}")
        if not self.delta > 0:
            raise DataError(f"--delta must be positive, got {self.delta:g}")
        if any(not 0 < x < float("inf") for x in self.at):
            raise DataError(f"--at: expected positive numbers, got {' '.join(f'{x:g}' for x in self.at)}")
        for law, names in OWN.items():
            for name in names if self.law not in law.split() else ():
                if getattr(self, name) != getattr(FitOptions, name):
                    raise DataError(f"--{name.replace('_', '-')} does nothing with --law {self.law}")


def fit_table(path: str, options: FitOptions) -> str:
    """Fit what ``options`` ask for to the table at ``path``; the answer as text, or as strict JSON.

    Args:
        path: what ``load_table`` takes, or a sweep's folder.

    With ``options.out`` fit.json, fit.svg and fit.png are written into that folder.

    Raises:
        RecordsError: as ``load_table`` and ``read_records``.
        DataError: a missing column, a table that cannot carry the law (rows and reasons named), or
            ``options.out`` below or instead of a file.
    """
    _refuse_file(options.out)
    frame, y, conventions = _load(path, options)
    column, budget = (name and _own(frame, name) for name in (options.groups, options.budget))
    if options.law == "power":
        xs = [AXES[options.x]]
    elif options.law == "parametric":
        xs = ["params", "tokens"]
    else:
        # D of the table where it has one: C/6N is another.
        xs = ["params", *([c for c in ("flops", "tokens") if c in frame] or ["tokens"])]
    form: Form = "offset" if options.offset else options.law
    needed = [*xs, *(["unique_tokens"] if options.repeated else []), y]
    require(frame, [*needed, *(c for c in (column, budget) if c)], path)
    rows = ready(frame, needed, form, options.mixed, options.below)
    groups, grouping, seeds = _groups(rows.frame, column, xs)
    try:
        law = _fit(rows.frame, xs, y, groups, seeds, budget, options)
    except DataError as error:
        if rows.dropped.empty:
            raise
        # The fits count the rows that they were given.
        raise DataError(f"{error} (counting rows without the {len(rows.dropped)} left out)") from None
    if seeds and options.offset:
        grouping += "; the law goes through their geometric means"
    used = {name: conventions.get(name, "as in the table") for name in xs}
    if options.law == "isoflop":
        used = {"flops": "C = 6·N·D", "tokens": "D = C/6N"} | used
    notes = [*frame.attrs.get("notes", []), *rows.notes]
    facts = _facts(path, law, form, y, used, grouping, rows, notes, options)
    if options.at:
        facts["at"] = _ahead(law, options)
    if options.out is not None:
        folder = Path(options.out)
        write_json(folder / "fit.json", facts)
        _draw(law, folder, xs[0] if options.law == "power" else "flops", y, options.level)
    if options.json:
        return json.dumps(facts, indent=1, allow_nan=False)
    said = [f"{y} over {', '.join(xs)}, {path}", law.summary(options.level), f"groups: {grouping}"]
    for found in facts.get("at", []):
        bounds = "" if found["low"] is None else f" [{found['low']:.5g}, {found['high']:.5g}] for one new run"
        said.append(f"at {options.x} = {found['x']:g}: {found['value']:.5g}{bounds}")
    said += [f"{name}: {convention}" for name, convention in used.items()]
    said += rows.summary().split("\n")[: 1 + len(rows.counts)]
    said += [f"note: {' '.join(note.split())}" for note in notes]
    if options.out is not None:
        said.append(f"written: {Path(options.out) / 'fit.json'}, fit.svg, fit.png")
    return "\n".join(printable(line) for text in said for line in text.split("\n"))


def _refuse_file(out: str | None) -> None:
    """Before the work, not after it."""
    if out is not None:
        nearest = next(place for place in (Path(out), *Path(out).absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise DataError(f"--out {out}: {nearest} is a file, expected a folder")


def _load(path: str, options: FitOptions) -> tuple[pd.DataFrame, str, dict[str, str]]:
    """The table, the column to fit, and where params, tokens and flops come from."""
    if not path.startswith("wandb:") and _is_sweep(Path(path)):
        if options.derive:
            raise DataError("--derive does nothing for a sweep: its records have N, D and C")
        records = read_records(path)
        if options.family is not None:
            _check_family(options.family, records.families, path)
            records = records.of(options.family)
        return records.frame, options.y or "loss_last", SWEEP_CONVENTIONS
    frame = load_table(path, options.derive, options.y)
    if options.family is not None:
        require(frame, ["family"], path)
        _check_family(options.family, list(dict.fromkeys(frame["family"])), path)
        attrs = frame.attrs
        frame = frame[frame["family"] == options.family]
        frame.attrs = attrs
    if options.y is not None:
        return frame, _own(frame, options.y), frame.attrs["conventions"]
    y = "loss" if "loss" in frame or "loss_last" not in frame else "loss_last"
    return frame, y, frame.attrs["conventions"]


def _check_family(family: str, there: Sequence[object], path: str) -> None:
    if family not in there:
        raise DataError(f"--family {family}: not in {path}; there are {', '.join(map(str, there))}")


def _is_sweep(folder: Path) -> bool:
    """Whether runs of this project lie in it; offline wandb files alone do not make a sweep."""
    return (folder / "sweep.json").is_file() or any(
        (file.parent / "metrics.jsonl").is_file() for file in folder.glob("*/config.json")
    )


def _own(frame: pd.DataFrame, name: str) -> str:
    """What a column of the table is called now."""
    return name if name in frame else str(frame.attrs.get("names", {}).get(name, name))


def _groups(frame: pd.DataFrame, column: str | None, xs: list[str]) -> tuple[np.ndarray | None, str, bool]:
    """What is independent of each other, in words, and whether it is the places of seeds."""
    if column is not None:
        if (missing := frame[column].isna()).any():
            raise DataError(f"groups: column '{column}' is missing in {rows_of(frame[missing])}")
        return frame[column].to_numpy(), f"column '{column}'", False
    if "run" in frame and frame["run"].notna().all() and frame["run"].duplicated().any():
        return frame["run"].to_numpy(), "runs, of which some have several rows", False
    places = places_of(frame, xs)
    if "seed" in frame and frame.groupby(places)["seed"].nunique().max() > 1:
        return places.to_numpy(), f"rows of equal {' and '.join(xs)}, of which some have several seeds", True
    return None, "none, every row is taken as independent", False


def _fit(
    frame: pd.DataFrame, xs: list[str], y: str, groups: np.ndarray | None, seeds: bool, budget: str | None,
    options: FitOptions,
) -> Law:  # fmt: skip
    numbers = {name: frame[name].to_numpy(dtype=np.float64) for name in (*xs, y)}
    if options.law == "power":
        from analysis.powerlaw import fit_power_law
        from analysis.seeds import fit_seeds

        how: dict[str, Any] = {
            "bootstrap": options.bootstrap, "loss_fn": options.loss_fn or "squared", "delta": options.delta,
        }  # fmt: skip
        if seeds and groups is not None:
            return fit_seeds(numbers[xs[0]], numbers[y], groups, options.offset, **how)
        return fit_power_law(numbers[xs[0]], numbers[y], options.offset, None, groups, **how)
    if options.law == "parametric":
        from analysis.parametric import fit_parametric

        return fit_parametric(
            numbers["params"], numbers["tokens"], numbers[y], options.loss_fn or "huber", options.delta,
            frame["unique_tokens"].to_numpy(dtype=np.float64) if options.repeated else None,
            groups, bootstrap=options.bootstrap,
        )  # fmt: skip
    from analysis.isoflop import fit_isoflop

    return fit_isoflop(
        numbers["params"], numbers[y], numbers.get("tokens"), numbers.get("flops"),
        tolerance=options.tolerance, groups=groups,
        budget=frame[budget].to_numpy() if budget else None,
    )  # fmt: skip


def _facts(
    path: str,
    law: Law,
    form: Form,
    y: str,
    conventions: dict[str, str],
    grouping: str,
    rows: Ready,
    notes: list[str],
    options: FitOptions,
) -> dict[str, Any]:
    """``fit.json``: plain values, null for what is no finite number."""
    level = options.level
    value: dict[str, Any] = {
        "table": path, "law": options.law, "form": FORMS[form][0], "y": y, "conventions": conventions,
        "groups": grouping, "converged": law.converged, "status": law.status,
        "params": {name: v for name, v, _, _ in law.rows(level)},
        "level": level, "no_interval": law.no_interval(level) or None,
        "interval": None if law.no_interval(level) else {n: [a, b] for n, _, a, b in law.rows(level)},
        "objective": getattr(law, "objective", None),
        "rows": len(rows.frame) + len(rows.dropped), "used": len(rows.frame),
        "left_out": {
            str(reason): [str(i) for i in part.index] for reason, part in rows.dropped.groupby("reason")
        },
        "notes": notes,
    }  # fmt: skip
    facts: dict[str, Any] = plain(value)
    return facts


def _ahead(law: Law, options: FitOptions) -> list[dict[str, float | None]]:
    """The law's value at ``options.at``, with the interval of one new run where there is one; nothing
    from a fit that failed."""
    from analysis.powerlaw import PowerLaw

    assert isinstance(law, PowerLaw)  # ``at`` means nothing to the others, and is refused
    if not law.converged:
        return []
    values = law.value(options.at).tolist()
    if law.no_interval(options.level):
        return [
            {"x": x, "value": v, "low": None, "high": None} for x, v in zip(options.at, values, strict=True)
        ]
    said = law.predict(options.at, options.level, observation=True)
    return [
        {"x": x, "value": v, "low": low, "high": high}
        for x, v, low, high in zip(options.at, values, said.low.tolist(), said.high.tolist(), strict=True)
    ]


def _draw(law: Law, folder: Path, x: str, y: str, level: float) -> None:
    """fit.svg and fit.png."""
    from analysis import plots
    from analysis.powerlaw import PowerLaw

    with plots.styled():
        label = y.replace("$", r"\$")  # a column's name is text, not mathematics
        fig, ax = plots.figure("", X_LABELS[x], label)
        if isinstance(law, PowerLaw):
            plots.log_axes(ax, plots.limits(law.x), plots.limits(law.y, 0.3, 0.14))
        law.plot(ax, level=level)
        ax.set_ylabel(label)
        if ax.get_legend() is None and ax.get_legend_handles_labels()[0]:
            ax.legend(loc="best")
        svg, png = plots.to_svg(fig), plots.to_png(fig)
    write_atomic(folder / "fit.svg", svg)
    write_bytes(folder / "fit.png", png)
